"""Pure functions on tensors: no ranks, no config tree, no logging. See docs/algorithms.md."""

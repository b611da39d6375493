"""The tree of sequences that begin alike, against the sets of their beginnings."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrft.models.prefix_tree import PrefixTree


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, 2), max_size=9)), min_size=1
    ).filter(lambda sequences: any(ids for _, ids in sequences))
)
def test_any_sequences(sequences):
    """Each beginning is in the row once for its group; a sequence's tokens are on its way."""
    tree = PrefixTree()
    held = set()
    for group, ids in sequences:
        beginnings = {(group, tuple(ids[:end])) for end in range(1, len(ids) + 1)}
        assert tree.add(torch.tensor(ids, dtype=torch.long), group) == len(beginnings - held)
        held |= beginnings
    row, layout, places = tree.pack()
    assert row.numel() == len(held)
    for (_, ids), place in zip(sequences, places, strict=True):
        assert row[place].tolist() == ids
        assert layout.positions[place].tolist() == list(range(len(ids)))
    ways = {
        (group, place[end - 1].item()): place[:end].tolist()
        for (group, ids), place in zip(sequences, places, strict=True)
        for end in range(1, len(ids) + 1)
    }
    assert len(ways) == row.numel()  # no token of two groups, no two ways to a token
    owners = [min(group for group, position in ways if position == n) for n in range(row.numel())]
    assert sum(a != b for a, b in pairwise(owners)) <= 1  # groups lie together
    starts, stops = layout.cu_queries.tolist(), layout.cu_keys.tolist()
    for segment, end in enumerate(starts[1:]):
        seen = layout.keys[stops[segment] : stops[segment + 1]].tolist()
        assert seen in ways.values()
        assert seen[-1] == end - 1


def test_no_more_segments_than_branches_need():
    """A sequence that goes on where another one ends is one segment with it, in either order."""
    for sequences in ([[1, 2], [1, 2, 3, 4]], [[1, 2, 3, 4], [1, 2]], [[1, 2, 3], [1, 2, 3]]):
        tree = PrefixTree()
        for ids in sequences:
            tree.add(ids)
        row, layout, _ = tree.pack()
        assert row.tolist() == max(sequences, key=len)
        assert layout.cu_queries.tolist() == [0, row.numel()]

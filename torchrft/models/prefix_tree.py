"""Sequences that begin alike, in one row that holds what they share once."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from torchrft.models.attention import Packed


@dataclass(eq=False)
class _Node:
    """Tokens behind those of the parent, and what follows them, by its first token."""

    ids: np.ndarray
    children: dict[Hashable, "_Node"] = field(default_factory=dict)

    def split(self, size: int) -> None:
        """Keeps the first `size` tokens; the others become its only child."""
        tail = _Node(self.ids[size:], self.children)
        self.ids, self.children = self.ids[:size], {int(tail.ids[0]): tail}


class PrefixTree:
    """A radix tree of token sequences (Morrison, 1968), where those of one `group` share prefixes.

    >>> tree = PrefixTree()
    >>> tree.add([5, 6, 7]), tree.add([5, 6, 8, 9])
    (3, 2)
    >>> ids, layout, places = tree.pack()
    >>> ids.tolist(), layout.positions.tolist(), [place.tolist() for place in places]
    ([5, 6, 7, 8, 9], [0, 1, 2, 2, 3], [[0, 1, 2], [0, 1, 3, 4]])
    """

    def __init__(self) -> None:
        self.roots: dict[Hashable, _Node] = {}
        self.sequences: list[tuple[Hashable, np.ndarray]] = []

    def add(self, ids: Tensor | Sequence[int], group: Hashable = None) -> int:
        """Adds a sequence; returns how many of its tokens the tree did not hold yet."""
        rest = np.asarray(ids)
        self.sequences.append((group, rest))
        node = self.roots.setdefault(group, _Node(rest[:0]))
        while rest.size:
            child = node.children.get(int(rest[0]))
            if child is None:
                node.children[int(rest[0])] = _Node(rest)
                break
            shared = _common(child.ids, rest)
            if shared == child.ids.size and not child.children:  # goes on where another one ended
                child.ids = rest
                return rest.size - shared
            if shared < min(child.ids.size, rest.size):
                child.split(shared)
            node, rest = child, rest[shared:]
        return rest.size

    def pack(self) -> tuple[Tensor, Packed, list[Tensor]]:
        """The row's token ids, int64 [N]; its layout; and where in it the tokens of each sequence
        are, int64 [length], in the order of `add`. A group's tokens are neighbors."""
        segments: list[tuple[int, int]] = []
        starts: dict[_Node, int] = {}
        row: list[np.ndarray] = []
        stack = [(node, -1) for root in self.roots.values() for node in root.children.values()]
        stack.reverse()
        size = 0
        while stack:
            node, parent = stack.pop()
            starts[node] = size
            size += node.ids.size
            stack += [(child, len(row)) for child in reversed(node.children.values())]
            segments.append((parent, node.ids.size))
            row.append(node.ids)
        places = [self._places(starts, *sequence) for sequence in self.sequences]
        return torch.from_numpy(np.concatenate(row)), Packed.tree(segments), places

    def _places(self, starts: dict[_Node, int], group: Hashable, rest: np.ndarray) -> Tensor:
        node, places = self.roots[group], [torch.arange(0)]
        while rest.size:
            node = node.children[int(rest[0])]
            size = min(node.ids.size, rest.size)
            places.append(torch.arange(starts[node], starts[node] + size))
            rest = rest[size:]
        return torch.cat(places)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    size = min(a.size, b.size)
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size

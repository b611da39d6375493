"""Proof, at every hand-over of weights, that an engine holds what the trainer sent.

While the tensors pass, a mark of each is taken; afterwards the engine's own memory is marked and
compared. A tensor that was dropped, is stale or lies in another order changes its mark.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Self

import torch
from torch import Tensor, nn

from torchrft.models.loader import persistent_buffers

_ROW = 1024  # integers that are weighted and summed together
_GROUP = 1 << 24  # integers marked at a time: few calls for many tensors, and bounded memory


class WeightSyncError(RuntimeError):
    """An engine does not hold the weights that it was sent."""


class Marks:
    """Marks of tensors on one device: numbers that depend on every bit and on its place.

    The bits, as int32, are weighted by their places in a row of 1,024 and summed, then the rows by
    theirs; overflow wraps. Two different tensors of one shape agree by chance about once in 2^32
    times. Tensors must stay as they are until `result`: some are kept until others have come.

    >>> marks = Marks.of([torch.ones(3), torch.ones(2), torch.ones(3)])
    >>> first, second, third = marks.result().tolist()
    >>> first == third, first == second
    (True, False)
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []  # int32, one for every row
        self.rows: list[tuple[int, int, int]] = []  # (tensor, its first row, rows), block by block
        self.waiting: list[Tensor] = []  # to be summed together
        self.size = 0  # integers that wait

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Self:
        marks = cls()
        for tensor in tensors:
            marks.add(tensor)
        return marks

    def add(self, tensor: Tensor) -> None:
        for number, block in enumerate(_integers(tensor).split(_GROUP)):
            # The last block of a large tensor does not keep the others alive while it waits.
            self.waiting.append(block.clone() if number and len(block) < _GROUP else block)
            if missing := -block.numel() % _ROW:
                self.waiting.append(block.new_zeros(missing))
            size = block.numel() + missing
            self.rows.append((self.count, number * _GROUP // _ROW, size // _ROW))
            self.size += size
            if self.size >= _GROUP:
                self._flush()
        self.count += 1

    def _flush(self) -> None:
        if self.waiting:
            bits = torch.cat(self.waiting) if len(self.waiting) > 1 else self.waiting[0]
            # In its own type: int32 overflows, and is read once.
            weighted = bits.view(-1, _ROW) * _weights(bits.device)
            self.sums.append(weighted.sum(1, dtype=torch.int32))
            self.waiting, self.size = [], 0

    def result(self) -> Tensor:
        """int64 [n], in the order of `add`."""
        self._flush()
        if not self.sums:
            return torch.zeros(self.count, dtype=torch.long)
        sums = torch.cat(self.sums).long()
        tensor, first, size = torch.tensor(self.rows, device=sums.device).unbind(1)
        part = torch.repeat_interleave(size, output_size=len(sums))
        row = torch.arange(len(sums), device=sums.device) - (size.cumsum(0) - size - first)[part]
        marks = sums.new_zeros(self.count)
        return marks.index_add_(0, tensor[part], sums * _odd(row))


def fingerprint(tensor: Tensor) -> Tensor:
    """The mark of a single tensor: int64 scalar, on the same device."""
    return Marks.of([tensor]).result()[0]


def _integers(tensor: Tensor) -> Tensor:
    """The tensor's bits, int32 [k]; zeros fill the last one up."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.nbytes % 4 == 0 and flat.storage_offset() * flat.itemsize % 4 == 0:
        return flat.view(torch.int32)
    raw = flat.view(torch.uint8)
    return torch.cat([raw, raw.new_zeros(-raw.numel() % 4)]).view(torch.int32)


def _odd(place: Tensor) -> Tensor:
    """Odd int64 numbers, as good as random, one for each place (int64)."""
    mixed = (place + 1) * 6364136223846793005
    mixed = (mixed ^ (mixed >> 29)) * -7046029254386353131
    return mixed ^ (mixed >> 32) | 1


@cache
def _weights(device: torch.device) -> Tensor:
    """int32 [_ROW]"""
    return _odd(torch.arange(_ROW, device=device)).to(torch.int32)


@dataclass(frozen=True)
class Held:
    """Where an engine holds (a part of) a tensor: `read()` gives the engine's own memory.

    The part is the `length` entries from `start` on along `dim`; all of them for `length` None.
    """

    read: Callable[..., Tensor]
    dim: int = 0
    start: int = 0
    length: int | None = None

    def part(self, tensor: Tensor) -> Tensor:
        if self.length is None:
            return tensor
        return tensor.narrow(self.dim, self.start, self.length)

    @cached_property
    def held_as(self) -> torch.dtype:
        return self.read().dtype

    def sent(self, tensor: Tensor) -> Tensor:
        """What the engine's memory must be after `tensor` was loaded."""
        return self.part(tensor).to(self.held_as)

    def holds_all(self, tensor: Tensor) -> bool:
        """Whether the engine's memory must be the tensor itself, bit for bit."""
        size = tensor.shape[self.dim] if tensor.dim() else None
        return self.length in (None, size) and self.held_as == tensor.dtype


@dataclass(frozen=True)
class Packed(Held):
    """The weight [N, K] of a linear layer that an engine keeps in a layout of its own, of which
    `read` makes a copy: it is compared, but cannot be written."""

    dtype: torch.dtype = torch.float32

    @cached_property
    def held_as(self) -> torch.dtype:
        return self.dtype


class Canary:
    """Watches one hand-over.

    Args: model, whose parameters and persistent buffers are those to expect, with their names,
        shapes, ties and dtypes (it may lie on the meta device); find, the places where the engine
        holds a tensor of that name, none for one that cannot be read back.

    >>> canary = Canary(model, find)                            # doctest: +SKIP
    >>> engine_model.load_weights(canary.watch(named_tensors))  # doctest: +SKIP
    >>> canary.check()                                          # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, find: Callable[[str], Sequence[Held]]) -> None:
        self.expected = dict[str, Tensor](model.named_parameters(remove_duplicate=False))
        self.expected |= persistent_buffers(model)
        self.find = find
        self.sent, self.places = Marks(), list[tuple[str, Held]]()
        self.infinite: list[str] = []  # packed ones are read back by products, in which NaN spreads
        self.seen: set[int] = set()  # ids, so that one name of a tied weight will do

    def watch(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes the tensors on, in the expected dtype. Raises ValueError for an unknown name or
        another shape, and at the end for a parameter or buffer that got no value."""
        for name, tensor in named_tensors:
            if name not in self.expected:
                raise ValueError(f'weight update: the engine\'s model has no parameter "{name}"')
            shape = self.expected[name].shape
            if shape != tensor.shape:
                raise ValueError(
                    f'weight update: "{name}" is {tuple(tensor.shape)} in the trainer and '
                    f"{tuple(shape)} in the engine"
                )
            self.seen.add(id(self.expected[name]))
            tensor = tensor.to(self.expected[name].dtype)
            for held in self.find(name):
                if isinstance(held, Packed) and not tensor.isfinite().all():
                    self.infinite.append(name)
                self.places.append((name, held))
                self.sent.add(held.sent(tensor))
            yield name, tensor
        for name, parameter in self.expected.items():
            if id(parameter) not in self.seen:
                raise ValueError(f'weight update: no value came for "{name}"')

    def check(self) -> None:
        """Raises WeightSyncError naming the first tensor that the engine does not hold as sent."""
        if self.infinite:
            raise WeightSyncError(
                f'weight update: "{self.infinite[0]}" holds NaN or infinite numbers: training has '
                "diverged; go back to a checkpoint and lower the learning rate"
            )
        if not self.places:
            return
        found = Marks.of(held.read() for _, held in self.places).result()
        agree = self.sent.result().to(found.device) == found
        wrong = (~agree).nonzero().flatten().tolist()  # one transfer to the host
        if wrong:
            raise WeightSyncError(
                f'weight update: the engine does not hold "{self.places[wrong[0]][0]}" as the '
                f"trainer sent it ({len(wrong)} of {len(agree)} tensors differ); rollouts would "
                "come from another policy, so the run stops"
            )

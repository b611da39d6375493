"""Proof, at every hand-over of weights, that an engine holds what the trainer sent.

While the tensors pass, a mark of each is taken; afterwards the engine's own memory is marked and
compared. A tensor that was dropped, is stale or lies in another order changes its mark.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_BLOCK = 1 << 24  # elements marked at a time: bounds the memory, and the weights are made once
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightSyncError(RuntimeError):
    """An engine does not hold the weights that it was sent."""


def fingerprint(tensor: Tensor) -> Tensor:
    """int64 scalar that depends on every bit of `tensor` and on its place, on the same device.

    The bits, as integers, are weighted by their places and summed; overflow wraps. Two different
    tensors of one shape agree by chance about once in 2^32 times.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_INTS[flat.element_size()])
    if bits.dtype == torch.int16 and bits.numel() % 2 == 0:  # two at a time: half the work
        bits = (bits if bits.storage_offset() % 2 == 0 else bits.clone()).view(torch.int32)
    total: Tensor | None = None
    for block in bits.split(_BLOCK):
        # Summed in its own type: int32 overflows, and is read once.
        weighted = block * _weights(block.device)[: block.numel()]
        part = weighted.sum(dtype=weighted.dtype).long()
        total = part if total is None else total * 6364136223846793005 + part
    return torch.zeros((), dtype=torch.int64, device=tensor.device) if total is None else total


_weights_of: dict[torch.device, Tensor] = {}


def _weights(device: torch.device) -> Tensor:
    """Odd int32 numbers, as good as random, one for each place in a block."""
    if device not in _weights_of:
        place = torch.arange(_BLOCK, dtype=torch.int64, device=device)
        mixed = (place * 2654435761 + 40503) & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * 2246822519 & 0x7FFFFFFF
        _weights_of[device] = (mixed | 1).to(torch.int32)
    return _weights_of[device]


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

    def sent(self, tensor: Tensor) -> Tensor:
        """The mark that the engine's memory must have after `tensor` was loaded."""
        return fingerprint(self.part(tensor).to(self.read().dtype))

    def found(self) -> Tensor:
        return fingerprint(self.read())

    def agrees(self, sent: Tensor, found: Tensor) -> Tensor:
        return sent == found


@dataclass(frozen=True)
class Packed(Held):
    """The weight [N, K] of a linear layer that an engine keeps in a layout of its own.

    It is marked by the layer's output for one random input: `read(x [1, K])` gives [1, N]. Equal
    weights differ by rounding, 1e-5 of the products' size at most.
    """

    inputs: int = 0  # K
    dtype: torch.dtype = torch.float32

    def _input(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.inputs)
        return torch.randn(1, self.inputs, generator=generator).to(self.dtype)

    def sent(self, tensor: Tensor) -> Tensor:
        weight = self.part(tensor).to(self.dtype).float()
        x = self._input().float()[0]
        return torch.stack([weight @ x, weight.abs() @ x.abs()])  # the output, and its size

    def found(self) -> Tensor:
        return self.read(self._input()).float()[0]

    def agrees(self, sent: Tensor, found: Tensor) -> Tensor:
        rounding = 1e-5 if self.dtype == torch.float32 else 1e-2
        return ((sent[0] - found).abs() <= rounding * sent[1]).all()


class Canary:
    """Watches one hand-over.

    Args: model, whose parameters' names, shapes and ties are those to expect (it may lie on the
        meta device); find, the places where the engine holds a tensor of that name, none for one
        that cannot be read back.

    >>> canary = Canary(model, find)                            # doctest: +SKIP
    >>> engine_model.load_weights(canary.watch(named_tensors))  # doctest: +SKIP
    >>> canary.check()                                          # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, find: Callable[[str], Sequence[Held]]) -> None:
        self.expected = dict(model.named_parameters(remove_duplicate=False))
        self.find = find
        self.marks: list[tuple[str, Held, Tensor]] = []
        self.seen: set[int] = set()  # ids, so that one name of a tied weight will do

    def watch(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes the tensors on. Raises ValueError for an unknown name or another shape, and at
        the end for a parameter that got no value."""
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
            self.marks += [(name, held, held.sent(tensor)) for held in self.find(name)]
            yield name, tensor
        for name, parameter in self.expected.items():
            if id(parameter) not in self.seen:
                raise ValueError(f'weight update: no value came for "{name}"')

    def check(self) -> None:
        """Raises WeightSyncError naming the first tensor that the engine does not hold as sent."""
        if not self.marks:
            return
        # One transfer to the host for all of them.
        agree = torch.stack([held.agrees(sent, held.found()) for _, held, sent in self.marks])
        wrong = (~agree).nonzero().flatten().tolist()
        if wrong:
            raise WeightSyncError(
                f'weight update: the engine does not hold "{self.marks[wrong[0]][0]}" as the '
                f"trainer sent it ({len(wrong)} of {len(agree)} tensors differ); rollouts would "
                "come from another policy, so the run stops"
            )

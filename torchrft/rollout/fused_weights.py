"""Where a vLLM or SGLang model holds the tensors of a Hugging Face model.

Both fuse projections (q, k, v; gate, up), split them over the engine's ranks and pad the
vocabulary; vLLM on a CPU packs linear weights into a layout of its own. Their layers have one
origin, the same names and attributes: they are told apart by class name, without an import.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchrft.rollout.canary import Held, Packed

_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def held(model: nn.Module, name: str) -> list[Held]:
    """Where this rank holds (a part of) the Hugging Face parameter; [] if nobody can tell."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for old, new in (mapper.orig_to_new_prefix if mapper is not None else {}).items():
        name = (new or "") + name.removeprefix(old) if name.startswith(old) else name
    path, _, leaf = name.rpartition(".")
    found = _find(model, path)
    if found is None:
        return []
    places = _places(*found, leaf)
    language = getattr(model, "language_model", model)
    head = getattr(language, "lm_head", None)
    if path.endswith("embed_tokens") and _is_tied(language) and isinstance(head, nn.Module):
        places += _places(head, None, leaf)  # packed on its own, it can stay behind
    return places


class Places:
    """The places of a model's tensors, each looked up once.

    A tensor that the engine's own loader has put there, as a canary saw, is written there directly
    the next time, which takes a tenth of the time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.loaded, self.proven = model, set[str](), set[str]()
        self.known: dict[str, list[Held]] = {}
        self.ranks = max(getattr(module, "tp_size", None) or 1 for module in model.modules())

    def __call__(self, name: str) -> list[Held]:
        if name not in self.known:
            self.known[name] = held(self.model, name)
        return self.known[name]

    def write(self, pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors that the engine's loader must load."""
        for name, tensor in pairs:
            places = self(name)
            if name in self.proven:
                for place in places:
                    memory = place.read()
                    memory.copy_(place.part(tensor).reshape(memory.shape))
                continue
            yield name, tensor
            if not any(isinstance(place, Packed) for place in places):
                size = sum(place.read().numel() for place in places)
                if size * self.ranks >= tensor.numel():  # nothing of it lies elsewhere
                    self.loaded.add(name)

    def prove(self) -> None:
        """To be called after a canary's check."""
        self.proven |= self.loaded


def is_a(module: object, name: str) -> bool:
    """Whether a class of that name is among the module's."""
    return any(cls.__name__ == name for cls in type(module).__mro__)


def _is_tied(model: Any) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _find(model: Any, path: str) -> tuple[nn.Module, int | None] | None:
    """The module at `path`, or the fused one that it is the i-th part of."""
    try:
        return model.get_submodule(path), None
    except AttributeError:
        parent, _, child = path.rpartition(".")
    for fused, children in (getattr(model, "packed_modules_mapping", None) or _FUSED).items():
        if child in children:
            try:
                return model.get_submodule(f"{parent}.{fused}"), children.index(child)
            except AttributeError:
                continue
    return None


def _places(module: Any, part: int | None, leaf: str) -> list[Held]:
    """Part `part` (None: the whole) of the module's parameter `leaf`."""
    if is_a(module, "VocabParallelEmbedding"):
        shard = module.shard_indices
        start, length = shard.org_vocab_start_index, shard.org_vocab_end_index
        return [_place(module, leaf, 0, 0, start, length - start)]
    if is_a(module, "RowParallelLinear") and leaf == "weight":
        length = module.input_size_per_partition
        return [_place(module, leaf, 1, 0, module.tp_rank * length, length)]
    if is_a(module, "ReplicatedLinear") and part is None:
        return [_place(module, leaf, 0, 0, 0, module.output_size)]
    if not is_a(module, "ColumnParallelLinear"):
        return [Held(_Memory(module, leaf, slice(None)))]
    found, at, before = [], 0, 0  # before: rows of the tensor that belong to parts before this one
    for index, length in enumerate(module.output_partition_sizes):
        shared = is_a(module, "QKVParallelLinear") and index > 0
        replicas = module.num_kv_head_replicas if shared else 1
        start = module.tp_rank // replicas * length
        if part in (None, index):
            first = before if part is None else 0
            found.append(_place(module, leaf, 0, at, first + start, length))
        at, before = at + length, before + length * module.tp_size // replicas
    return found


def _place(module: Any, leaf: str, dim: int, at: int, start: int, length: int) -> Held:
    """Where the `length` entries of a tensor from `start` on along `dim` are: from row `at` on."""
    columns = slice(None) if dim == 1 else slice(at, at + length)
    embeds = is_a(module, "VocabParallelEmbedding") and not is_a(module, "ParallelLMHead")
    if leaf == "weight" and hasattr(module, "cpu_linear") and not embeds:
        dtype, size = module.weight.dtype, _inputs(module)

        def unpacked() -> Tensor:
            rows = torch.eye(size, dtype=dtype).split(1024)  # products with 0 and 1 are exact
            outputs = [module.cpu_linear(x, module.weight, None)[:, columns] for x in rows]
            return torch.cat(outputs).t()

        return Packed(unpacked, dim, start, length, dtype)
    return Held(_Memory(module, leaf, columns), dim, start, length)


class _Memory:
    """Reads rows of a module's parameter; the view of them is made anew where that has changed."""

    def __init__(self, module: nn.Module, leaf: str, rows: slice) -> None:
        self.module, self.leaf, self.rows = module, leaf, rows
        self.parameter: Tensor | None = None
        self.layout: tuple[object, ...] = ()
        self.view = torch.empty(0)

    def __call__(self) -> Tensor:
        parameter = getattr(self.module, self.leaf)
        layout = parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype
        if parameter is not self.parameter or layout != self.layout:
            self.parameter, self.layout = parameter, layout
            # A buffer may have no dimension.
            self.view = parameter.detach()[self.rows] if parameter.dim() else parameter.detach()
        return self.view


def _inputs(module: Any) -> int:
    for name in ("embedding_dim", "input_size_per_partition", "input_size"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise AssertionError(f"{type(module).__name__} has no input size")

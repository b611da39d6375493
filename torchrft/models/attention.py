"""One attention function for every model, registered with transformers under the name "torchrft".

What a forward pass attends to travels as the keyword argument `layout` of the model's forward:
transformers hands it through to the attention function untouched. A layout is a callable

    layout(layer, query [B, H, T, D], key [B, Hkv, T, D], value [B, Hkv, T, D], scale, window)
        -> [B, T, H, D]

with a `ScoreChange` as one more argument where the model has one.

Here are the two of training, `padded` (rows padded on the right) and `Packed` (one row holding
several sequences, shared prompts once); the native engine brings its own, with a KV cache.
Because no mask function is registered for "torchrft", transformers builds no mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from torchrft.models.mixers import Mixer, rows_of
from torchrft.models.scores import Kernel, ScoreChange, attend_with_sinks

if TYPE_CHECKING:  # jobs without sequence parallelism do without it
    from torchrft.parallel.sequence_parallel import Split

NAME = "torchrft"
TRACED = "torchrft_traced"  # the same, where torch.compile may look into some layouts
Layout = Callable[..., Tensor]

# torch 2.13 has grouped queries here, 2.11 has not.
_VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters

_handed = ContextVar("handed", default=False)


@contextmanager
def handed() -> Iterator[None]:
    """Within it a forward pass was given a layout, and every attention call must get it."""
    token = _handed.set(True)
    try:
        yield
    finally:
        _handed.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    split: Split | None = None,
    layer: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every attention layer; returns ([B, T, H, D], None).

    With `split` (sequence parallelism) it gets a part of the sequence, and returns that part.

    Without a layout, rows are padded on the right, as when a script calls a model itself. Raises
    ValueError for what would silently change the result: an attention mask, dropout, sinks of
    another name, and a layout that was `handed` to the model and does not arrive.
    """
    if attention_mask is not None:
        raise ValueError("torchrft attention takes a `layout`, not an attention_mask")
    if dropout > 0 or kwargs.get("sinks") is not None:
        what = f"attention_dropout = {dropout}" if dropout > 0 else "sinks"
        raise ValueError(f"{type(module).__name__} uses {what}, which torchrft does not support")
    if layout is None:
        if _handed.get():
            raise ValueError(
                f"{type(module).__name__} got no `layout`: the model's layers do not hand it on, "
                "which torchrft does not support"
            )
        layout = padded
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    place: Any = module.layer_idx if layer is None else layer
    if split is not None:
        query, key, value = split.whole(query, key, value)
        s_aux = None if s_aux is None else split.heads(s_aux)
    changed = softcap is not None or s_aux is not None
    change = (ScoreChange(s_aux, softcap),) if changed else ()
    out = layout(place, query, key, value, scale, sliding_window, *change)
    return out if split is None else split.part(out), None


def traced(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`attention` for compiled layers, which look into a layout that has `traced`.

    That one gets the layer as the tensor `layer_index` of the module: its number would be part of
    the compiled graph, so that layers could not share it.
    """
    if not getattr(kwargs.get("layout"), "traced", False):
        return untraced(module, query, key, value, mask, **kwargs)
    return attention(module, query, key, value, mask, layer=module.layer_index, **kwargs)


# Layouts are Python objects that differ from batch to batch, so they stay out of compiled graphs.
untraced = torch.compiler.disable(attention)
AttentionInterface.register(NAME, untraced)
AttentionInterface.register(TRACED, traced)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Boolean [length, length], true where attended; None when plain causality is enough."""
    if window is None or window >= length:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def padded(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    change: ScoreChange | None = None,
) -> Tensor:
    """Causal attention over rows that are padded on the right.

    Padding needs no mask: a causal query never looks to its right, and what the padding itself
    computes is never read.
    """
    mask = causal_mask(query.shape[2], window, query.device)
    return _sdpa(query, key, value, mask, scale, change)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    change: ScoreChange | None,
) -> Tensor:
    """[B, T, H, D]; causal where there is no mask."""
    if change is not None:
        return change.attend(query, key, value, mask, scale)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, **options)
    return out.transpose(1, 2)


@dataclass(frozen=True)
class Packed:
    """Attention within each of several sequences in one row that holds shared prefixes once.

    The row is a series of segments: a prefix begins a sequence (a prompt), a branch continues an
    earlier segment (a response, a later turn). A segment attends causally to itself and to all that
    it continues. Without branches this is ordinary sequence packing. On CUDA it is one
    variable-length kernel. Elsewhere segments are unfolded into padded rows, which costs
    rows x longest^2 where a mask over the whole row would cost (sum of lengths)^2.
    """

    positions: Tensor  # int64 [N]: position of each token in its sequence
    cu_queries: Tensor  # int32 [segments + 1], boundaries of the segments in the row
    cu_keys: Tensor  # int32 [segments + 1], boundaries in `keys`
    keys: Tensor  # int64: position in the row of every segment's keys, segment by segment
    longest: tuple[int, int]  # queries and keys of the longest segment
    prefixes: Tensor  # int64 [G, longest prefix]: position in the row of each cell (0 if padding)
    branches: Tensor  # int64 [S, longest branch], as prefixes; S may be 0
    branch_keys: Tensor  # int64 [S, longest path], as prefixes
    branch_starts: Tensor  # int64 [S]: tokens before each branch in its sequence
    fold: Tensor  # int64 [N]: cell of each position, counting prefix cells, then branch cells
    sequences: Tensor  # int64 [E, longest path], as prefixes: those that no other one continues
    place: Tensor  # int64 [N]: a cell of each position among those of `sequences`

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> Packed:
        """The layout of groups (prefix length > 0, lengths >= 0 of what continues it), in order.

        >>> layout = Packed.of([(2, [1, 3])])
        >>> layout.positions.tolist()
        [0, 1, 2, 2, 3, 4]
        >>> layout.keys.tolist()
        [0, 1, 0, 1, 2, 0, 1, 3, 4, 5]
        """
        segments: list[tuple[int, int]] = []
        for prefix, branches in groups:
            root = len(segments)
            segments.append((-1, prefix))
            segments += [(root, length) for length in branches if length]
        return cls.tree(segments)

    @classmethod
    def tree(cls, segments: Sequence[tuple[int, int]]) -> Packed:
        """The layout of segments (the earlier one that it continues or -1, length > 0), in order.

        >>> Packed.tree([(-1, 2), (0, 1), (1, 2), (0, 1)]).positions.tolist()
        [0, 1, 2, 3, 4, 2]
        """
        paths: list[Tensor] = []  # positions in the row, from a sequence's start to a segment's end
        ends = accumulate(length for _, length in segments)
        for (parent, length), end in zip(segments, ends, strict=True):
            own_tokens = torch.arange(end - length, end)
            paths.append(own_tokens if parent < 0 else torch.cat([paths[parent], own_tokens]))
        continued = {parent for parent, _ in segments}
        whole = [path for i, path in enumerate(paths) if i not in continued]
        sequences = pad_sequence(whole, batch_first=True)
        place = torch.empty(int(paths[-1][-1]) + 1, dtype=torch.long)
        for row, path in enumerate(whole):
            place[path] = row * sequences.shape[1] + torch.arange(len(path))
        parents, own = torch.tensor(segments).unbind(1)
        seen = torch.tensor([len(path) for path in paths])
        before, start = seen - own, own.cumsum(0) - own
        columns = torch.arange(int(own.max()))
        inside = columns < own[:, None]
        queries = (start[:, None] + columns).where(inside, 0)
        keys = pad_sequence(paths, batch_first=True)
        is_prefix = parents < 0
        prefixes, branches = _trim(queries, own, is_prefix), _trim(queries, own, ~is_prefix)
        nth = is_prefix.cumsum(0)  # prefixes so far; what else came before are branches
        branch_cell = prefixes.numel() + (torch.arange(len(own)) - nth) * branches.shape[1]
        first_cell = torch.where(is_prefix, (nth - 1) * prefixes.shape[1], branch_cell)
        return cls(
            positions=(before[:, None] + columns)[inside],
            cu_queries=F.pad(own.cumsum(0), (1, 0)).to(torch.int32),
            cu_keys=F.pad(seen.cumsum(0), (1, 0)).to(torch.int32),
            keys=torch.cat(paths),
            longest=(queries.shape[1], keys.shape[1]),
            prefixes=prefixes,
            branches=branches,
            branch_keys=_trim(keys, seen, ~is_prefix),
            branch_starts=before[~is_prefix],
            fold=(first_cell[:, None] + columns)[inside],
            sequences=sequences,
            place=place,
        )

    def to(self, device: torch.device) -> Packed:
        """The same on `device`."""
        tensors: dict[str, Any] = {
            n: x.to(device) for n, x in vars(self).items() if isinstance(x, Tensor)
        }
        return replace(self, **tensors)

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        change: ScoreChange | None = None,
    ) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, D]
        is_capped = change is not None and change.cap is not None  # which no kernel here does
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not is_capped:
            sinks = None if change is None else change.sinks
            return self._varlen(q, k, v, scale, window, sinks).unsqueeze(0)
        query, key, value = (x[self.prefixes].transpose(1, 2) for x in (q, k, v))
        cells = padded(layer, query, key, value, scale, window, change).flatten(0, 1)
        if self.branches.numel():
            cells = torch.cat([cells, self._branches(q, k, v, scale, window, change)])
        return cells[self.fold].unsqueeze(0)

    def mix(self, mixer: Mixer, hidden: Tensor, options: dict[str, Any]) -> Tensor:
        """A mixer's output [1, N, D] for the row: it runs on whole sequences from their start."""
        given = {k: rows_of(v, self.sequences, hidden.shape[1]) for k, v in options.items()}
        out = mixer.run(hidden[0][self.sequences], given)
        return out.flatten(0, 1)[self.place].unsqueeze(0)

    def _branches(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        change: ScoreChange | None,
    ) -> Tensor:
        columns = torch.arange(self.branch_keys.shape[1], device=q.device)
        steps = torch.arange(self.branches.shape[1], device=q.device)
        last = (self.branch_starts[:, None] + steps)[:, :, None]  # each query's own column
        mask = columns <= last
        if window is not None:
            mask &= columns > last - window
        cells = (q[self.branches], k[self.branch_keys], v[self.branch_keys])
        query, key, value = (x.transpose(1, 2) for x in cells)
        return _sdpa(query, key, value, mask[:, None], scale, change).flatten(0, 1)

    def _varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if self.branches.numel():
            k, v = k[self.keys], v[self.keys]
        options: dict[str, Any] = {"scale": scale, "window_size": ((window or 0) - 1, 0)}
        if q.shape[1] != k.shape[1]:
            if _VARLEN_HAS_GQA:
                options["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        width = v.shape[-1]
        if width < k.shape[-1]:  # MLA: the kernel wants values as wide as keys
            v = F.pad(v, (0, k.shape[-1] - width))
        # A segment's last query sees all its keys: causality is aligned at the end.
        lengths = self.cu_queries, self.cu_keys, *self.longest
        if sinks is not None:
            kernel = _flash(lengths, options)
            return attend_with_sinks(kernel, q, k, v, sinks)[..., :width]
        out = varlen_attn(q, k, v, *lengths, **options)
        assert isinstance(out, Tensor)
        return out[..., :width]


def _flash(lengths: tuple[Any, ...], options: dict[str, Any]) -> Kernel:
    """`varlen_attn` with these arguments, whose own backward pass knows no gradient of the
    log-sum-exp."""
    window = options["window_size"]

    def backward(grad: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = torch.zeros(2, dtype=torch.uint64, device=grad.device)  # of dropout: there is none
        return torch.ops.torch_attn._varlen_attn_backward(
            grad, *tensors, *lengths, window == (-1, 0), state, options["scale"], list(window)
        )

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = varlen_attn(q, k, v, *lengths, return_aux=AuxRequest(lse=True), **options)
        return out, lse

    return Kernel(forward, backward)


def _trim(table: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
    """The chosen rows, no wider than the longest of them."""
    width = int(lengths[rows].max()) if bool(rows.any()) else 0
    return table[rows][:, :width]

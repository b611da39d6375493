"""Attention over padded and packed rows against dense masks in float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from torchrft.models import attention
from torchrft.models.attention import NAME, Packed, padded
from torchrft.models.scores import ScoreChange

SCALE = 0.3


def dense(query, key, value, allowed, scale=SCALE):
    """softmax(scale q k^T) v with the mask `allowed` [T, T]: [B, H, T, D] -> [B, T, H, D]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = scale * query @ key.transpose(-1, -2)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


def causal(length, window=None):
    return torch.tensor(
        [
            [j <= i and (window is None or i - j < window) for j in range(length)]
            for i in range(length)
        ]
    )


def allowed_in(groups, window=None):
    """Who sees whom in the row of `groups`, token by token: (group, branch or None, position)."""
    tokens = []
    for g, (prefix, branches) in enumerate(groups):
        tokens += [(g, None, p) for p in range(prefix)]
        for b, length in enumerate(branches):
            tokens += [(g, b, prefix + p) for p in range(length)]
    return torch.tensor(
        [
            [
                g == g2
                and b2 in (None, b)
                and p2 <= p
                and (window is None or p - p2 < window)
                and not (b is None and b2 is not None)
                for g2, b2, p2 in tokens
            ]
            for g, b, p in tokens
        ]
    )


def qkv(length, heads=4, kv_heads=2, rows=1, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, h, length, dim, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads)
    ]


def with_gradients(function, tensors, seed=1):
    """The output of `function` and the gradients of a random weighing of it."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    out = function(*tensors)
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def check(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def length_of(groups):
    return sum(prefix + sum(branches) for prefix, branches in groups)


GROUPS = {
    "one sequence": [(5, [])],
    "plain packing": [(5, []), (1, []), (3, [])],
    "shared prefix": [(4, [3, 5, 1])],
    "groups of one": [(3, [4]), (2, [2])],
    "empty branches": [(3, [0, 2, 0]), (2, [0])],
    "only empty branches": [(3, [0, 0]), (1, [0])],
    "short prefix": [(1, [6, 1]), (7, [1])],
    "mixed": [(3, [2, 4]), (5, []), (1, [1, 1, 1]), (2, [7])],
}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_packed_rows(groups, window, kv_heads):
    layout = Packed.of(groups)
    tensors = qkv(length_of(groups), kv_heads=kv_heads)
    check(
        with_gradients(lambda q, k, v: layout(0, q, k, v, SCALE, window), tensors),
        with_gradients(lambda q, k, v: dense(q, k, v, allowed_in(groups, window)), tensors),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=4)),
        min_size=1,
        max_size=4,
    ),
    window=st.none() | st.integers(1, 8),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3)]),
)
def test_packed_rows_of_any_groups(groups, window, heads):
    layout = Packed.of(groups)
    length = length_of(groups)
    assert layout.positions.tolist() == [
        position
        for prefix, branches in groups
        for position in (
            *range(prefix),
            *(prefix + p for branch in branches for p in range(branch)),
        )
    ]
    tensors = qkv(length, *heads, seed=length)
    check(
        with_gradients(lambda q, k, v: layout(0, q, k, v, SCALE, window), tensors),
        with_gradients(lambda q, k, v: dense(q, k, v, allowed_in(groups, window)), tensors),
    )


def test_packed_by_hand():
    """Prompt a b with responses c and d e f, then the lone sequence g."""
    layout = Packed.of([(2, [1, 3]), (1, [0])])
    assert layout.positions.tolist() == [0, 1, 2, 2, 3, 4, 0]
    assert layout.cu_queries.tolist() == [0, 2, 3, 6, 7]
    assert layout.cu_keys.tolist() == [0, 2, 5, 10, 11]
    assert layout.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert layout.longest == (3, 5)
    assert layout.prefixes.tolist() == [[0, 1], [6, 0]]
    assert layout.branches.tolist() == [[2, 0, 0], [3, 4, 5]]
    assert layout.branch_keys.tolist() == [[0, 1, 2, 0, 0], [0, 1, 3, 4, 5]]
    assert layout.branch_starts.tolist() == [2, 2]
    # Cells: prefixes 0-3, branches 4-9.
    assert layout.fold.tolist() == [0, 1, 4, 7, 8, 9, 2]
    assert layout.cu_queries.dtype == layout.cu_keys.dtype == torch.int32
    moved = layout.to(torch.device("meta"))
    assert moved.longest == (3, 5)
    assert all(
        getattr(moved, name).device.type == "meta"
        for name in Packed.__dataclass_fields__
        if name != "longest"
    )


@st.composite
def trees(draw):
    """Segments of a row: the earlier one that each continues or -1, and its length."""
    count = draw(st.integers(1, 7))
    return [(draw(st.integers(-1, k - 1)), draw(st.integers(1, 4))) for k in range(count)]


def allowed_in_tree(segments, window):
    """bool [N, N] by the definition: a token sees those before it on the way from its root."""
    ways = []  # of each segment: the positions of its tokens and of all that it continues
    start = 0
    for parent, length in segments:
        ways.append((ways[parent] if parent >= 0 else []) + list(range(start, start + length)))
        start += length
    allowed = torch.zeros(start, start, dtype=torch.bool)
    for way, (_, length) in zip(ways, segments, strict=True):
        for place in range(len(way) - length, len(way)):
            first = 0 if window is None else max(0, place - window + 1)
            allowed[way[place], way[first : place + 1]] = True
    return allowed


@settings(max_examples=60, deadline=None, derandomize=True)
@given(segments=trees(), window=st.none() | st.integers(1, 6))
def test_packed_rows_of_any_tree(segments, window):
    """Branches of branches, on the CPU's way and on the kernel's."""
    layout = Packed.tree(segments)
    allowed = allowed_in_tree(segments, window)
    assert layout.positions.tolist() == (allowed_in_tree(segments, None).sum(1) - 1).tolist()
    tensors = qkv(len(allowed), seed=len(allowed))
    wanted = with_gradients(lambda q, k, v: dense(q, k, v, allowed), tensors)
    check(with_gradients(lambda q, k, v: layout(0, q, k, v, SCALE, window), tensors), wanted)

    def kernel(q, k, v):
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        return layout._varlen(*rows, SCALE, window)[None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", fake_varlen(True))
        patch.setattr(attention, "_VARLEN_HAS_GQA", True)
        check(with_gradients(kernel, tensors), wanted)


def fake_varlen(has_gqa):
    """Variable-length attention from its documentation: causal is aligned at the end."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, **options):
        assert options in ([{}, {"enable_gqa": True}] if has_gqa else [{}])
        assert options or q.shape[1] == k.shape[1]
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (cu_q.diff().max(), cu_k.diff().max()) == (max_q, max_k)
        left, right = window_size
        assert right == 0
        out = []
        for i in range(len(cu_q) - 1):
            own, seen = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            part = [x.transpose(0, 1)[None] for x in (q[own], k[seen], v[seen])]
            queries, keys = part[0].shape[2], part[1].shape[2]
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
            allowed = (distance >= 0) & ((distance <= left) | torch.tensor(left < 0))
            out.append(dense(*part, allowed, scale)[0])
        return torch.cat(out)

    return varlen


@pytest.mark.parametrize("has_gqa", [True, False], ids=["torch 2.13", "torch 2.11"])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_what_the_variable_length_kernel_is_told(groups, window, has_gqa, monkeypatch):
    """The CUDA path with a stand-in for the kernel; tests/gpu runs the kernel itself."""
    monkeypatch.setattr(attention, "varlen_attn", fake_varlen(has_gqa))
    monkeypatch.setattr(attention, "_VARLEN_HAS_GQA", has_gqa)
    layout = Packed.of(groups)
    tensors = qkv(length_of(groups))

    def packed(q, k, v):
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        return layout._varlen(*rows, SCALE, window)[None]

    check(
        with_gradients(packed, tensors),
        with_gradients(lambda q, k, v: dense(q, k, v, allowed_in(groups, window)), tensors),
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_padded_rows(window, kv_heads):
    tensors = qkv(7, kv_heads=kv_heads, rows=3)
    check(
        with_gradients(lambda q, k, v: padded(0, q, k, v, SCALE, window), tensors),
        with_gradients(lambda q, k, v: dense(q, k, v, causal(7, window)), tensors),
    )


@pytest.mark.parametrize("window", [None, 3])
def test_padding_on_the_right_changes_nothing(window):
    tensors = qkv(7)
    short = padded(0, *(x[:, :, :5] for x in tensors), SCALE, window)
    other = [x.clone() for x in tensors]
    for x in other:
        x[:, :, 5:] = 1e3
    for row in (tensors, other):
        torch.testing.assert_close(padded(0, *row, SCALE, window)[:, :5], short)


def call(**options):
    module = SimpleNamespace(layer_idx=3)
    query, key, value = qkv(4)
    options = {"attention_mask": None, "layout": padded, **options}
    return attention.attention(module, query, key, value, **options)


def test_attention_defaults():
    """Registered by name; causal rows, scaled by the root of the head dimension."""
    assert AttentionInterface()[attention.TRACED] is attention.traced
    assert AttentionInterface()[NAME].__wrapped__ is attention.attention
    out, weights = call()
    assert weights is None
    torch.testing.assert_close(out, dense(*qkv(4), causal(4), 4**-0.5))
    torch.testing.assert_close(
        call(scaling=0.1, sliding_window=2, softcap=None, s_aux=None, is_causal=True)[0],
        dense(*qkv(4), causal(4, 2), 0.1),
    )


def test_a_layout_that_does_not_arrive_is_no_padded_row():
    """A model whose layers drop it would attend across the sequences of a packed row."""
    with attention.handed(), pytest.raises(ValueError, match="SimpleNamespace got no `layout`"):
        call(layout=None)


def test_a_model_that_a_script_calls_itself_has_padded_rows():
    plain, given = call(layout=None), call(layout=attention.padded)
    assert torch.equal(plain[0], given[0])


def test_attention_hands_everything_to_the_layout():
    seen = []

    def layout(layer, query, key, value, scale, window):
        seen.append((layer, query.shape, key.shape, value.shape, scale, window))
        return query

    call(layout=layout, scaling=0.7, sliding_window=9)
    assert seen == [(3, (1, 4, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4), 0.7, 9)]


def test_layouts_get_a_score_change_where_the_model_has_one():
    sinks, seen = torch.zeros(4), []

    def layout(layer, query, key, value, scale, window, *change):
        seen.append(change)
        return query

    for options in ({}, {"softcap": 30.0}, {"s_aux": sinks}):
        call(layout=layout, **options)
    assert seen == [(), (ScoreChange(None, 30.0),), (ScoreChange(sinks, None),)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sinks": torch.zeros(4)}, "uses sinks"),
        ({"dropout": 0.1}, "attention_dropout = 0.1"),
        ({"attention_mask": torch.ones(4, 4)}, "not an attention_mask"),
    ],
)
def test_attention_refuses_what_it_would_ignore(options, match):
    with pytest.raises(ValueError, match=match):
        call(**options)

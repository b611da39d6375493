"""Log-probs and entropies against float64 autograd; what the fused function keeps in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchrft.models.logit_form import PLAIN, LogitForm
from torchrft.models.logprobs import (
    Head,
    fused_linear_logprob,
    head_logprob,
    linear_logprob,
    logprob_and_entropy,
)
from torchrft.types import Kept

N, D, V = 10, 6, 17


def reference(hidden, weight, labels, temperature):
    """Straight from the definition, in the dtype of the inputs."""
    logits = hidden @ weight.t() / temperature
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return p[torch.arange(len(labels)), labels].log(), -(p * p.log()).sum(-1)


def make(rows=N, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    labels = torch.randint(V, (rows,), generator=generator)
    scales = torch.randn(2, rows, generator=generator)  # the loss weighs every output its own way
    return hidden, weight, labels, scales


def run(function, hidden, weight, scales):
    """Values, and gradients of a weighted sum of both outputs."""
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    logprobs, entropy = function(hidden, weight)
    (scales[0] * logprobs + scales[1] * entropy).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


def functions(labels, temperature):
    yield lambda h, w: linear_logprob(h, w, labels, temperature)
    for chunk in (1, 3, N, N + 7):
        yield lambda h, w, chunk=chunk: fused_linear_logprob(h, w, labels, temperature, chunk)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("index", range(5), ids=["plain", "chunk 1", "3", "N", ">N"])
def test_values_and_gradients(temperature, index):
    hidden, weight, labels, scales = make()
    wanted = run(
        lambda h, w: reference(h, w, labels, temperature),
        *(x.double() for x in (hidden, weight, scales)),
    )
    function = list(functions(labels, temperature))[index]
    got = run(function, hidden, weight, scales)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1], ids=["logprobs", "entropy"])
def test_each_output_has_its_gradient(which):
    """Only one output takes part in the loss."""
    hidden, weight, labels, scales = make()
    scales[1 - which] = 0
    wanted = run(
        lambda h, w: reference(h, w, labels, 0.8), *(x.double() for x in (hidden, weight, scales))
    )
    got = run(lambda h, w: fused_linear_logprob(h, w, labels, 0.8, 4), hidden, weight, scales)
    assert wanted[2].norm() > 0.1
    for a, b in zip(got[2:], wanted[2:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_by_hand():
    """Logits (0, ln 3): probabilities 1/4 and 3/4."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [3.0]]).log().clamp(min=0)
    for function in (linear_logprob, fused_linear_logprob):
        logprobs, entropy = function(hidden, weight, torch.tensor([0]))
        assert logprobs.item() == pytest.approx(-1.3862944, abs=1e-6)
        assert entropy.item() == pytest.approx(0.5623351, abs=1e-6)
    # At temperature 1/2 the odds are 1 to 9.
    logprobs, _ = fused_linear_logprob(hidden, weight, torch.tensor([1]), temperature=0.5)
    assert logprobs.item() == pytest.approx(-0.1053605, abs=1e-6)


def test_large_logits_do_not_overflow():
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    for function in (linear_logprob, fused_linear_logprob):
        logprobs, entropy = function(hidden, weight, torch.tensor([1]))
        assert logprobs.item() == -2000.0
        assert entropy.item() == 0.0


def test_logprob_and_entropy_take_scaled_logits():
    logits = torch.tensor([[0.0, 3.0]]).clamp(min=1).log()
    logprobs, entropy = logprob_and_entropy(logits, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(-0.2876821, abs=1e-6)
    assert entropy.item() == pytest.approx(0.5623351, abs=1e-6)


@pytest.mark.parametrize("index", range(5), ids=["plain", "chunk 1", "3", "N", ">N"])
def test_bfloat16_inputs(index):
    """Outputs are float32; the error is that of logits rounded to bfloat16 (8 bits)."""
    hidden, weight, labels, scales = make(dtype=torch.bfloat16)
    exact = [x.double() for x in (hidden, weight, scales)]
    wanted = run(lambda h, w: reference(h, w, labels, 0.7), *exact)
    got = run(list(functions(labels, 0.7))[index], hidden, weight, scales)
    assert [x.dtype for x in got] == [torch.float32] * 2 + [torch.bfloat16] * 2
    largest = (exact[0] @ exact[1].t() / 0.7).abs().max().item()
    assert (got[0].double() - wanted[0]).abs().max() < largest * 2**-7
    assert (got[1].double() - wanted[1]).abs().max() < largest * 2**-7
    for a, b in zip(got[2:], wanted[2:], strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_weight_gradient_is_summed_in_float32():
    """1000 equal rows, one a chunk: a bfloat16 sum would stand still at 256 times one row."""
    rows = 1000
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.long)
    fused_linear_logprob(hidden, weight, labels, chunk_size=1)[0].sum().backward()
    torch.testing.assert_close(weight.grad.float(), torch.tensor([[500.0], [-500.0]]))


def test_gradcheck():
    """By finite differences. The functions compute in float32 whatever they are given, so that the
    step is large and the tolerance loose; `test_values_and_gradients` is the sharper test."""
    hidden, weight, labels, _ = make(rows=4)
    inputs = tuple(x.double().requires_grad_() for x in (hidden, weight))
    for function in (
        lambda h, w: linear_logprob(h, w, labels[:4], 1.3),
        lambda h, w: fused_linear_logprob(h, w, labels[:4], 1.3, 3),
    ):
        assert function(*inputs)[0].dtype == torch.float32
        assert torch.autograd.gradcheck(function, inputs, eps=1e-2, atol=2e-3, rtol=1e-2)


def test_only_the_wanted_gradients():
    hidden, weight, labels, _ = make()
    hidden.requires_grad_()
    fused_linear_logprob(hidden, weight, labels)[0].sum().backward()
    assert weight.grad is None
    frozen = hidden.grad
    hidden.grad, hidden.requires_grad = None, False
    weight.requires_grad_()
    fused_linear_logprob(hidden, weight, labels)[0].sum().backward()
    assert hidden.grad is None
    assert frozen.norm() > 0.1
    assert weight.grad.norm() > 0.1


def test_gradients_are_constants_to_autograd():
    """The backward pass uses what the forward pass saved: second derivatives would be wrong."""
    hidden, weight, labels, _ = make()
    hidden.requires_grad_()
    logprobs, _ = fused_linear_logprob(hidden, weight, labels)
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    assert not grad.requires_grad


class Shapes(TorchDispatchMode):
    """Records the shape of everything any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += [tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


def logit_rows(function, rows=24, vocabulary=50):
    """The most rows of logits that any single tensor of forward and backward holds."""
    hidden = torch.randn(rows, 3, requires_grad=True)
    weight = torch.randn(vocabulary, 3, requires_grad=True)
    with Shapes() as shapes:
        logprobs, entropy = function(hidden, weight, torch.zeros(rows, dtype=torch.long))
        (logprobs + entropy).sum().backward()
    like_weight = {(vocabulary, 3), (3, vocabulary)}
    sizes = [
        torch.Size(shape).numel() // vocabulary
        for shape in shapes.seen
        if vocabulary in shape and shape not in like_weight
    ]
    assert not [shape for shape in shapes.seen if len(shape) == 1 and shape[0] > vocabulary]
    return max(sizes)


def test_chunk_size_bounds_the_logits():
    for chunk in (1, 5, 24):
        assert logit_rows(lambda *a, c=chunk: fused_linear_logprob(*a, chunk_size=c)) == chunk
    assert logit_rows(lambda *a: fused_linear_logprob(*a, chunk_size=100)) == 24
    assert logit_rows(linear_logprob) == 24  # the measure sees whole logits


def test_no_rows():
    hidden, weight, labels, _ = make(rows=0)
    hidden.requires_grad_()
    weight.requires_grad_()
    for function in (linear_logprob, fused_linear_logprob):
        logprobs, entropy = function(hidden, weight, labels)
        assert logprobs.shape == entropy.shape == (0,)
        (logprobs + entropy).sum().backward()
        assert not weight.grad.any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden": torch.zeros(4, 5)}, r"hidden \(4, 5\) and weight \(7, 3\)"),
        ({"hidden": torch.zeros(2, 2, 3)}, r"hidden \(2, 2, 3\)"),
        ({"weight": torch.zeros(3)}, r"weight \(3,\)"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels \(5,\) must be \[4\]"),
        ({"labels": torch.zeros(4, 1, dtype=torch.long)}, r"labels \(4, 1\)"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"chunk_size": 0}, "chunk_size 0"),
    ],
)
def test_errors(change, match):
    arguments = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(7, 3),
        "labels": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=match):
        fused_linear_logprob(**{**arguments, **change})


def kept_tokens(labels, seed=1):
    """Random sets of 1 to V tokens, each with its label."""
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for row, label in enumerate(labels.tolist()):
        size = (1, 2, V)[row] if row < 3 else int(torch.randint(1, V, (), generator=generator))
        drawn = torch.randperm(V, generator=generator)[: size - 1].tolist()
        sets.append(sorted({label, *drawn}))
    ids = torch.tensor([token for row in sets for token in row], dtype=torch.int32)
    return Kept(ids, torch.tensor([len(row) for row in sets])), sets


def truncated_reference(hidden, weight, labels, sets, temperature):
    """Row by row, over the kept tokens alone."""
    logprobs, entropies = [], []
    for row, tokens in enumerate(sets):
        z = hidden[row] @ weight[tokens].t() / temperature
        p = z.exp() / z.exp().sum()
        logprobs.append(p[tokens.index(int(labels[row]))].log())
        entropies.append(-(p * p.log()).sum())
    return torch.stack(logprobs), torch.stack(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunk", [1, 3, N, N + 7])
def test_over_the_kept_tokens(chunk, temperature):
    hidden, weight, labels, scales = make()
    kept, sets = kept_tokens(labels)
    assert len({len(tokens) for tokens in sets}) > 3
    wanted = run(
        lambda h, w: truncated_reference(h, w, labels, sets, temperature),
        *(x.double() for x in (hidden, weight, scales)),
    )
    head = Head(temperature, chunk, kept=kept)
    got = run(lambda h, w: head_logprob(h, w, labels, head), hidden, weight, scales)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_all_tokens_kept_is_the_whole_vocabulary():
    hidden, weight, labels, scales = make()
    kept = Kept(torch.arange(V, dtype=torch.int32).repeat(N), torch.full((N,), V))
    functions = (
        lambda h, w: head_logprob(h, w, labels, Head(0.8, 3, kept=kept)),
        lambda h, w: fused_linear_logprob(h, w, labels, 0.8, 3),
    )
    for a, b in zip(*(run(f, hidden, weight, scales) for f in functions), strict=True):
        assert torch.equal(a, b)


def test_the_gradient_of_the_truncated_policy_is_unbiased():
    """REINFORCE over a nucleus: the mean of reward x d log p over draws is the gradient of the
    expected reward of the policy that draws. With whole log-probs it is not."""
    hidden, weight, _, _ = make(rows=1, seed=3)
    tokens = [2, 5, 11]
    rewards = torch.linspace(-1, 2, V, dtype=torch.float64)
    exact = hidden.double().requires_grad_()
    p = (exact[0] @ weight[tokens].double().t()).softmax(-1)
    (p * rewards[tokens]).sum().backward()
    kept = Kept(torch.tensor(tokens, dtype=torch.int32), torch.tensor([3]))
    gradients = []
    for sets in (kept, None):
        ours = hidden.clone().requires_grad_()
        total = 0
        for token, chance in zip(tokens, p.detach().float(), strict=True):
            logprob, _ = head_logprob(ours, weight, torch.tensor([token]), Head(kept=sets))
            total = total + chance * float(rewards[token]) * logprob.sum()
        total.backward()
        gradients.append(ours.grad.double())
    torch.testing.assert_close(gradients[0], exact.grad, rtol=1e-5, atol=1e-6)
    assert (gradients[1] - exact.grad).norm() > 0.1 * exact.grad.norm()


@pytest.mark.parametrize("chunk", [3, N])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_fp32_logits_of_bfloat16_factors(chunk, scale):
    """Exact to float32; rounded to bfloat16 they are wrong in the third digit."""
    hidden, weight, labels, scales = make(dtype=torch.bfloat16)
    hidden = hidden * scale
    exact = [x.double() for x in (hidden, weight, scales)]
    wanted = run(lambda h, w: reference(h, w, labels, 0.7), *exact)
    head = Head(0.7, chunk, fp32=True)
    got = run(lambda h, w: head_logprob(h, w, labels, head), hidden, weight, scales)
    assert [x.dtype for x in got] == [torch.float32] * 2 + [torch.bfloat16] * 2
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-6, atol=1e-6 * scale)
    # A difference of two large numbers, where the logits are large.
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-6, atol=3e-5 * scale)
    for a, b in zip(got[2:], wanted[2:], strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()
    rounded, _ = fused_linear_logprob(hidden, weight, labels, 0.7, chunk)
    assert (rounded.double() - wanted[0]).abs().max() > 1e-3 * scale


FORMS = {"scaled": LogitForm(0.25), "capped": LogitForm(1.0, 2.0), "both": LogitForm(3.0, 5.0)}


@pytest.mark.parametrize("keeps", [False, True], ids=["all tokens", "kept tokens"])
@pytest.mark.parametrize("chunk", [None, 1, 3, N + 7], ids=["plain", "1", "3", ">N"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_scaled_and_capped_logits(form, chunk, keeps):
    hidden, weight, labels, scales = make()
    kept, sets = kept_tokens(labels) if keeps else (None, [list(range(V))] * N)

    def wanted(h, w):
        logits = form.scale * (h @ w.t())
        if form.cap is not None:
            logits = form.cap * (logits / form.cap).tanh()
        return truncated_reference(logits, torch.eye(V).double(), labels, sets, 0.8)

    def got(h, w):
        if chunk is None and not keeps:
            return linear_logprob(h, w, labels, 0.8, form=form)
        return head_logprob(h, w, labels, Head(0.8, chunk or N, kept=kept, form=form))

    reference = run(wanted, *(x.double() for x in (hidden, weight, scales)))
    for a, b in zip(run(got, hidden, weight, scales), reference, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [PLAIN, *FORMS.values()])
def test_a_form_is_measured_from_what_it_makes(form):
    logits = torch.linspace(-50, 50, 3 * 56).view(1, 3, 56)
    found = LogitForm.measured(logits, form(logits), form.cap)
    assert found == LogitForm(pytest.approx(form.scale, rel=1e-6), form.cap)


@pytest.mark.parametrize("change", [torch.square, lambda x: x + 1, torch.tanh])
def test_what_is_no_form_is_not_measured(change):
    logits = torch.linspace(-50, 50, 3 * 56).view(1, 3, 56)
    for cap in None, 30.0:
        assert LogitForm.measured(logits, change(logits), cap) is None

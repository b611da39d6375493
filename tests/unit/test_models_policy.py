"""The policy's log-probs and gradients against transformers' own logits, sequence by sequence."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from torchrft.learn.packing import build
from torchrft.models.policy import PolicyModel
from torchrft.types import Kept

GROUPS = [(3, [4, 1, 7]), (6, [2]), (1, [1, 5])]
FAMILIES = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "mistral, window 4": ("mistral", {}),
    "gemma": ("gemma", {}),
    "gemma3, window 4": ("gemma3_text", {}),
}


def reference(model, batch, temperature):
    """Log-probs and entropies of all response tokens, from the model's own full logits."""
    logprobs, entropies = [], []
    for row, sequence in enumerate(batch.sequences):
        prompt = int(batch.prompt_lens[row])
        logits = model(sequence[None]).logits[0, prompt - 1 : -1].float() / temperature
        log_p = logits.log_softmax(-1)
        logprobs.append(log_p.gather(1, sequence[prompt:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def models(family, options):
    """Equal weights behind torchrft's attention and behind transformers' own plain one."""
    ours, theirs = (tiny.model(family, name, **options) for name in ("torchrft", "eager"))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(batch, packed, rows=None):
    rows = list(range(len(batch))) if rows is None else rows
    return build(batch, rows, packed)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_transformers(family, packed):
    ours, theirs = models(*FAMILIES[family])
    batch = tiny.batch(GROUPS)
    assert max(len(s) for s in batch.sequences) > 4  # longer than the windows
    with torch.no_grad():
        got = PolicyModel(ours, temperature=0.7)(inputs(batch, packed))
        wanted = reference(theirs, batch, 0.7)
    assert wanted[0].std() > 0.3
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", ["qwen2 tied", "llama", "mistral, window 4"])
def test_gradients_are_those_of_transformers(family, packed):
    ours, theirs = models(*FAMILIES[family])
    batch = tiny.batch(GROUPS)
    weights = torch.randn(int(batch.mask.sum()), generator=torch.Generator().manual_seed(1))
    logprobs, entropy = PolicyModel(ours, temperature=0.7)(inputs(batch, packed))
    (weights * (logprobs + 0.3 * entropy)).sum().backward()
    logprobs, entropy = reference(theirs, batch, 0.7)
    (weights * (logprobs + 0.3 * entropy)).sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = wanted[name].grad.abs().max().item()
        assert scale > 1e-3, name
        torch.testing.assert_close(
            parameter.grad, wanted[name].grad, rtol=0, atol=3e-5 * scale, msg=name
        )


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_fused_log_probs_are_the_same(packed, monkeypatch):
    from torchrft.models import policy

    chunks = []
    fused_linear_logprob = policy.fused_linear_logprob

    def spy(*args):
        chunks.append(args[4])
        return fused_linear_logprob(*args)

    monkeypatch.setattr(policy, "fused_linear_logprob", spy)
    batch = tiny.batch(GROUPS)
    results = []
    for fused in (False, True):
        model = tiny.model("qwen2", tie_word_embeddings=True)
        outputs = PolicyModel(model, 0.7, fused=fused, chunk_size=3)(inputs(batch, packed))
        assert chunks == [3] * fused
        (outputs[0] - 0.2 * outputs[1]).sum().backward()
        results.append([*outputs, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_only_the_targets_get_logits():
    """The head sees one row per response token."""
    model = tiny.model("qwen2")
    batch = tiny.batch([(30, [2, 3])])
    seen = []
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits of every position"))
    model.get_decoder().register_forward_hook(lambda m, i, out: seen.append(out[0].shape))
    logprobs, entropy = PolicyModel(model)(inputs(batch, packed=True))
    assert seen == [(1, 33, 32)]
    assert logprobs.shape == entropy.shape == (5,)


def test_head_with_a_bias_is_refused():
    model = tiny.model("qwen2")
    model.lm_head = nn.Linear(32, tiny.VOCABULARY, bias=True)
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM needs .* head without bias"):
        PolicyModel(model)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 1.0, "attn_logit_softcapping": 0.5}),
        ("gemma3_text", {"final_logit_softcapping": 2.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
    ],
)
def test_scaled_and_capped_logits_are_transformers_own(family, options, fused):
    model, plain = (tiny.model(family, name, **options) for name in ("torchrft", "eager"))
    plain.load_state_dict(model.state_dict())
    batch = tiny.batch([(3, [4, 1]), (6, [2])])
    got = PolicyModel(model, fused=fused, chunk_size=2)(inputs(batch, packed=True))[0]
    got.sum().backward()
    wanted = []
    for prompt, ids in zip(batch.prompt_lens.tolist(), batch.sequences, strict=True):
        log_p = plain(input_ids=ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        wanted.append(log_p.gather(1, ids[prompt:, None])[:, 0])
    torch.testing.assert_close(got, torch.cat(wanted), rtol=0, atol=1e-5)
    torch.cat(wanted).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_attention_dropout_is_refused_while_training():
    model = tiny.model("qwen2", attention_dropout=0.1)
    batch = inputs(tiny.batch([(2, [2])]), packed=True)
    PolicyModel(model)(batch)
    with pytest.raises(ValueError, match=r"Qwen2Attention uses attention_dropout = 0\.1"):
        PolicyModel(model.train())(batch)


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("mamba", "MambaForCausalLM has 0 of 2 layers with attention, which"),
        ("minimax", "MiniMaxForCausalLM mixes tokens in MiniMaxLightningAttention and"),
        ("bloom", "BloomForCausalLM uses attention code of its own, which"),
        ("stablelm", "StableLmForCausalLM uses attention code of its own, which"),
    ],
)
def test_layers_that_would_leak_across_sequences_are_refused(family, match):
    """Packed rows would run through these models without an error, and give other numbers."""
    options = {"num_local_experts": 2} if family == "minimax" else {}
    with pytest.raises(ValueError, match=match):
        PolicyModel(tiny.model(family, **options))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_kept_tokens_stay_with_their_samples(packed, fused):
    """Samples in another order than the batch's: each is over its own kept tokens."""
    ours, theirs = models("qwen2", {})
    batch = tiny.batch(GROUPS)
    generator, kept = torch.Generator().manual_seed(0), []
    for row, sequence in enumerate(batch.sequences):
        sets = [
            sorted({int(label), *torch.randint(56, (9,), generator=generator).tolist()})
            for label in sequence[int(batch.prompt_lens[row]) :]
        ]
        ids = torch.tensor([token for tokens in sets for token in tokens], dtype=torch.int32)
        kept.append(Kept(ids, torch.tensor([len(tokens) for tokens in sets])))
    batch, rows = replace(batch, kept=tuple(kept)), [4, 0, 5, 2]
    micro = inputs(batch, packed, rows)
    with torch.no_grad():
        got = PolicyModel(ours, temperature=0.7, fused=fused, chunk_size=4)(micro)
        wanted = []
        for row in rows:
            prompt = int(batch.prompt_lens[row])
            logits = theirs(batch.sequences[row][None]).logits[0, prompt - 1 : -1] / 0.7
            left_out = ~kept[row].mask(56)
            log_p = logits.masked_fill(left_out, -torch.inf).double().log_softmax(-1)
            wanted.append(log_p.gather(1, batch.sequences[row][prompt:, None])[:, 0])
    torch.testing.assert_close(got[0].double(), torch.cat(wanted), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fp32_head(tied):
    """The trainer's log-probs and the engine's are float32 products of the same bfloat16 states."""
    made = tiny.model("qwen2", tie_word_embeddings=tied).bfloat16()
    policy = PolicyModel(made, temperature=0.7, fp32_head=True)
    batch = tiny.batch(GROUPS)
    seen = {}
    made.model.register_forward_hook(lambda m, args, out: seen.update(hidden=out[0]))
    micro = inputs(batch, False)
    with torch.no_grad():
        got, entropy = policy(micro)
    hidden = seen["hidden"].flatten(0, 1)[micro.targets].double()
    log_p = (hidden @ made.lm_head.weight.double().t() / 0.7).log_softmax(-1)
    wanted = log_p.gather(1, micro.labels[:, None])[:, 0]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(
        entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-6, atol=2e-6
    )

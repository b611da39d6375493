"""Hybrids: packed rows, checkpointing and the native engine's states are transformers' own."""

import families
import pytest
import tiny
import torch
from tiny_job import tiny_config

from torchrft.build.models import check_models
from torchrft.config.job_config import Parallel
from torchrft.learn.packing import build
from torchrft.models.attention import Packed
from torchrft.models.heads import ValueModel
from torchrft.models.mixers import Mixer
from torchrft.models.policy import PolicyModel
from torchrft.parallel import ParallelDims, parallelize
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

GROUPS = [(3, [4, 1, 7]), (6, [2])]
HYBRIDS = ["qwen3_5_text", "lfm2", "falcon_h1", "kimi_linear"]
PROMPTS = [(7, 8, 9), (20,), (4, 5, 6), (30, 2, 40, 41, 9, 10, 22)]


def running_sum(hidden_states, cache_params=None, **options):
    """A mixer that everything before a token reaches."""
    assert options == {}
    assert cache_params is None
    return hidden_states.cumsum(1)


def test_a_packed_row_is_mixed_sequence_by_sequence():
    layout = Packed.tree([(-1, 2), (0, 1), (1, 2), (0, 1), (-1, 3)])
    row = torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128, 256]).view(1, -1, 1)
    out = layout.mix(Mixer(running_sum, 0, "cache_params"), row, {})
    assert out.flatten().tolist() == [1, 3, 7, 15, 31, 35, 64, 192, 448]


@pytest.mark.parametrize("checkpointing", [None, "full", "selective"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_log_probs_and_gradients(family, packed, checkpointing):
    theirs, ours = families.model(family), families.model(family, "torchrft")
    wanted = []
    samples = tiny.batch(GROUPS)
    for prompt, ids in zip(samples.prompt_lens.tolist(), samples.sequences, strict=True):
        log_p = theirs(input_ids=ids[None], use_cache=False).logits[0, prompt - 1 : -1]
        wanted.append(log_p.log_softmax(-1).gather(1, ids[prompt:, None])[:, 0])
    torch.cat(wanted).sum().backward()
    policy = PolicyModel(ours)
    parallelize(policy, ParallelDims(), Parallel(), gradient_checkpointing=checkpointing)
    logprobs, _ = policy(build(samples, list(range(len(samples))), packed))
    logprobs.sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    torch.testing.assert_close(logprobs, torch.cat(wanted).detach(), rtol=0, atol=2e-5)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None and (size := parameter.grad.abs().max()) > 1e-6:
            assert (gradients[name] - parameter.grad).abs().max() < 1e-4 * size, name


@pytest.mark.parametrize("slots", [2, 64])
@pytest.mark.parametrize("family", HYBRIDS)
def test_greedy_tokens_of_the_native_engine(family, slots):
    """With few slots sequences move, and later prompts take used ones."""
    model = families.model(family)
    engine = NativeEngine(model.config, families.tokenizer(), (1,), slots)
    engine.update_weights(named_full_tensors(model), version=0)
    prompts = [Prompt(row=i, text="", token_ids=ids) for i, ids in enumerate(PROMPTS)]
    got = engine.generate(prompts, SamplingParams(n=2, temperature=0.0, max_new_tokens=16))
    for completion in got:
        ids = torch.tensor([PROMPTS[completion.prompt_index]])
        options = {"do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
        wanted = model.generate(ids, max_new_tokens=16, **options)[0, ids.shape[1] :]
        assert list(completion.token_ids) == wanted.tolist()


def test_states_of_samples_are_their_own():
    """Samples of one prompt go different ways from the state that it left."""
    model = families.model("qwen3_5_text")
    engine = NativeEngine(model.config, families.tokenizer(), (1,))
    engine.update_weights(named_full_tensors(model), version=0)
    prompts = [Prompt(row=0, text="", token_ids=PROMPTS[0])]
    sampling = SamplingParams(n=6, temperature=1.5, max_new_tokens=12, seeds=(tuple(range(6)),))
    got = engine.generate(prompts, sampling)
    assert len({completion.token_ids for completion in got}) > 3
    for completion in got:
        ids = torch.tensor([[*PROMPTS[0], *completion.token_ids]])
        with torch.no_grad():
            log_p = (model(ids, use_cache=False).logits[0, 2:-1] / 1.5).log_softmax(-1)
        wanted = log_p.gather(1, ids[0, 3:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, rtol=0, atol=5e-5)


def test_values_of_a_critic_are_those_of_each_sample_alone():
    critic = ValueModel(families.model("qwen3_5_text", "torchrft"))
    torch.manual_seed(0)
    torch.nn.init.normal_(critic.head.weight, std=0.1)  # values of about 1
    samples = tiny.batch(GROUPS)
    rows = list(range(len(samples)))
    with torch.no_grad():
        together = critic(build(samples, rows, True))
        alone = torch.cat([critic(build(samples, [row], False)) for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("mamba", "MambaForCausalLM has 0 of 2 layers with attention"),
        ("jamba", "JambaForCausalLM does not pass `layout` on to JambaMambaMixer"),
        ("minimax", "mixes tokens in MiniMaxLightningAttention and returns more than they are"),
        ("zamba2", "Zamba2ForCausalLM shares weights among its layers"),
        ("zaya", "ZayaForCausalLM does not pass `layout` on to ZayaCCAProjection"),
        ("mamba2", 'Mamba2ForCausalLM has no attention for a KV cache (engine_type = "vllm"'),
    ],
)
def test_mixers_that_do_not_fit_are_refused(family, match):
    sentence = families.refusal(family)
    assert match in sentence
    assert sentence.endswith("; use a model of another family")


@pytest.mark.parametrize("split", ["tp_size", "sp_size"])
def test_hybrids_are_not_split(split, tmp_path):
    families.config("qwen3_5_text").save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    config = tiny_config(pretrain=str(tmp_path))
    check_models(config)
    parallel = config.parallel.model_copy(update={split: 2})
    with pytest.raises(ValueError, match=r"has linear_attention layers, .* use tp_size = 1 and sp"):
        check_models(config.model_copy(update={"parallel": parallel}))
    model = PolicyModel(families.model("lfm2", "torchrft"))
    dims = ParallelDims(**{split.removesuffix("_size"): 2})
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM has conv layers, whose states run"):
        parallelize(model, dims, Parallel())

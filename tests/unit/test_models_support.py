"""Which models are refused, by what, and how early; the rest of the families: test_families.py."""

import copy
import json

import families
import pytest
import tiny
import tiny_classifiers
import torch
from tiny_job import MODEL, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from torchrft.build.models import check_models
from torchrft.learn.packing import build
from torchrft.models.heads import ValueModel
from torchrft.models.loader import load_config, load_model, load_tokenizer
from torchrft.models.policy import PolicyModel
from torchrft.models.reward_model import RewardModel, reward_config
from torchrft.models.sharded import ShardedWeights
from torchrft.models.support import refuse_unsupported
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, RolloutBatch, SamplingParams

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.1, 2.0, 8.0, 30.0],
    "original_max_position_embeddings": 8,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
SHORT = {  # families whose sequences have at most 8 tokens
    "longrope": ("phi3", {"original_max_position_embeddings": 8, "rope_parameters": LONGROPE}),
    "dynamic": ("llama", {"max_position_embeddings": 8, "rope_parameters": DYNAMIC}),
    "dynamic qwen3": ("qwen3", {"max_position_embeddings": 8, "rope_parameters": DYNAMIC}),
    "one kind of layer": (
        "olmo3",
        {
            "max_position_embeddings": 8,
            "rope_parameters": {
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "table gpt2": ("gpt2", {"max_position_embeddings": 8}),
    "table opt": ("opt", {"max_position_embeddings": 8, "word_embed_proj_dim": 32}),
    "table gpt_bigcode": ("gpt_bigcode", {"max_position_embeddings": 8}),
}


def samples(*lengths, prompt=3):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, tiny.VOCABULARY, (n,), generator=generator) for n in lengths]
    counts = torch.tensor([n - prompt for n in lengths])
    mask = torch.arange(int(counts.max())) < counts[:, None]
    zeros = torch.zeros(mask.shape)
    prompts = torch.tensor([prompt] * len(rows))
    group = torch.arange(len(rows))
    return RolloutBatch(tuple(rows), prompts, mask, torch.zeros(len(rows)), group, zeros)


def forward(policy, batch, packed):
    inputs = build(batch, list(range(len(batch))), packed)
    with torch.no_grad():
        return policy(inputs)


def alone(model, ids, start):
    with torch.no_grad():
        log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return log_p[start - 1 : -1].gather(1, ids[start:, None])[:, 0]


def folder_of(path, family, **options):
    """A folder without weights."""
    tiny.config(family, **options).save_pretrained(path)
    tiny_classifiers.tokenizer(path)
    return str(path)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("case", SHORT)
def test_sequences_up_to_the_limit_are_transformers_own_and_longer_ones_are_refused(case, packed):
    family, options = SHORT[case]
    model, plain = (tiny.model(family, name, **options) for name in ("torchrft", "eager"))
    plain.load_state_dict(model.state_dict())
    policy, critic = PolicyModel(model), ValueModel(tiny.model(family, **options))
    short = samples(8, 5, 7, 8)
    wanted = torch.cat([alone(plain, ids, 3) for ids in short.sequences])
    torch.testing.assert_close(forward(policy, short, packed)[0], wanted, rtol=0, atol=1e-5)
    for wrapped in (policy, critic):
        with pytest.raises(ValueError, match=r"of 23 tokens is more than the 8 .* max_len = 8 or"):
            forward(wrapped, samples(7, 24), packed)


@pytest.mark.parametrize("case", SHORT)
def test_the_native_engine_and_max_len_know_the_limit(case):
    family, options = SHORT[case]
    config = tiny.config(family, **options)
    plain = tiny.model(family, "eager", **options)
    engine = NativeEngine(config, load_tokenizer(MODEL), (1,))
    engine.update_weights(named_full_tensors(plain), version=0)
    prompts = [Prompt(0, "", (7, 8, 9)), Prompt(1, "", (5,))]
    for completion in engine.generate(prompts, SamplingParams(n=1, max_new_tokens=5)):
        prompt = prompts[completion.prompt_index].token_ids
        wanted = alone(plain, torch.tensor([*prompt, *completion.token_ids]), len(prompt))
        got = torch.tensor(completion.logprobs)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="of 9 tokens is more than the 8 that"):
        engine.generate(prompts, SamplingParams(n=1, max_new_tokens=6))
    assert refuse_unsupported(config, max_len=8) == 8
    with pytest.raises(ValueError, match=r"^max_len = 9 tokens is more than the 8 that"):
        refuse_unsupported(config, max_len=9)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [({"rope_type": "yarn", "factor": 4.0}, None), ({"rope_type": "linear", "factor": 2.0}, None)],
)
def test_other_scalings_have_no_limit(rope, limit):
    options = {"rope_parameters": {"rope_theta": 1e4, **rope}, "max_position_embeddings": 64}
    assert refuse_unsupported(tiny.config("llama", **options), max_len=4096) == limit


@pytest.mark.parametrize(
    ("family", "options", "match"),
    [
        ("nemotron", {}, "NemotronForCausalLM does not pass `layout` on to NemotronAttention"),
        ("phimoe", {"sliding_window": 4, "lm_head_bias": False}, "a mask in PhimoeAttention other"),
        ("phimoe", {"sliding_window": 511, "lm_head_bias": False}, "mask in PhimoeAttention other"),
        (
            "qwen2_moe",
            {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 4},
            "a mask in Qwen2MoeAttention other than the causal one",
        ),
        ("gptj", {"rotary_dim": 4}, "GPTJForCausalLM uses attention code of its own"),
        ("falcon", {}, "FalconForCausalLM uses attention code of its own"),
        ("git", {}, "GitForCausalLM uses attention code of its own"),
        ("llama4_text", {}, "Llama4ForCausalLM uses chunked_attention"),
        ("phi", {}, "PhiForCausalLM needs a language-model head without bias"),
        ("t5", {}, "a t5 model is no causal language model: take another"),
    ],
)
def test_refused_before_there_are_weights(family, options, match, tmp_path):
    if family in ("falcon", "t5", "git"):
        AutoConfig.for_model(family).save_pretrained(tmp_path)
    else:
        folder_of(tmp_path, family, **options)
    for use in (
        lambda: load_model(str(tmp_path)),
        lambda: load_model(str(tmp_path), "random"),
        lambda: NativeEngine(load_config(str(tmp_path)), load_tokenizer(MODEL), (1,)),
        lambda: check_models(tiny_config(pretrain=str(tmp_path))),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            use()
        assert str(caught.value).endswith(("use a model of another family", "take another"))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("phimoe", {"sliding_window": None, "lm_head_bias": False}),
        (
            "phimoe",
            {"sliding_window": 512, "lm_head_bias": False},
        ),  # all it reads
        ("qwen2_moe", {"use_sliding_window": False}),
        ("granite", {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 1.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("minicpm3", {}),
        ("nanochat", {"final_logit_softcapping": 15.0}),
    ],
)
def test_options_without_effect_are_not_refused(family, options):
    assert refuse_unsupported(tiny.config(family, **options), cache=True) is None


def test_the_head_does_not_matter_to_a_critic():
    """Nor its bias, nor what follows it."""
    ValueModel(tiny.model("phi"))
    with pytest.raises(ValueError, match="PhiForCausalLM needs a language-model head without bias"):
        PolicyModel(tiny.model("phi"))
    with pytest.raises(ValueError, match="does not pass `layout` on to NemotronAttention"):
        ValueModel(tiny.model("nemotron"))


def test_shards_are_refused_by_a_sentence_too(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny.config("gptj", rotary_dim=4, head_dim=8))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPTJForCausalLM uses attention code of its own"):
        ShardedWeights.of(str(tmp_path)).model(torch.float32)


def test_weights_for_another_engine_may_be_of_any_family(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny.config("gptj", rotary_dim=4))
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), use="engine").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_every_model_of_a_job_is_tried_at_the_start(tmp_path):
    nemotron = folder_of(tmp_path / "nemotron", "nemotron")
    gpt2 = folder_of(tmp_path / "gpt2", "gpt2")
    phi = folder_of(tmp_path / "phi", "phi")
    check_models(tiny_config(pretrain=gpt2, max_len="512"))
    with pytest.raises(ValueError, match=r"max_len = 513 tokens is more than the 512 that GPT2"):
        check_models(tiny_config(pretrain=gpt2, max_len="513"))
    with pytest.raises(ValueError, match="Nemotron"):
        check_models(tiny_config(ref_pretrain=nemotron, init_kl_coef="0.1"))
    with pytest.raises(ValueError, match="a language-model head without bias"):
        check_models(tiny_config(ref_pretrain=phi, init_kl_coef="0.1"))
    critic = {"advantage_estimator": "gae"}
    check_models(tiny_config(critic_pretrain=phi, **critic))
    with pytest.raises(ValueError, match="Nemotron"):
        check_models(tiny_config(critic_pretrain=nemotron, **critic))


def test_all_models_of_a_job_read_the_same_token_ids(tmp_path):
    """A reference or a critic for which an id is another token, or none."""
    options = {
        "ref_pretrain": ("init_kl_coef", 0.1),
        "critic_pretrain": ("advantage_estimator", "gae"),
    }
    policy = folder_of(tmp_path / "policy", "qwen2")
    more = folder_of(tmp_path / "more", "qwen3", vocab_size=tiny.VOCABULARY + 8)
    fewer = folder_of(tmp_path / "fewer", "qwen3", vocab_size=tiny.VOCABULARY - 8)
    other = folder_of(tmp_path / "other", "qwen3")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    path.write_text(json.dumps(content))
    for name, (needed, value) in options.items():
        check_models(tiny_config(pretrain=policy, **{name: more, needed: value}))
        for folder, fault in (fewer, r"48 tokens; use"), (other, "some with another id; use"):
            with pytest.raises(ValueError, match=f'"{folder}" reads other token ids .*{fault}'):
                check_models(tiny_config(pretrain=policy, **{name: folder, needed: value}))


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes", "unknown"])
def test_quantized_weights_are_refused(tmp_path, method):
    """On several ranks they would be read as if they were not."""
    folder = folder_of(tmp_path / "model", "qwen2")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(content))
    for load in (load_config, load_model, reward_config):
        with pytest.raises(ValueError, match=r'model" has quantized weights .* in bfloat16'):
            load(folder)


def test_a_reward_model_that_drops_the_layout_is_not_packed(tmp_path):
    folder = tiny_classifiers.save(tmp_path, "nemotron")
    from transformers import AutoModelForSequenceClassification as Auto

    model = RewardModel(Auto.from_pretrained(folder, dtype=torch.float32).eval())
    rows = [[7, 8, 9, 10], [7, 8, 30], [20, 5, 6, 41, 42, 3]]
    assert not model.packs
    with torch.no_grad():
        got = model([rows[:2], rows[2:]]).tolist()
    assert got == pytest.approx(tiny_classifiers.reference(folder, rows), abs=1e-5)


def test_trying_a_model_changes_nothing():
    config = tiny.config("qwen3_moe")
    config._attn_implementation = "eager"
    before, state = copy.deepcopy(config.to_dict()), torch.get_rng_state()
    refuse_unsupported(config)
    assert config.to_dict() == before
    assert config._attn_implementation == "eager"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_family_of_this_version_is_in_the_walk():
    assert {"gptj", "falcon", "nemotron", "gemma4_text", "deepseek_v3"} <= {*families.names()}

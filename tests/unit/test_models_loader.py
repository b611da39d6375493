"""Weights, configs, tokenizers and stop tokens from a folder."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from torchrft.models import attention
from torchrft.models.loader import (
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    stop_token_ids,
)
from torchrft.models.reward_model import reward_config

DEBUG_MODEL = str(Path(__file__).parents[1] / "assets" / "debug_model")


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tmp_path):
    """A folder with the weights of a tiny model, and the model."""
    model = tiny.model("qwen2", seed=5)
    model.save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved"), model


def edit(folder, file, **values):
    path = Path(folder, file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_random_weights_depend_on_the_seed_only():
    torch.manual_seed(0)
    first = load_model(DEBUG_MODEL, "random", seed=3)
    torch.manual_seed(1)
    torch.rand(7)
    assert same(load_model(DEBUG_MODEL, "random", seed=3), first)
    assert not same(load_model(DEBUG_MODEL, "random", seed=4), first)
    weight = first.model.layers[0].mlp.up_proj.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)  # initializer_range


@pytest.mark.parametrize(
    "make",
    [
        lambda: load_model(DEBUG_MODEL, "random"),
        lambda: empty_model(load_config(DEBUG_MODEL), torch.float32),
    ],
)
def test_the_global_generator_is_not_disturbed(make):
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    make()
    assert torch.equal(torch.rand(3), wanted)


def test_pretrained_weights_are_loaded(saved):
    folder, model = saved
    assert same(load_model(folder), model)
    assert same(load_model(folder, seed=9), model)
    loaded = load_model(folder, dtype=torch.bfloat16)
    assert same(loaded, model.to(torch.bfloat16))
    assert not same(load_model(folder, "random"), tiny.model("qwen2", seed=5))


def test_tied_weights_stay_tied(tmp_path):
    model = tiny.model("qwen2", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    for made in (load_model(str(tmp_path)), load_model(str(tmp_path), "random")):
        assert made.lm_head.weight is made.model.embed_tokens.weight
    assert same(load_model(str(tmp_path)), model)


@pytest.mark.parametrize("init", ["random", "pretrained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_attention(saved, init, dtype):
    model = load_model(saved[0], init, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config._attn_implementation == attention.NAME


def test_other_configs_are_not_touched(saved):
    """transformers writes the attention's name into the config object that it is given."""
    theirs = AutoModelForCausalLM.from_pretrained(saved[0], attn_implementation="eager")
    config = theirs.config
    ours = empty_model(config, torch.float32)
    assert config._attn_implementation == "eager"
    assert ours.config is not config
    assert ours.config._attn_implementation == attention.NAME
    ids = torch.tensor([[5, 6, 7]])
    theirs(ids, attention_mask=torch.ones_like(ids))  # still takes a mask

    shared = load_config(saved[0])
    shared._attn_implementation = "sdpa"
    empty_model(shared, torch.float32)
    assert shared._attn_implementation == "sdpa"
    assert load_config(saved[0])._attn_implementation == attention.NAME


def test_folder_without_weights():
    with pytest.raises(ValueError, match=r'debug_model" holds no weights .* init = "random"'):
        load_model(DEBUG_MODEL)


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_folder_without_a_config(tmp_path, init):
    with pytest.raises(ValueError, match=r'" holds no config.json that transformers can read'):
        load_model(str(tmp_path), init)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("null", "argument of type 'NoneType'"),
        ('{"model_type": "llama", "hidden_size": "abc"}', "Field 'hidden_size' expected int"),
        ('{"model_type": "qwen2", "num_hidden_layers": -1}', "`num_hidden_layers` \\(-1\\)"),
        ('{"model_type": "phi3", "rope_scaling": {"type": "su"}}', "Missing required keys"),
    ],
)
def test_a_config_that_does_not_read(tmp_path, config, reason):
    """Whatever transformers raises."""
    (tmp_path / "config.json").write_text(config)
    for load in (load_config, load_model, reward_config):
        with pytest.raises(ValueError, match=f"holds no config.json that .* can read .*{reason}"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "holds no generation_config.json that transformers can read"),
        ("[]", "holds no generation_config.json that transformers can read"),
        ('{"eos_token_id": "x"}', "eos_token_id = 'x': it must be token ids"),
    ],
)
def test_a_generation_config_that_does_not_read(tmp_path, text, match):
    """Its end-of-sequence ids would be lost."""
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        stop_token_ids(load_config(DEBUG_MODEL), str(tmp_path), 1)


def test_no_folder_at_all(tmp_path):
    missing = str(tmp_path / "missing")
    match = r'missing" is no folder here: correct the path'
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(ValueError, match=match):
            load(missing)


def test_missing_keys(saved):
    """A layer more than the files have: transformers alone would fill it with random weights."""
    edit(saved[0], "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(ValueError, match=r"lacks weights of the model: model\.layers\.2\."):
        load_model(saved[0])


def test_other_shapes(saved):
    edit(saved[0], "config.json", intermediate_size=40)
    with pytest.raises(ValueError, match=r'the weights of pretrain = ".*saved" do not load'):
        load_model(saved[0])


def test_damaged_file(saved):
    path = Path(saved[0], "model.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r'the weights of pretrain = ".*saved" do not load'):
        load_model(saved[0])


def test_tokenizer_round_trip():
    tokenizer = load_tokenizer(DEBUG_MODEL)
    assert tokenizer.decode(tokenizer.encode("3141=4")) == "3141=4"
    assert tokenizer.eos_token_id == 1


@pytest.mark.parametrize("family", ["qwen2", "gemma", "llama"])
def test_folder_without_a_tokenizer(tmp_path, family):
    """For the first two, transformers hands out a tokenizer without a vocabulary."""
    tiny.config(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'" holds no tokenizer that transformers can read'):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_end_of_sequence(tmp_path):
    folder = tmp_path / "no_eos"
    shutil.copytree(DEBUG_MODEL, folder)
    edit(folder, "config.json", model_type="llama")  # Qwen2's tokenizer class has a default one
    edit(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token=None)
    with pytest.raises(ValueError, match=r'tokenizer of ".*no_eos" has no eos_token'):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("in_config", "in_generation", "wanted"),
    [
        (None, None, (9,)),
        (5, None, (5, 9)),
        (None, 4, (4, 9)),
        ([5, 6], [9, 4], (4, 5, 6, 9)),
        (9, "no file", (9,)),
    ],
)
def test_stop_token_ids(tmp_path, in_config, in_generation, wanted):
    """Of the tokenizer (9), the config and the generation config together, sorted, each once."""
    config = tiny.config("qwen2")
    config.eos_token_id = in_config
    config.save_pretrained(tmp_path)
    if in_generation != "no file":
        Path(tmp_path, "generation_config.json").write_text(
            json.dumps({"eos_token_id": in_generation})
        )
    assert stop_token_ids(load_config(str(tmp_path)), str(tmp_path), 9) == wanted

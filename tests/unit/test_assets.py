"""The debug model and its task: what tests and the default job rely on."""

import base64
import io
import json
import runpy
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def make_assets():
    return runpy.run_path(str(ASSETS / "make_assets.py"))


def read(name):
    return [json.loads(line) for line in (ASSETS / "max_digit" / name).open()]


def test_script_makes_the_files_that_are_checked_in(make_assets, tmp_path):
    make_assets["write_debug_model"](tmp_path / "debug_model")
    make_assets["write_max_digit"](tmp_path / "max_digit")
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {p.relative_to(ASSETS) for name in ("debug_model", "max_digit")
            for p in (ASSETS / name).rglob("*")}  # fmt: skip
    assert made == kept
    for path in made:
        # tokenizers may add keys to its file; what it holds is checked by the tests below.
        if path.name != "tokenizer.json":
            assert (tmp_path / path).read_bytes() == (ASSETS / path).read_bytes(), path


def test_script_makes_the_vision_files_that_are_checked_in(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ASSETS))
    script = runpy.run_path(str(ASSETS / "make_vlm_assets.py"))
    script["write_debug_vlm"](tmp_path / "debug_vlm")
    script["write_color"](tmp_path / "color")
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {p.relative_to(ASSETS) for name in ("debug_vlm", "color")
            for p in (ASSETS / name).rglob("*")}  # fmt: skip
    assert made == kept
    for path in made:
        mine, theirs = (tmp_path / path).read_text(), (ASSETS / path).read_text()
        if path.suffix == ".jsonl":  # an encoder of another version may write other bytes
            mine, theirs = (
                [
                    {**row, "images": pixels(row["images"])}
                    for row in map(json.loads, x.splitlines())
                ]
                for x in (mine, theirs)
            )
        assert path.name == "tokenizer.json" or mine == theirs, path


def pixels(png):
    return Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").tobytes()


def test_the_color_is_only_in_the_picture():
    """All prompts are alike, answers are balanced, and no picture is in both splits."""
    train, evaluation = ([json.loads(line) for line in (ASSETS / "color" / f"{name}.jsonl").open()]
                         for name in ("train", "eval"))  # fmt: skip
    assert {row["prompt"] for row in train + evaluation} == {"color?"}
    for rows, count in ((train, 160), (evaluation, 30)):
        assert Counter(row["label"] for row in rows) == dict.fromkeys("rgbycm", count)
    assert not {row["images"] for row in train} & {row["images"] for row in evaluation}


def test_tokenizer_has_one_token_a_character_and_loses_nothing(make_assets, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "debug_model")
    text = make_assets["CHARACTERS"]
    assert tokenizer(text)["input_ids"] == list(range(6, 56))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    marked = "<|user|>a  b\n\n<eos>"
    assert tokenizer(marked)["input_ids"] == [4, 30, 7, 7, 31, 6, 6, 1]
    assert tokenizer.decode(tokenizer(marked)["input_ids"]) == marked
    assert tokenizer.decode(tokenizer(marked)["input_ids"], skip_special_tokens=True) == "a  b\n\n"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(marked) == tokenizer(marked)


def test_model_fits_the_tokenizer():
    config = AutoConfig.from_pretrained(ASSETS / "debug_model")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "debug_model")
    assert config.vocab_size == len(tokenizer) == 56
    assert (config.eos_token_id, config.pad_token_id) == (1, 0)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)
    assert config.hidden_size // config.num_attention_heads == 32
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == 303_232


def test_max_digit_is_right_balanced_and_held_out(make_assets):
    train, evaluation = read("train.jsonl"), read("eval.jsonl")
    for row in train + evaluation:
        assert len(row["prompt"]) == 5
        assert max(row["prompt"][:4]) == row["label"]
    assert Counter(row["label"] for row in train) == dict.fromkeys("456789", 300)
    assert Counter(row["label"] for row in evaluation) == dict.fromkeys("456789", 60)
    assert len({row["prompt"] for row in train + evaluation}) == 1800 + 360
    assert 0.3 < make_assets["copy_baseline"](evaluation) < 0.36

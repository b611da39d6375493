"""The whole loop with images."""

import base64
import importlib.util
import json
import random
import re
import shutil
from dataclasses import replace

import pytest
import tiny_vlm
import torch
from helpers import run_ranks
from test_trainer_layouts import assert_same_lines
from tiny_job import (
    ASSETS,
    argv,
    records,
    rollout,
    run,
    run_process,
    tiny_config,
    trainer,
)
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from torchrft.config.manager import load
from torchrft.models.vision import Vision, refuse_without_images
from torchrft.tools.distributed import World
from torchrft.tools.images import Image, ImageError, image_of
from torchrft.trainer import Trainer

TEXT = {"ovis2": "qwen2", "blip-2": "opt"}
VLM = {
    "pretrain": str(ASSETS / "debug_vlm"),
    "prompt_data": str(ASSETS / "color" / "train.jsonl"),
    "images_key": "images",
    "apply_chat_template": "true",
    "max_len": "40",
    "prompt_max_len": "36",
    "lr_warmup_ratio": "0.0",
}


def color_rows(count):
    lines = (ASSETS / "color" / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


@pytest.fixture
def mixed(tmp_path):
    """Every other prompt has no image, and one has two."""
    rows = color_rows(8)
    for row in rows[1::2]:
        del row["images"]
    rows[2]["images"] = [rows[0]["images"], rows[2]["images"]]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return VLM | {"prompt_data": str(path), "images_key": None, "mixed_mm_data": "true"}


def train(rank, folder, world_size, options):
    torch.set_num_threads(1)
    config = tiny_config(world_size, save_path=folder, **options)
    job = Trainer(config, World(rank, world_size, rank, torch.device("cpu")))
    assert job.train() is None


@pytest.mark.slow
def test_ranks_with_and_without_images(tmp_path, mixed):
    """A critic, a reference and packing; a run of two ranks resumed by one."""
    options = mixed | {"advantage_estimator": "gae", "critic_learning_rate": "1e-3"}
    options |= {"init_kl_coef": "0.01", "actor_learning_rate": "1e-4", "packing_samples": "true"}
    chain, alone = str(tmp_path / "chain"), str(tmp_path / "alone")
    layout = {"fsdp": "true", "gradient_checkpointing": "true"}
    run_ranks(train, 2, chain, 2, options | layout | {"max_steps": 2})
    run_ranks(train, 1, chain, 1, options | {"max_steps": 3, "load_checkpoint": "true"})
    run_ranks(train, 1, alone, 1, options | {"max_steps": 3})
    found, expected = records(chain), records(alone)
    assert_same_lines(found, expected)
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("critic/loss", "critic/grad_norm", "critic/value_mean"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), name
        assert theirs["mismatch/logprob_abs_max"] < 1e-4  # the engine saw the same pictures
    assert expected[1]["critic/grad_norm"] > 0


def test_export_holds_the_processor(tmp_path):
    """transformers loads it as it is, and answers as the policy does."""
    with trainer(tmp_path, **VLM) as job:
        prompt = job.prompts.stream.peek()[0]
        (tmp_path / "hf").mkdir()
        job.export(tmp_path / "hf")
        wanted = job.learner.model.state_dict()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    made = processor(text=[prompt.text], images=[prompt.images[0].open()], return_tensors="pt")
    assert made["input_ids"][0].tolist() == list(prompt.token_ids)
    assert Vision.load(str(tmp_path / "hf")).token_ids(prompt.text, prompt.images) == list(
        prompt.token_ids
    )


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="Qwen's processors need torchvision"
)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_with_its_own_processor(tmp_path, mixed, family):
    """Engine and trainer agree, and the export can be trained on."""
    source = {"pretrain": tiny_vlm.qwen_folder(family, tmp_path / "model")}
    options = mixed | {"packing_samples": "true", "max_len": "60", "prompt_max_len": "56"}
    job = run(tmp_path / "a", **(options | source), max_pixels="400")
    assert all(line["mismatch/logprob_abs_max"] < 1e-4 for line in records(tmp_path / "a"))
    assert job.learner.policy.vision.by_size
    source = {"pretrain": str(tmp_path / "a" / "hf" / "step-2"), "init": "pretrained"}
    run(tmp_path / "b", **(options | source), max_steps="1")
    assert records(tmp_path / "b")[0]["grad_norm"] > 0


def guide(rank, folder, source):
    torch.set_num_threads(1)
    words = [
        *tiny_vlm.GUIDE.split(),
        "--pretrain",
        VLM["pretrain"],
        "--init",
        "random",
        "--engine_type",
        "native",
    ]
    words += ["--prompt_data", source, "--functions", "exact_match", "--apply_chat_template"]
    words += ["--max_new_tokens", "4", "--max_steps", "1", "--save_path", folder]
    job = Trainer(load(words, 2).config, World(rank, 2, rank, torch.device("cpu")))
    assert job.train() is None


def test_the_guides_vision_command_runs(tmp_path, mixed):
    run_ranks(guide, 2, str(tmp_path / "run"), mixed["prompt_data"])
    (line,) = records(tmp_path / "run")
    assert line["update/optimizer_steps"] == 2
    assert line["mismatch/logprob_abs_mean"] < 0.05  # bfloat16


TAKEN = """
from pathlib import Path

def away(images):
    for path in Path(images[0].path).parent.glob("*.png"):
        {what}
    return 0.0
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("path.unlink()", "does not exist"),
        ("path.write_bytes(path.read_bytes()[:50])", "cannot be decoded"),
    ],
)
def test_a_picture_that_vanishes_ends_the_run_in_a_sentence(tmp_path, what, message):
    """The first step's reward takes away what the second asks for; its row is named."""
    rows = color_rows(8)
    for index, row in enumerate(rows):
        (tmp_path / f"{index}.png").write_bytes(base64.b64decode(row["images"]))
        row["images"] = f"{index}.png"
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "taken.py").write_text(TAKEN.format(what=what))
    reward = f'[{{ name = "{tmp_path}/taken.py:away", isolate = false }}]'
    options = VLM | {"prompt_data": tmp_path / "p.jsonl", "functions": reward}
    words = argv(**options, save_path=tmp_path / "run")
    assert run_process(words, tmp_path / "log") == 1
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    found = re.search(r"^error: prompt row (\d): (\S+) " + message, log, re.MULTILINE)
    assert found is not None, log
    assert found[2] == str(tmp_path / f"{found[1]}.png")
    assert len(records(tmp_path / "run")) == 1


def test_a_picture_that_grows_is_noticed():
    """Before its features go where others belong."""
    vision = tiny_vlm.vision("qwen2_vl")
    small, large = tiny_vlm.picture(16, 16), tiny_vlm.picture(32, 16)
    before = tiny_vlm.prompt(vision, "3 56 I 57", small, row=5)
    with pytest.raises(ImageError, match="prompt row 5: its images changed while the run went on"):
        vision.see(torch.arange(9)[None], [(replace(before, images=(large,)), 0, 9)])


def test_a_text_model_cannot_take_images(tmp_path):
    options = VLM | {"pretrain": str(ASSETS / "debug_model")}
    with pytest.raises(ValueError, match="is a qwen2 model, which sees no images"):
        run(tmp_path, **options)
    options = {"freeze_vision": "true"}
    with pytest.raises(ValueError, match=r"freeze_vision: .* has no image tower"):
        run(tmp_path, **options)


def test_a_critic_that_takes_other_images(tmp_path):
    """The policy's processor prepares them for both."""
    other = shutil.copytree(ASSETS / "debug_vlm", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["image_size"] = 48
    (other / "config.json").write_text(json.dumps(config))
    critic = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(other))
    critic.save_pretrained(other)
    options = VLM | {"advantage_estimator": "gae", "critic_pretrain": str(other)}
    with pytest.raises(ValueError, match=r'other" takes images otherwise than pretrain = ".*vlm"'):
        run(tmp_path, **options)


@pytest.mark.parametrize(
    ("kind", "what"),
    [("ovis2", "embeddings of its own for the marks"), ("blip-2", "a head of its own inside")],
)
def test_models_that_do_more_with_images_than_torchrft(kind, what):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model(kind, text_config={**sizes, "model_type": TEXT[kind]})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ValueError, match=f"has .*{what}.*, which torchrft does not support with"):
        refuse_without_images(model)


def keep(rank, folder):
    """What a rank says where one of its pictures is not there."""
    opened = Image.open

    def missing(image):
        if rank == 1 and image == lost:
            raise ImageError("lost")
        return opened(image)

    lost = image_of(color_rows(4)[3]["images"], ASSETS / "color")
    Image.open = missing
    try:
        train(rank, folder, 2, VLM)
    except ValueError as error:
        return str(error)
    finally:
        Image.open = opened


def test_ranks_that_keep_other_prompts_do_not_start(tmp_path):
    total = len((ASSETS / "color" / "train.jsonl").read_text().splitlines())
    said = f"prompt_data: the ranks keep other prompts, {total}, {total - 1} of them: give all"
    for text in run_ranks(keep, 2, str(tmp_path)):
        assert text.startswith(said)


def test_a_vision_language_model_trains_on_text(tmp_path):
    run(tmp_path, pretrain=VLM["pretrain"])
    assert [line["step"] for line in records(tmp_path)] == [1, 2]


def recipe(tmp_path, *words):
    path = ASSETS.parents[1] / "train_configs" / "debug_vlm.toml"
    return load(["--config_file", str(path), "--save_path", str(tmp_path), *words], 1).config


@pytest.mark.slow
def test_without_the_right_pictures_the_answer_stays_unknown(tmp_path):
    """The recipe, with the pictures dealt out anew: what it learns elsewhere is in the picture."""
    rewards = {}
    for name in ("right", "shuffled"):
        files = {}
        for split in ("train", "eval"):
            rows = [json.loads(x) for x in (ASSETS / "color" / f"{split}.jsonl").open()]
            if name == "shuffled":
                pictures = [row["images"] for row in rows]
                random.Random(1).shuffle(pictures)
                rows = [{**row, "images": p} for row, p in zip(rows, pictures, strict=True)]
            files[split] = tmp_path / f"{name}-{split}.jsonl"
            files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = recipe(
            tmp_path / name,
            *("--prompt_data", str(files["train"]), "--eval_data", str(files["eval"])),
            *("--max_steps", "60", "--eval_steps", "1000", "--max_ckpt_num", "1"),
        )
        torch.set_num_threads(1)
        job = Trainer(config, World(0, 1, 0, torch.device("cpu")))
        before = job._sync_weights() or job.evaluate()["eval/reward/mean"]
        assert job.train() is None
        rewards[name] = before, records(tmp_path / name)[-1]["eval/reward/mean"]
    assert rewards["right"][0] <= 0.35
    assert rewards["right"][1] >= 0.9
    assert rewards["shuffled"][1] <= 0.35
    text = {row["response"] for row in rollout(tmp_path / "shuffled", 60)}
    assert text & set("rgbycm")  # it does answer with colors

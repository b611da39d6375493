"""The vLLM engine on prompts with images, beside transformers and the native engine."""

import importlib.util
import shutil
from dataclasses import replace
from functools import partial

import pytest
import tiny_vlm
import torch
from tiny_job import ASSETS, tiny_config
from transformers import AutoModelForImageTextToText

from torchrft.build.judges import build_judge
from torchrft.build.rollout import judge_engine
from torchrft.config.job_config import Rollout
from torchrft.config.reward_config import Judge
from torchrft.models.loader import load_config, load_model, load_tokenizer
from torchrft.models.vision import Vision
from torchrft.rollout import build_engine
from torchrft.rollout.canary import Canary, WeightSyncError
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.tools.images import Image, ImageError
from torchrft.types import Prompt, SamplingParams

if importlib.util.find_spec("torchvision") is None:
    pytest.skip("vLLM's vision models need torchvision", allow_module_level=True)

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, max_total_tokens=96)
PICTURES = [tiny_vlm.picture(24, 24, 1), tiny_vlm.picture(32, 16, 2), tiny_vlm.picture(24, 24, 3)]


def folder(family, path):
    if family == "llava":
        return str(ASSETS / "debug_vlm")
    return tiny_vlm.qwen_folder(family, path)


def make(source, vision, **options):
    rollout = Rollout.model_validate(
        {"rollout_batch_size": 1, "engine_type": "vllm", "max_num_seqs": 32, **options}
    )
    return build_engine(rollout, source, load_weights=False, max_len=96, vision=vision)


def weights(source, seed):
    """Large ones, so that the picture decides the most likely token."""
    model = load_model(source, "random", seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed_tokens" not in name:
                parameter.mul_(0.15 / parameter.std())
            elif parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def prompts(vision):
    mark = {"<image>": "<image>"}.get(
        vision.placeholder, f"<|vision_start|>{vision.placeholder}<|vision_end|>"
    )
    cases = [(f"a{mark}bc", PICTURES[:1]), ("hello", []), (f"{mark}x{mark}", PICTURES[1:]),
             (f"a{mark}bc", PICTURES[2:])]  # fmt: skip
    made = []
    for row, (text, images) in enumerate(cases):
        ids = vision.token_ids(text, images) if images else None
        ids = ids or vision.processor.tokenizer(text)["input_ids"]
        made.append(Prompt(row, text, tuple(ids), images=tuple(images)))
    return made


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_updates(family, tmp_path):
    """Tokens and log-probs of the native engine after every update, from the same pictures: what
    the old tower made of them is forgotten."""
    source = folder(family, tmp_path)
    vision = Vision.load(source)
    engine = make(source, vision)
    native = NativeEngine(load_config(source), load_tokenizer(source), (1,), vision=vision)
    asked, different = prompts(vision), set()
    for version in range(4):
        model = weights(source, seed=version)
        for one in (engine, native):
            one.update_weights(named_full_tensors(model), version)
        found, wanted = (one.generate(asked, GREEDY) for one in (engine, native))
        for mine, other in zip(found, wanted, strict=True):
            assert mine.token_ids == other.token_ids
            assert mine.logprobs == pytest.approx(other.logprobs, abs=2e-4)
        different |= {found[0].token_ids, found[3].token_ids}
    assert len(different) > 5  # pictures and weights decide
    path = tmp_path / "p.png"
    path.write_bytes(PICTURES[0].data)
    prompt = replace(asked[0], row=9, images=(Image(path=str(path)),))
    assert engine.generate([prompt], GREEDY)[0].token_ids == found[0].token_ids
    path.unlink()
    with pytest.raises(ImageError, match=r"prompt row 9: .*p\.png does not exist"):
        engine.generate([prompt], GREEDY)


def test_a_picture_is_encoded_once_for_its_samples(tmp_path):
    source = folder("llava", tmp_path)
    vision = Vision.load(source)
    engine, seen = make(source, vision), []

    def count(model):
        model.vision_tower.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))

    engine.llm.apply_model(count)
    for version in (1, 2):
        seen.clear()
        engine.update_weights(named_full_tensors(weights(source, version)), version)
        sampling = SamplingParams(n=5, max_new_tokens=4, max_total_tokens=96)
        assert len(engine.generate(prompts(vision), sampling)) == 4 * 5
        assert 3 <= sum(seen) <= 4  # three pictures, one of them in two prompts


def test_the_canary_watches_the_tower(tmp_path, monkeypatch):
    """A tensor of the image tower that is stale on its way into vLLM is named."""
    source = folder("llava", tmp_path)
    engine = make(source, Vision.load(source))
    watch, fault = Canary.watch, {}

    def faulty(self, pairs):
        for name, tensor in watch(self, pairs):
            yield name, fault["old"] if name == fault.get("name") else tensor

    monkeypatch.setattr(Canary, "watch", faulty)
    old = dict(named_full_tensors(weights(source, 1)))
    engine.update_weights(named_full_tensors(weights(source, 1)), 0)
    unused = "vision_tower.post_layernorm"  # which the model does not compute
    for name in old:
        if unused in name:
            continue
        fault.update(name=name, old=old[name])
        with pytest.raises(WeightSyncError, match=f'does not hold "{name}" as the trainer'):
            engine.update_weights(named_full_tensors(weights(source, 2)), 1)


def test_a_processor_of_another_place_is_refused(tmp_path):
    source = folder("llava", tmp_path)
    vision = Vision.load(source)
    vision.source = "elsewhere"
    with pytest.raises(ValueError, match='processor = "elsewhere": vLLM takes the processor from'):
        make(source, vision)


def test_a_judge_in_vllm_sees_what_a_native_one_sees(tmp_path):
    config = load_config(str(ASSETS / "debug_vlm"))
    shutil.copytree(ASSETS / "debug_vlm", tmp_path, dirs_exist_ok=True)
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.3
    torch.manual_seed(3)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    shutil.copy(ASSETS / "debug_vlm" / "config.json", tmp_path)  # one of a common attention
    job = tiny_config()
    engine = partial(judge_engine, config=job, dtype=torch.float32, device=torch.device("cpu"))
    answers = {}
    for kind in ("native", "vllm"):
        options = {"pretrain": str(tmp_path), "engine": kind, "max_len": 96, "max_new_tokens": 8}
        template = "{{ response }}{{ images }}?"
        judge = build_judge(Judge.model_validate({"template": template} | options), job, engine)
        prompts = [Prompt(0, "", (), images=own) for own in (PICTURES[:1], PICTURES[1:], [])]
        contents = [
            judge.template.render(replace(prompt, images=tuple(prompt.images)), "12")
            for prompt in prompts
        ]
        answers[kind] = judge.answers(contents, [[1], [2], [3]])
        judge.close()
    assert answers["vllm"] == answers["native"]
    assert len({tuple(own) for own in answers["native"]}) == 3

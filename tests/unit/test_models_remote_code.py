"""Python code that comes with a model runs only where the table that names it says so."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
import remote_code
import tiny_classifiers
import tiny_job

from torchrft.models.loader import load_config, load_model, load_tokenizer, read_config
from torchrft.models.vision import Vision
from torchrft.tools.hub import trust_code_of

REFUSED = "needs Python code that comes with it, .* set trust_remote_code = true"
NAMES = ("run", "plain")
EVERY_PART = ("config", "model", "tokenizer")


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked at the terminal"))
    trust_code_of([])
    yield
    trust_code_of([])


@pytest.mark.parametrize("parts", [("config",), ("config", "model"), EVERY_PART])
def test_a_model_of_its_own_code_is_refused_by_folder_and_option(tmp_path, parts):
    folder = remote_code.folder(tmp_path / "model", *parts)
    with pytest.raises(ValueError, match=f'"{folder}" {REFUSED}'):
        load_config(str(folder))
    with pytest.raises(ValueError, match=f'"{folder}" {REFUSED}'):
        tiny_job.run(tmp_path / "run", pretrain=folder)
    assert not remote_code.mark(folder).exists()


def test_code_for_a_model_that_transformers_has_is_left_out_with_a_warning(tmp_path, caplog):
    folder = remote_code.folder(tmp_path / "model", "model", "tokenizer")
    assert type(load_model(str(folder), "random")).__name__ == "Qwen2ForCausalLM"
    assert len(load_tokenizer(str(folder))) == 56
    assert not remote_code.mark(folder).exists()
    assert caplog.text.count("which does not run: transformers has classes of its own") >= 2


def test_a_job_that_trusts_the_code_trains_the_models_class(tmp_path):
    folder = remote_code.folder(tmp_path / "model", *EVERY_PART)
    job = tiny_job.run(tmp_path / "run", pretrain=folder, trust_remote_code="true")
    assert remote_code.mark(folder).read_text() == "ran"
    assert type(job.learner.model).__name__ == "OwnForCausalLM"
    assert type(job.export.args[1]).__name__ == "OwnTokenizer"
    plain = tiny_job.run(tmp_path / "plain")
    norms = [[row["grad_norm"] for row in tiny_job.records(tmp_path / n)] for n in NAMES]
    assert norms[0] == norms[1]
    # The export has the code, and needs it.
    export = json.loads((tmp_path / "run" / "hf" / "step-2" / "config.json").read_text())
    assert export["auto_map"]["AutoModelForCausalLM"].endswith("modeling_own.OwnForCausalLM")
    assert (tmp_path / "run" / "hf" / "step-2" / "modeling_own.py").is_file()
    assert type(plain.learner.model).__name__ == "Qwen2ForCausalLM"


def test_trust_is_of_the_models_that_a_table_names(tmp_path):
    folder = remote_code.folder(tmp_path / "model", *EVERY_PART)
    trust_code_of(["elsewhere"])
    with pytest.raises(ValueError, match=REFUSED):
        load_config(str(folder))
    trust_code_of([str(folder)])
    assert load_config(str(folder)).model_type == "own_qwen"
    trust_code_of([])
    with pytest.raises(ValueError, match=REFUSED):
        load_config(str(folder))


def test_each_table_has_its_own_option():
    entry = "[{{ pretrain = '{0}', tokenizer = '{0}-t', trust_remote_code = {1} }}]"
    judge = "[{ pretrain = 'j', template = '{{ response }}', trust_remote_code = true }]"
    options = {"pretrain": "p", "ref_pretrain": "ref", "init_kl_coef": "0.1"}
    job = tiny_job.tiny_config
    assert job(models=entry.format("m", "false"), **options).trusted_sources == set()
    trusted = job(models=entry.format("m", "true"), judges=judge, **options).trusted_sources
    assert trusted == {"m", "m-t", "j"}
    assert job(trust_remote_code="true", **options).trusted_sources == {"p", "ref"}


@pytest.mark.parametrize("trust", ["false", "true"])
def test_reward_models_and_judges_run_code_by_their_own_option(tmp_path, trust):
    plain = Path(tiny_classifiers.save(tmp_path / "plain"))
    model = remote_code.folder(tmp_path / "rm", *EVERY_PART)
    maps = json.loads((model / "config.json").read_text())["auto_map"]
    for name in ("config.json", "model.safetensors"):
        shutil.copy(plain / name, model)
    remote_code.edit(model / "config.json", auto_map=maps, model_type="own_qwen")
    judge = remote_code.folder(tmp_path / "judge", *EVERY_PART)
    load_model(tiny_job.MODEL, "random").save_pretrained(tmp_path / "weights")
    shutil.copy(tmp_path / "weights" / "model.safetensors", judge)
    entries = {
        "models": f"[{{ pretrain = '{model}', trust_remote_code = {trust} }}]",
        "judges": f"[{{ pretrain = '{judge}', trust_remote_code = {trust}, max_new_tokens = 2, "
        "template = '{{ response }}' }]",
    }
    for kind, folder in (("models", model), ("judges", judge)):
        options = {"functions": None, "max_steps": "1", kind: entries[kind]}
        if trust == "true":
            tiny_job.run(tmp_path / kind, **options)
            assert remote_code.mark(folder).exists()
        else:
            with pytest.raises(ValueError, match=f'"{folder}" {REFUSED}'):
                tiny_job.run(tmp_path / kind, **options)
            assert not remote_code.mark(folder).exists()


def test_a_processor_of_its_own_code_is_refused(tmp_path):
    folder = remote_code.folder(tmp_path / "vlm", "processor", asset="debug_vlm")
    with pytest.raises(ValueError, match=f'"{folder}" {REFUSED}'):
        Vision.load(str(folder))
    assert not remote_code.mark(folder).exists()
    trust_code_of([str(folder)])
    with pytest.raises(ValueError, match="holds no image processor"):  # it has none indeed
        Vision.load(str(folder))
    assert remote_code.mark(folder).exists()


def test_the_config_of_a_tower_brings_no_code(tmp_path):
    folder = remote_code.folder(tmp_path / "vlm", asset="debug_vlm")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["auto_map"] = {"AutoModel": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    assert not hasattr(read_config(str(folder), "pretrain =").vision_config, "auto_map")
    load_model(str(folder), "random")
    assert not remote_code.mark(folder).exists()


def test_code_that_does_not_load_is_named(tmp_path):
    folder = remote_code.folder(tmp_path / "model", "config", "model")
    (folder / "modeling_own.py").write_text("raise OSError('no such machine')")
    with pytest.raises(ValueError, match=f'the code of "{folder}" does not load: OSError: no such'):
        tiny_job.run(tmp_path / "run", pretrain=folder, trust_remote_code="true")

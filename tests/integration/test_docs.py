"""The snippets of README.md and docs/ as they are pasted: in a folder like the repository's root,
in their order. One place is replaced: a model of the hub by a tiny folder, since nothing is loaded
from the network here. Long runs are cut short by their number of prompts or steps.

docs/rewards*.md are in test_docs_rewards.py.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from test_runs import environment
from tiny_job import ROOT, records

from torchrft.config.fields import FIELDS
from torchrft.config.manager import load

MARKED = "export MODEL=Qwen/Qwen2.5-0.5B-Instruct"


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def snippets(page: str, *languages: str) -> list[tuple[str, str]]:
    """(language, code) of every block in one of `languages`."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if block[0] in languages]


@pytest.fixture
def folder(tmp_path):
    """A place like the repository's root, where the examples may write, and a tiny model."""
    for name in ("train_configs", "tests", "run_train.sh", "torchrft"):
        (tmp_path / name).symlink_to(ROOT / name)
    model = tmp_path / "tiny_model"
    tiny.model("qwen2", seed=3, initializer_range=0.02).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "tests/assets/debug_model" / name, model)
    return tmp_path


def paste(folder: Path, language: str, code: str) -> str:
    """Run a snippet in a shell or a Python of its own; returns what it printed."""
    program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*program[language], code],
        cwd=folder,
        env=environment(1) | {"PYTHONPATH": path, "MODEL": str(folder / "tiny_model")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_first_run(folder):
    page = "docs/first_run.md"
    assert text_of(page).count(MARKED) == 1
    shorter = {
        MARKED: "export MODEL=tiny_model",
        '("train", 1600), ("eval", 100)': '("train", 32), ("eval", 4)',
        "--max_len 256": "--max_new_tokens 8 --bf16 false --max_len 256",
    }
    printed = []
    for language, code in snippets(page, "bash", "python"):
        for long, short in shorter.items():
            code = code.replace(long, short)
        printed.append(paste(folder, language, code))
    assert '"question": "What is 59 + 63? Answer with the number.", "answer": 122' in printed[1]
    assert "# tokens per packed micro-batch <= 2048, 128 samples per rank" in printed[4]
    assert printed[5].count("finished at step 2") == 1
    # The tokenizer knows digits and signs only; the template is its own.
    assert "<|user|>" in printed[6]
    assert printed[6].count("response:") == 3
    assert "finished at step 2 " in printed[7]
    assert [line.split()[0] for line in printed[8].splitlines()] == ["1", "2"]
    assert [row["step"] for row in records(folder / "outputs/my_run")] == [1, 2]
    assert (folder / "outputs/my_run/previous-1/config.toml").exists()


@pytest.mark.slow
def test_readme_commands_and_parts(folder):
    first, second = [code for _, code in snippets("README.md", "bash")]
    assert first.startswith("pip install -e . && ./run_train.sh ")
    assert second.startswith("pip install -e '.[test]' && pytest ")
    # Installing and the whole test suite are .ci/run's.
    command = first.removeprefix("pip install -e . && ").replace(".sh", ".sh --max_steps 1", 1)
    assert "Hugging Face  outputs/debug_model/hf/step-1" in paste(folder, "bash", command)
    parts = "\n".join(code for _, code in snippets("README.md", "python"))
    paste(folder, "python", parts + "\nassert loss.isfinite() and len(entropy) == 6")


STANDS_FOR = {
    "path/or/hub-id": "tests/assets/debug_model",
    "hub-id": "tests/assets/debug_model",
    "http://...": "http://localhost:5000",
}
TABLE = text_of("README.md").partition("## Change one thing")[2].partition("\n## ")[0]
ROWS = [words for words in re.findall(r"`([^`]*)`", TABLE) if "--" in words]


@pytest.mark.parametrize("words", ROWS)
def test_readme_rows_are_jobs(words, folder, monkeypatch):
    """Each alone makes a valid job of the default one."""
    monkeypatch.chdir(folder)
    (folder / "my_rewards.py").write_text("def score(response): return 1.0\n")
    world = int(found[1]) if (found := re.match(r"NGPU=(\d+) ", words)) else 1
    flags = [STANDS_FOR.get(word, word) for word in words[words.index("--") :].split()]
    job = ["--config_file", "train_configs/debug_model.toml", "--dry_run"]
    assert load([*job, *flags], world).warnings == ()


@pytest.mark.slow
def test_readme_prompts_of_ones_own_train(folder):
    (row,) = [words for words in ROWS if "--prompt_data" in words]
    rows = [f'{{"question": "What is {n} + {n}?", "answer": {2 * n}}}\n' for n in range(10, 50)]
    (folder / "my.jsonl").write_text("".join(rows))
    paste(folder, "bash", f"./run_train.sh --max_steps 1 {row} --rollout_batch_size 8 "
          "--train_batch_size 128 --micro_train_batch_size 64 --save_path outputs/own")  # fmt: skip
    (record,) = records(folder / "outputs/own")
    assert "eval/reward/mean" not in record


@pytest.mark.slow
def test_data_example_prints_what_it_says(folder):
    ((_, code),) = snippets("docs/data.md", "python")
    said = [line[2:] for line in code.splitlines() if line.startswith("# ")]
    assert paste(folder, "python", code).splitlines() == said


@pytest.mark.parametrize("page", ["docs/data.md", "docs/adding_a_component.md"])
def test_tables_are_configurations(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for _, code in snippets(page, "toml"):
        Path("job.toml").write_text(code)
        needed = "--pretrain m --train_batch_size 64 --rollout_batch_size 16 --dry_run"
        load(["--config_file", "job.toml", *needed.split()])


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, target


def test_troubleshooting_names_options_and_metrics_that_exist():
    page = text_of("docs/troubleshooting.md")
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*)(?: = [^`]*)?`", page))
    metrics = set(re.findall(r"`([^`]*)`", text_of("docs/metrics.md")))
    others = {"group", "prompt", "format", "length", "weight", "isolate"}  # of rows and rules
    assert not sorted(named - metrics - FIELDS.keys() - others)

"""The examples of docs/rewards*.md, as they stand there: files are written, commands are run."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from reward_servers import Program, free_port
from test_runs import environment
from tiny_job import ROOT, argv, records

from torchrft.config.manager import load

PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in (
    "rewards", "rewards_models", "rewards_remote"
)}  # fmt: skip


def blocks(page: str, language: str, having: str = "") -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    assert found
    return [block for block in found if having in block]


@pytest.fixture
def folder(tmp_path):
    """A place with the repository's jobs, where the examples' files can be written."""
    for name in ("train_configs", "tests", "run_train.sh"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def write_named(folder: Path, page: str) -> None:
    """Blocks that begin with a comment of a file's name, and go there."""
    for language in ("python", "toml"):
        for block in blocks(page, language):
            if named := re.match(r"# (\w+\.\w+)", block):
                with (folder / named[1]).open("a") as file:
                    file.write(block)


def shell(folder: Path, command: str) -> str:
    """One optimizer step is enough to see it run."""
    command = re.sub(r"--max_steps \d+", "--max_steps 1", command)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = environment(1) | {"PYTHONPATH": path}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def parts(folder: Path) -> list[str]:
    [last] = records(folder / "outputs" / "debug_model")
    return [name.partition("/")[2] for name in last if name.startswith("reward_parts/")]


@pytest.mark.slow
def test_rules_and_functions(folder):
    write_named(folder, "rewards")
    rule, own = blocks("rewards", "bash")[:2]
    shell(folder, rule)
    assert parts(folder) == ["numeric", "length"]
    shell(folder, f"rm -r outputs; {own}")
    assert parts(folder) == ["my_rewards.py:brevity"]
    shell(folder, "rm -r outputs; ./run_train.sh --max_steps 1 --functions my_rewards.py:careful")
    assert parts(folder) == ["my_rewards.py:careful", "my_rewards.py:careful/length"]


def test_a_function_registered_in_python(folder):
    (code,) = blocks("rewards", "python", "@register")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"# {said.strip()}" in code.splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_configurations(page, folder):
    for place, block in enumerate(blocks(page, "toml", "[reward]")):
        file = folder / f"{place}.toml"
        file.write_text(block)
        assert load(["--config_file", str(file), *argv(functions=None)]).config.reward.names("m")


@pytest.mark.slow
@pytest.mark.parametrize(("place", "part"), [(0, "tiny_reward_model"), (1, "judge")])
def test_models_and_judges(place, part, folder):
    write_named(folder, "rewards_models")
    (folder / "make.py").write_text(blocks("rewards_models", "python")[place])
    shell(folder, f"python make.py\n{blocks('rewards_models', 'bash')[place]}")
    assert parts(folder) == [part]


@pytest.mark.slow
def test_the_server_and_its_client(folder, monkeypatch):
    write_named(folder, "rewards_remote")
    (example,) = blocks("rewards_remote", "bash", "curl")
    monkeypatch.chdir(folder)
    server = Program(folder / "log", "--config", "server.toml")
    try:
        server.wait()
        ask = re.search(r"curl.*?\n.*?'\n", example)[0]
        told = shell(folder, ask.replace("localhost:5000", f"127.0.0.1:{server.port}"))
        assert f"# {told.strip()}" in example.splitlines()
        job = example[example.index("python -m torchrft.train") :]
        shell(folder, f"{job.rstrip()} --max_steps 1".replace(":5000", f":{server.port}"))
    finally:
        server.kill()
    assert parts(folder) == ["remote"]


def test_a_server_of_ones_own(folder):
    write_named(folder, "rewards_remote")
    port = free_port()
    file = folder / "my_server.py"
    file.write_text(file.read_text().replace("port=5001", f"port={port}"))
    process = subprocess.Popen([sys.executable, str(file)], stderr=subprocess.DEVNULL)
    body = json.dumps({"responses": ["ab", ""]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/", body, {"Content-Type": "application/json"}
    )
    try:
        for _ in range(600):
            assert process.poll() is None
            try:
                answer = urllib.request.urlopen(request, timeout=30)
                break
            except OSError:
                time.sleep(0.1)
        assert json.load(answer) == {"rewards": [2.0, 0.0]}
    finally:
        process.kill()
        process.wait()

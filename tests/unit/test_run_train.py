"""run_train.sh up to torchrun, which a stub replaces."""

import os
import subprocess
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig

SCRIPT = Path(__file__).parents[2] / "run_train.sh"
STUB = """#!/bin/sh
echo "torchrun $@"
exec python - <<'END'
from torch.distributed.launcher.api import LaunchConfig
print("waits", getattr(LaunchConfig(1, 1, 1), "shutdown_timeout", 30))
END
"""


def launch(folder, **variables):
    stub = folder / "torchrun"
    stub.write_text(STUB)
    stub.chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if k not in ("NGPU", "NNODES", "WORLD_SIZE")}
    env = inherited | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
    return subprocess.run([SCRIPT], env=env, capture_output=True, text=True, timeout=60)


HAS_TIMEOUT = "shutdown_timeout" in LaunchConfig.__dataclass_fields__  # from torch 2.12


@pytest.mark.parametrize(
    ("variables", "seconds"), [({}, 600), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 90)]
)
def test_workers_have_time_to_save(tmp_path, variables, seconds):
    result = launch(tmp_path, **variables)
    assert f"waits {seconds if HAS_TIMEOUT else 30}\n" in result.stdout, result.stderr


@pytest.mark.parametrize(("ngpu", "count"), [("2", 2), ("h100:4", 4), ("nvidia_h100-80gb.x:1", 1)])
def test_ngpu_may_be_slurms(tmp_path, ngpu, count):
    result = launch(tmp_path, NGPU=ngpu)
    assert f" --nproc_per_node {count} " in result.stdout, result.stderr


@pytest.mark.parametrize(
    "variables",
    [{"NGPU": "h100"}, {"NGPU": "0"}, {"NGPU": "h100:"}, {"NGPU": "a:2,b:2"}, {"NNODES": "two"}],
)
def test_what_is_no_number_is_refused(tmp_path, variables):
    result = launch(tmp_path, **variables)
    ngpu, nnodes = variables.get("NGPU", "1"), variables.get("NNODES", "1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: NGPU={ngpu} and NNODES={nnodes} must be numbers from 1, like NGPU=8 (or h100:8)\n"
    )

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks

from torchrft.tools import distributed

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    distributed.teardown()


def test_setup_makes_a_single_process_group_without_env(alone):
    world = distributed.setup(30.0)
    assert (world.rank, world.world_size, world.local_rank) == (0, 1, 0)
    assert world.is_main
    assert dist.is_initialized()
    assert dist.get_world_size() == 1
    distributed.teardown()
    assert not dist.is_initialized()
    distributed.setup(30.0)  # and again
    assert dist.is_initialized()


def test_setup_uses_an_existing_group_and_leaves_it(alone):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert distributed.setup(5.0).world_size == 1
        distributed.teardown()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_helpers_are_identity_without_a_group():
    everyone = distributed.DataRanks.all()
    assert everyone.sum({"b": 2.0, "a": 1.0}, "p") == {"b": 2.0, "a": 1.0}
    assert distributed.all_reduce_max({"a": -1.0}) == {"a": -1.0}
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    value = {"x": object()}
    assert everyone.gather(value)[0] is value
    assert distributed.on_main(lambda: 3, "p") == 3
    assert distributed.on_all(lambda: 3, "p") == [3]
    distributed.barrier()
    assert distributed.is_main()


def _collectives(rank: int) -> dict:
    # The keys come in another order on rank 1, and 2**-40 is lost in float32.
    values = {"a": 1.0 + rank, "b": 2.0**-40 * (1 + rank)}
    if rank == 1:
        values = dict(reversed(values.items()))
    everyone = distributed.DataRanks.all()
    out = {
        "sum": everyone.sum(values, "p"),
        "max": distributed.all_reduce_max({"a": -1.0 - rank}),
        "any": [distributed.any_rank(rank == 1), distributed.any_rank(False)],
        "objects": everyone.gather({"rank": rank, "list": [rank] * rank}),
        "main": distributed.on_main(lambda: f"ran on {rank}", "p"),
        "all": distributed.on_all(lambda: rank * 10, "p"),
        "is_main": distributed.is_main(),
    }
    distributed.barrier()
    return out


def test_collectives_over_two_ranks():
    first, second = run_ranks(_collectives, 2)
    for result in (first, second):
        assert result["sum"] == {"a": 3.0, "b": 3 * 2.0**-40}
        assert result["max"] == {"a": -1.0}
        assert result["any"] == [True, False]
        assert result["objects"] == [{"rank": 0, "list": []}, {"rank": 1, "list": [1]}]
        assert result["main"] == "ran on 0"
        assert result["all"] == [0, 10]
    assert list(second["sum"]) == ["b", "a"]
    assert (first["is_main"], second["is_main"]) == (True, False)


def _failures(rank: int) -> list[str]:
    def fail_on(which: int) -> int:
        if rank == which:
            raise OSError("disk full")
        return rank

    seen = []
    for function, phase, which in (
        (distributed.on_main, "write", 0),
        (distributed.on_all, "hash", 1),
    ):
        try:
            function(lambda which=which: fail_on(which), phase)
        except Exception as error:
            seen.append(f"{type(error).__name__}: {error}")
    return seen


def test_a_failure_on_one_rank_ends_every_rank():
    first, second = run_ranks(_failures, 2)
    assert first == [
        "OSError: disk full",
        "RankError: rank 1 failed in phase 'hash': OSError: disk full",
    ]
    assert second == [
        "RankError: rank 0 failed in phase 'write': OSError: disk full",
        "OSError: disk full",
    ]


def _late(rank: int, folder: str) -> str:
    dist.destroy_process_group()
    store = dist.FileStore(f"{folder}/short", 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2)
    )
    message = ""
    distributed._store = store  # as `setup` would
    distributed.barrier("start")
    if rank == 0:
        try:
            distributed.barrier("rollout")
        except TimeoutError as error:
            message = str(error)
    else:
        time.sleep(5)
    dist.destroy_process_group()
    distributed._store = None
    store = dist.FileStore(f"{folder}/end", 2)  # for the helper's own last barrier
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    return message


def test_a_wait_has_a_deadline_and_names_phase_and_ranks(tmp_path):
    message = run_ranks(_late, 2, str(tmp_path))[0]
    assert message.startswith(
        "rank 0 of 2 waited too long for the other ranks in phase 'rollout'; rank 1 is missing, "
        "and was last seen in phase 'start'; look at their logs for the first error ("
    )


@pytest.mark.slow
def test_setup_under_torchrun(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "from torchrft.tools import distributed as d\n"
        "w = d.setup(60.)\n"
        "total = d.DataRanks.all().sum({'x': w.rank + 1.}, 'p')['x']\n"
        "names = d.DataRanks.all().gather((w.rank, w.local_rank, w.world_size, total))\n"
        "if w.is_main: print(names)\n"
        "d.teardown()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node=2", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "[(0, 0, 2, 3.0), (1, 1, 2, 3.0)]" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_setup_on_cuda_reduces_cpu_and_cuda_tensors(alone):
    world = distributed.setup(30.0)
    assert world.device == torch.device("cuda", 0)
    for device in ("cpu", "cuda"):
        tensor = torch.ones(2, device=device)
        dist.all_reduce(tensor)
        assert tensor.tolist() == [1.0, 1.0]

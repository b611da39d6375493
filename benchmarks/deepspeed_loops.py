"""Training loops of public form on DeepSpeed and on torchrft.deepspeed: losses and weights agree.

    pip install deepspeed==0.19.8          # for the comparison; recorded figures need none
    OMP_NUM_THREADS=1 python benchmarks/deepspeed_loops.py [--record FILE]

Every loop runs with 1 and 2 gloo ranks in stages 0 to 3, in float32 on the CPU. The table has the
largest difference of losses (means over ranks) and of final weights, or the sentence with which
torchrft refuses a loop. `--record` writes the file that the tests compare with,
tests/assets/deepspeed_loops.json.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed_programs  # noqa: F401
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import table
from deepspeed_cases import LOOPS
from torch import Tensor

RECORDED = Path(__file__).parents[1] / "tests" / "assets" / "deepspeed_loops.json"
TIMEOUT = timedelta(seconds=40)  # a rank that waits for another one in vain
FORGETS = "DeepSpeed forgets such a change at the next step"
SHARDS = "DeepSpeed's stage 3 has nothing there to change; shards are changed here"
LAST = "DeepSpeed trains on the gradients of the last backward() alone"
ON_PURPOSE = {
    ("unused_every_other_step", 3): "DeepSpeed's stage 3 trains on the gradient of the step before",
    **{("loss_of_the_model", s): "DeepSpeed divides by the micro-batches twice" for s in (1, 2)},
    **{
        (name, s): LAST
        for name in ("two_losses_of_one_pass", "two_passes_per_step")
        for s in (1, 2)
    },
    ("pass_of_the_module", 3): "DeepSpeed's stage 3 needs engine(...) for each micro-batch",
    ("only_the_module_loaded", 3): "DeepSpeed's stage 3 then loads no weights",
    **{("changed_between_steps", s): FORGETS for s in (1, 2, 3)},
    **{("loaded_into_the_module", s): FORGETS for s in (1, 2)},
    **{(name, 3): SHARDS for name in ("weights_clamped", "clipped_by_hand", "gradients_changed")},
}
"""Where torchrft differs from DeepSpeed 0.19.8, and why."""


def weights(engines: list[Any]) -> list[float]:
    """All parameters, whole, in their order."""
    values = []
    for parameter in (p for engine in engines for p in engine.module.parameters()):
        with gathered(parameter):
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            values += whole.detach().flatten().tolist()
    return values


@contextlib.contextmanager
def gathered(parameter: Tensor) -> Iterator[None]:
    if hasattr(parameter, "ds_id") and not hasattr(parameter, "full_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter):
            yield
    else:
        yield


def rank_main(rank: int, ranks: int, library: str, cases: list[Any], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    if library == "deepspeed":
        import deepspeed
    else:
        from torchrft import deepspeed
    results = {}
    for name, stage in cases:
        engines: list[Any] = []
        try:
            losses = LOOPS[name](deepspeed, stage, engines, f"{folder}/{name}-{stage}")
            results[name, stage] = losses, weights(engines)
        except Exception as error:
            results[name, stage] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    Path(folder, f"result-{rank}").write_bytes(pickle.dumps(results))
    dist.barrier()
    os._exit(0)  # DeepSpeed's destructors may wait for each other


def run(library: str, ranks: int, cases: list[Any]) -> dict[Any, Any]:
    """By case: losses, means over ranks, and rank 0's weights; or what was raised.

    Where a library aborts the processes, the halves of the cases run by themselves.
    """
    try:
        return run_together(library, ranks, cases)
    except (mp.ProcessExitedException, mp.ProcessRaisedException, FileNotFoundError) as error:
        if len(cases) == 1:
            return {cases[0]: f"aborts ({type(error).__name__})"}
        half = len(cases) // 2
        return run(library, ranks, cases[:half]) | run(library, ranks, cases[half:])


def run_together(library: str, ranks: int, cases: list[Any]) -> dict[Any, Any]:
    """As `run`, in one group of processes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, library, cases, folder)
        mp.start_processes(rank_main, args=arguments, nprocs=ranks, start_method="spawn")
        results = [pickle.loads(Path(folder, f"result-{r}").read_bytes()) for r in range(ranks)]
    means = {}
    for case in cases:
        one = results[0][case]
        if not isinstance(one, str):
            pairs = zip(*(result[case][0] for result in results), strict=True)
            one = [sum(pair) / ranks for pair in pairs], one[1]
        means[case] = one
    return means


def largest_difference(one: list[float], other: list[float]) -> float:
    """Infinite for lists of different lengths."""
    if len(one) != len(other):
        return float("inf")
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def compare(mine: Any, theirs: Any) -> str:
    """The largest differences of losses and weights, or who refused."""
    if isinstance(mine, str):
        both = " (DeepSpeed too)" if isinstance(theirs, str) else ""
        return f"refused{both}: {mine}"
    if isinstance(theirs, str):
        return f"runs; DeepSpeed: {theirs}"
    return " / ".join(f"{largest_difference(*pair):.0e}" for pair in zip(mine, theirs, strict=True))


def pack(figures: dict[str, Any]) -> dict[str, Any]:
    """By "loop ranks stage"; the number of an earlier stage where that gave the same figures."""
    packed: dict[str, Any] = {}
    for key, value in figures.items():
        case, _, stage = key.rpartition(" ")
        packed[key] = value
        if isinstance(value, str):
            continue
        packed[key] = [[round(x, 6) for x in values] for values in value]
        for earlier in reversed(range(int(stage))):
            other = figures.get(f"{case} {earlier}", "")
            pairs = () if isinstance(other, str) else zip(value, other, strict=True)
            if pairs and max(largest_difference(*pair) for pair in pairs) <= 2e-6:
                packed[key] = earlier
    return packed


def unpack(packed: dict[str, Any]) -> dict[str, Any]:
    """What `pack` was given, to six digits."""
    figures: dict[str, Any] = {}
    for key, value in packed.items():
        same = f"{key.rpartition(' ')[0]} {value}"
        figures[key] = figures[same] if isinstance(value, int) else value
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loops", nargs="*", default=list(LOOPS), choices=list(LOOPS))
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--stages", nargs="*", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--record", type=Path, help="write DeepSpeed's figures there")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    has_peer = importlib.util.find_spec("deepspeed") is not None
    recorded = {} if has_peer else json.loads(RECORDED.read_text())
    recorded_loops = unpack(recorded.get("loops", {}))
    version = importlib.metadata.version("deepspeed") if has_peer else recorded["deepspeed"]
    print(f"torch {torch.__version__}, DeepSpeed {version}{'' if has_peer else ' (recorded)'}")
    cases = [(name, stage) for name in options.loops for stage in options.stages]
    rows, figures = [], {}
    for ranks in options.ranks:
        mine = run("torchrft", ranks, cases)
        theirs = run("deepspeed", ranks, cases) if has_peer else {}
        for name, stage in cases:
            key = f"{name} {ranks} {stage}"
            peer = theirs[name, stage] if has_peer else recorded_loops[key]
            figures[key] = peer
            verdict = compare(mine[name, stage], peer)
            if (name, stage) in ON_PURPOSE:
                verdict += f" ({ON_PURPOSE[name, stage]})"
            rows.append([name, str(ranks), str(stage), verdict])
    print(table(["loop", "ranks", "stage", "largest difference of losses / weights"], rows))
    if options.record:
        whole = {"deepspeed": version, "torch": torch.__version__, "loops": pack(figures)}
        options.record.write_text(json.dumps(whole) + "\n")


if __name__ == "__main__":
    main()

"""The table of docs/models.md: every family in every way, held to transformers' own forward.

`python tests/families.py --table > table.md` makes it; names after `--table` choose families.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import torch
from helpers import run_ranks
from tiny import batch
from torch import Tensor

from torchrft.checkpoint.hf_export import export_hf
from torchrft.config.job_config import Parallel
from torchrft.learn.packing import build as micro_batch
from torchrft.models.loader import load_config, load_model
from torchrft.models.policy import PolicyModel
from torchrft.models.sharded import ShardedWeights
from torchrft.models.support import refuse_unsupported
from torchrft.parallel import ParallelDims, parallelize
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

COLUMNS = ("padded", "packed", "native", "fsdp", "tp", "sp", "export")
SPLITS = {
    "fsdp": ParallelDims(dp_shard=2),
    "tp": ParallelDims(tp=2),
    "sp": ParallelDims(sp=2),
}
LOG_PROBS, GRADIENTS = 2e-5, 1e-4  # nats; relative to a parameter's largest gradient
# Families whose own decode step is off their own forward by more (transformers 5.23).
OWN_STEP = {"nemotron_h": 5e-4}


@dataclass
class Row:
    """Cells by column, and the sentences of those that say no."""

    cells: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def put(self, column: str, value: float | str, limit: float = LOG_PROBS) -> None:
        if isinstance(value, str):
            self.cells[column], self.reasons[column] = "no", value
        else:
            self.cells[column] = f"{value:.0e}" if value < limit else f"**{value:.0e}**"


def samples() -> tuple[Any, list[int]]:
    whole = batch(families.GROUPS)
    return whole, list(range(len(whole)))


def trained(built: Any, folder: Path, packed: bool) -> tuple[float, float]:
    """Largest differences of log-probs, and of gradients relative to each parameter's largest."""
    whole, rows = samples()
    built.zero_grad()
    wanted = families.expected(built, gradients=True)
    wanted.sum().backward()
    policy = PolicyModel(load_model(str(folder)).eval())
    got = policy(micro_batch(whole, rows, packed))[0]
    got.sum().backward()
    ours: Any = dict(policy.model.named_parameters())
    worst = 0.0
    for name, parameter in built.named_parameters():
        if parameter.grad is not None and (size := float(parameter.grad.abs().max())) > 1e-5:
            worst = max(worst, float((ours[name].grad - parameter.grad).abs().max()) / size)
    return float((got - wanted).abs().max()), worst


def sampled(built: Any, folder: Path) -> float | str:
    """The largest difference of the native engine's log-probs; its tokens are `generate`'s."""
    try:
        engine = NativeEngine(load_config(str(folder)), families.tokenizer(), (1,))
    except ValueError as error:
        return str(error)
    engine.update_weights(named_full_tensors(built), version=0)
    prompts = [Prompt(row=i, text="", token_ids=ids) for i, ids in enumerate(families.PROMPTS)]
    completions = engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=12))
    worst = 0.0
    for ids, completion in zip(families.PROMPTS, completions, strict=True):
        options = {"do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
        try:
            own = built.generate(torch.tensor([ids]), max_new_tokens=12, **options)[0, len(ids) :]
        except Exception as error:  # a family's code may raise anything
            return f"its own `generate` fails: {type(error).__name__}"
        if list(completion.token_ids) != own.tolist():
            return "its greedy tokens are other ones than those of `generate`"
        whole = torch.tensor([*ids, *completion.token_ids])
        alone = families.alone(built, whole, len(ids))
        worst = max(worst, float((torch.tensor(completion.logprobs) - alone).abs().max()))
    return worst


def over_ranks(rank: int, folders: list[str], way: str) -> list[Tensor | str]:
    """For `run_ranks`: log-probs of each folder's model over two ranks, or why there are none."""
    whole, rows = samples()
    results: list[Tensor | str] = []
    for folder in folders:
        try:
            weights = ShardedWeights.of(folder)
            loaded: Any = weights.model(torch.float32) if weights else load_model(folder)
            policy = PolicyModel(loaded.eval())
            parallelize(policy, SPLITS[way], Parallel(), torch.float32)
            if weights is not None:
                weights.fill(policy, torch.device("cpu"))
            with torch.no_grad():
                results.append(policy(micro_batch(whole, rows, True))[0])
            if way == "fsdp":
                out = Path(folder, "export")
                out.mkdir(exist_ok=True)
                export_hf(policy.model, families.tokenizer(), out, torch.float32)
        except Exception as error:  # the same on both ranks
            results.append(" ".join(str(error).split()) or repr(error))
    return results


def table(chosen: list[str], root: Path) -> tuple[dict[str, Row], dict[str, str]]:
    """Rows of the families that are trained, and the sentences that refuse the others."""
    rows: dict[str, Row] = {}
    refused: dict[str, str] = {}
    models: dict[str, Any] = {}
    for name in chosen:
        try:
            refuse_unsupported(families.config(name))
        except ValueError as error:
            refused[name] = str(error)
            continue
        built, row = families.model(name), Row()
        rows[name], models[name] = row, built
        folder = root / str(len(models) - 1)
        built.save_pretrained(folder)
        for column in ("padded", "packed"):
            logprobs, gradients = trained(built, folder, column == "packed")
            row.put(column, logprobs)
            row.cells[column] += f", {gradients:.0e}" if gradients < GRADIENTS else " **wrong**"
        row.put("native", sampled(built, folder), OWN_STEP.get(name, LOG_PROBS))
        print(name, row.cells, file=sys.stderr, flush=True)
    folders = [str(root / str(number)) for number in range(len(models))]
    for way in SPLITS:
        for name, result in zip(models, run_ranks(over_ranks, 2, folders, way)[0], strict=True):
            wanted = families.expected(models[name])
            is_text = isinstance(result, str)
            rows[name].put(way, result if is_text else float((result - wanted).abs().max()))
    for (name, built), folder in zip(models.items(), folders, strict=True):
        if rows[name].cells["fsdp"] == "no":
            rows[name].put("export", rows[name].reasons["fsdp"])
        else:
            rows[name].put("export", families.exported(Path(folder), built))
    return rows, refused


def text(rows: dict[str, Row], refused: dict[str, str]) -> str:
    """The tables in Markdown."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(row.cells[column] for column in COLUMNS)} |")
    lines += ["", "## Why not", "", "| family | way | the sentence |", "|---|---|---|"]
    for name, row in rows.items():
        lines += [f"| {name} | {way} | {why} |" for way, why in row.reasons.items()]
    lines += ["", "## Refused", "", "| family | the sentence |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {why} |" for name, why in refused.items())])


def main(chosen: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(text(*table(chosen or families.names(), Path(folder))))

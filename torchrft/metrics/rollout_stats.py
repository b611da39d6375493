"""Metrics and dump rows of a rollout's samples."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torchrft.tools.logging import logger
from torchrft.types import Completion, Sample


def rollout_metrics(samples: Sequence[Sample], version: int | None = None) -> dict[str, float]:
    """Rewards, their parts and response lengths over `samples`, which must not be empty.

    Parts and metrics of rewards are means over the samples that have them; errors are counted.

    With `version`, the policy's, also `rollout/staleness`: by how many versions the oldest is late.

    Fillers do not count, unless there is nothing else.
    `reward/std` is the population's; lengths are in tokens; `response/truncated_ratio` is the share
    of responses that the length limit cut off.
    """
    samples = [sample for sample in samples if not sample.filler] or samples
    rewards = [sample.score.value for sample in samples]
    lengths = [len(sample.completion.token_ids) for sample in samples]
    truncated = [sample.completion.finish_reason == "length" for sample in samples]
    metrics = {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "response_length/mean": statistics.fmean(lengths),
        "response_length/max": float(max(lengths)),
        "response/truncated_ratio": statistics.fmean(truncated),
    }
    if version is not None:
        oldest = min(sample.completion.policy_version for sample in samples)
        metrics["rollout/staleness"] = float(version - oldest)
    for name, values in _by_name([sample.score.parts for sample in samples]).items():
        metrics[f"reward_parts/{name}"] = statistics.fmean(values)
    for name, values in _by_name([sample.score.metrics for sample in samples]).items():
        is_count = name.endswith("/errors")
        metrics[f"reward/{name}"] = sum(values) if is_count else statistics.fmean(values)
    return metrics


def _by_name(records: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Each name's values; a reward that does not count for a sample has none there."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record[name] for record in records if name in record] for name in names}


def dump_rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row a sample for rollouts/step-N.jsonl."""
    return [
        {
            "group": sample.group,
            "row": sample.prompt.row,
            "prompt": sample.prompt.text,
            "response": sample.completion.text,
            "label": sample.prompt.label,
            "reward": sample.score.value,
            "reward_parts": dict(sample.score.parts),
            "length": len(sample.completion.token_ids),
            "finish_reason": sample.completion.finish_reason,
            "policy_version": sample.completion.policy_version,
        }
        | _episode(sample.completion)
        for sample in samples
    ]


def _episode(completion: Completion) -> dict[str, Any]:
    """The turns of an episode, and its training rows token by token."""
    if not completion.branches:
        return {}
    rows = [dataclasses.asdict(branch) for branch in completion.branches]
    return {"messages": completion.messages, "fault": completion.fault, "branches": rows}


def warn_of_mismatch(step: int, metrics: Mapping[str, float], alarm: float) -> None:
    """Says so when the engine's log-probs are further than `alarm` from the trainer's."""
    found = metrics.get("mismatch/logprob_abs_mean", 0.0)
    if found > alarm:
        differ = f"the engine's log-probs differ from the trainer's by {found:.3g} on average"
        remedy = f"above mismatch_alarm = {alarm:g}; rollout_correction weighs such samples"
        logger.warning(f"step {step}: {differ}, {remedy}")

"""`advantage_estimator` names a preset: an estimator, a policy loss and an aggregation."""

from __future__ import annotations

from dataclasses import dataclass

from torchrft.config.job_config import Algorithm


@dataclass(frozen=True)
class Preset:
    """The three parts of an algorithm, by their registered names."""

    estimator: str
    policy_loss: str
    loss_aggregation: str


PRESETS = {
    "group_norm": Preset("group_norm", "ppo_clip", "seq_mean_token_mean"),
}


def resolve(config: Algorithm) -> Preset:
    """The preset of `config.advantage_estimator`, with the parts that the config overrides.

    Raises ValueError for a preset that is not there.
    """
    name = config.advantage_estimator
    if name not in PRESETS:
        raise ValueError(
            f'advantage_estimator "{name}" is not available; choose from {", ".join(PRESETS)}'
        )
    preset = PRESETS[name]
    return Preset(
        preset.estimator,
        config.policy_loss or preset.policy_loss,
        config.loss_aggregation or preset.loss_aggregation,
    )

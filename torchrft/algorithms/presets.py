"""`advantage_estimator` names a preset: an estimator, a loss, an aggregation, where the KL goes."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Preset:
    """The components of an algorithm, by their registered names."""

    estimator: str
    policy_loss: str = "ppo_clip"
    loss_aggregation: str = "seq_mean_token_mean"
    kl_placement: str = "loss"


# The guide's first; the config and its docs list them in this order.
PRESETS = {
    "group_norm": Preset("group_norm"),
    "reinforce": Preset("reinforce"),
    "cpgd": Preset("cpgd", "cpgd"),
    "gspo": Preset("gspo", "gspo"),
    "gmpo": Preset("gmpo", "gmpo"),
    "rloo": Preset("rloo"),
    "reinforce_baseline": Preset("reinforce_baseline"),
    "reinforce_plus_plus": Preset("reinforce_plus_plus", kl_placement="reward"),
    "gae": Preset("gae"),
    "dr_grpo": Preset("dr_grpo", loss_aggregation="seq_mean_token_sum_norm"),
    "dapo": Preset("dapo", loss_aggregation="token_mean"),
    "cispo": Preset("cispo", "cispo", "token_mean"),
}


def resolve(estimator: str, **overrides: str | None) -> Preset:
    """The preset of `estimator`, with the fields that `overrides` set.

    An estimator that is no preset (a user's own) goes with the fields of group_norm.
    """
    chosen = {name: value for name, value in overrides.items() if value is not None}
    return replace(PRESETS.get(estimator, Preset(estimator)), **chosen)

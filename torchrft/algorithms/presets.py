"""`advantage_estimator` names a preset: an estimator, a loss, an aggregation, where the KL goes."""

from dataclasses import dataclass, replace

from torchrft.config.job_config import Algorithm


@dataclass(frozen=True)
class Preset:
    """The parts of an algorithm, by their registered names."""

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


def resolve(config: Algorithm) -> Preset:
    """The preset of `config.advantage_estimator`, with the parts that the config overrides.

    An estimator that is no preset (a user's own) goes with the parts of group_norm.
    """
    name = config.advantage_estimator
    preset = PRESETS.get(name, Preset(name))
    overrides = {
        part: value
        for part in ("policy_loss", "loss_aggregation", "kl_placement")
        if (value := getattr(config, part)) is not None
    }
    return replace(preset, **overrides)

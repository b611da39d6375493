"""What this version cannot run yet, and what a real run needs beyond a valid config.

Both stop a real run; a dry run only notes them. When a feature lands, delete its line (or add its
value to the line) here and name the test that proves it in tests/unit/test_config_fields.py.
"""

from __future__ import annotations

from torchrft.config.fields import is_set, label, show, value_of
from torchrft.config.job_config import JobConfig

# The values of a field that work today; every other value is refused.
AVAILABLE_VALUES: dict[str, tuple[object, ...]] = {
    "engine_type": ("native",),
    "engine_tp_size": (1,),
    "reward_pretrain": (None,),
    "remote_rm_url": ([],),
    "rm_use_engine": (False,),
    "images_key": (None,),
    "mixed_mm_data": (False,),
    "processor": (None,),
}


def unavailable(config: JobConfig) -> list[str]:
    """What the config selects and this version cannot run yet, a sentence each."""
    found = []
    for name, values in AVAILABLE_VALUES.items():
        if value_of(config, name) in values:
            continue
        usable = [f"use {show(value)}" for value in values if value not in (None, [])]
        remedy = " or ".join(usable) or "leave it out"
        default = "" if is_set(config, name) else " (the default)"
        found.append(
            f"{label(config, name)}{default} is not available yet in this version; {remedy}"
        )
    return found


def missing(config: JobConfig) -> list[str]:
    """What a real run needs and the config does not name, a sentence each."""
    found = []
    if config.data.prompt_data is None:
        found.append(
            "[data] prompt_data is missing; a run needs training prompts: --prompt_data FILE.jsonl"
        )
    reward = config.reward
    if not (
        reward.functions or reward.reward_pretrain or reward.remote_rm_url or reward.rm_use_engine
    ):
        found.append(
            "[reward] functions is missing; a run needs a reward: --functions exact_match, "
            "reward_pretrain or remote_rm_url"
        )
    return found

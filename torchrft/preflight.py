"""What a job needs from files and the environment: looked at before anything is started.

Imports no torch, so that a dry run stays fast. Hub ids are left to the hub.
"""

import netrc
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
from torchrft.tools.http import bearer_token

_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer*", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def job_faults(config: JobConfig) -> list[str]:
    """A sentence for each file, folder, function and key that the job could not use."""
    checks = (_prompts, _models, _functions, _written, _checkpoint, _wandb, _tokens)
    faults: list[str] = []
    for check in checks:
        faults += _fault(faults.extend, check(config))
    return faults + reward_faults(config)


def _fault(check: Callable[..., object], *arguments: object) -> list[str]:
    try:
        check(*arguments)
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def _prompts(config: JobConfig) -> Iterator[str]:
    data, required = config.data, [config.data.input_key, *config.data.metadata_keys]
    sources = {"prompt_data": data.prompt_data, "eval_data": config.evaluation.eval_data}
    for name, source in sources.items():
        if source is not None:
            yield from (f"{name}: {text}" for text in _fault(glance, source, required))


def _models(config: JobConfig) -> Iterator[str]:
    """Folders of models: `[what, folder, does it need weights, does it need a tokenizer]`."""
    model, reward = config.model, config.reward
    named: list[tuple[str, str | None, bool, bool]]
    named = [(label(config, "pretrain"), model.pretrain, model.init == "pretrained", True)]
    for name in ("ref_pretrain", "critic_pretrain"):
        named.append((label(config, name), getattr(model, name), True, False))
    if config.data.processor is not None:
        yield from _folder_faults(label(config, "processor"), config.data.processor)
    for entry in reward.scalar_models(""):
        what = f'[reward] model "{entry.pretrain}"'
        named.append((what, entry.pretrain or None, True, entry.tokenizer is None))
        if entry.tokenizer is not None:
            yield from _folder_faults(f'{what}: tokenizer = "{entry.tokenizer}"', entry.tokenizer)
    for judge in reward.judges:
        what = f'[reward] judge "{judge.name}": pretrain = "{judge.pretrain}"'
        named.append((what, judge.pretrain, True, True))
    for what, source, weights, tokenizer in named:
        if source is not None:
            yield from _folder_faults(what, source, weights, tokenizer)


def _folder_faults(
    what: str, source: str, weights: bool | None = None, tokenizer: bool = True
) -> Iterator[str]:
    """What a folder lacks; `weights` is None for one that need not hold a model."""
    folder = Path(source)
    if not folder.is_dir():
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) or folder.exists():
            yield f"{what}: no such folder, and no hub id, which is owner/name"
        return
    if weights is not None and not (folder / "config.json").is_file():
        yield f"{what}: the folder holds no config.json"
    if weights and not any(path for form in _WEIGHTS for path in folder.glob(form)):
        remedy = '; [model] init = "random" makes fresh ones' if " pretrain" in what[:16] else ""
        yield f"{what}: the folder holds no weights (.safetensors or .bin){remedy}"
    if weights and (index := folder / "model.safetensors.index.json").is_file():
        names = set(re.findall(r'"([^"/]+\.safetensors)"', index.read_text(errors="replace")))
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            yield f"{what}: the folder lacks {missing[0]}, 1 of {len(missing)} files of its index"
    if tokenizer and not any(path for form in _TOKENIZERS for path in folder.glob(form)):
        yield f"{what}: the folder holds no tokenizer"


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


WRITTEN = {
    "save_path": "checkpoint",
    "log_dir": "logging",
    "use_tensorboard": "logging",
    "weight_folder": "rollout",
}
"""Fields that name a folder to write to, with their sections."""


def _checkpoint(config: JobConfig) -> Iterator[str]:
    options = config.checkpoint
    begun = Path(options.save_path, "checkpoints").is_dir()  # then the job may go on without it
    if options.load_checkpoint and options.ckpt_path is not None and not begun:
        forms = [f"{place}manifest.json" for place in ("", "step-*/", "checkpoints/step-*/")]
        if not any(path for form in forms for path in Path(options.ckpt_path).glob(form)):
            yield f"{label(config, 'ckpt_path')}: no complete checkpoint is there"


def _wandb(config: JobConfig) -> Iterator[str]:
    if config.logging.use_wandb is None:
        return
    what = label(config, "use_wandb")
    if find_spec("wandb") is None:
        yield f"{what} needs the package wandb: pip install 'torchrft[wandb]'"
    given = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DISABLED")
    settings = [Path("wandb/settings"), Path("~/.config/wandb/settings").expanduser()]
    texts = [path.read_text(errors="replace") for path in settings if path.is_file()]
    mode = os.environ.get("WANDB_MODE", "offline" if "= offline" in "".join(texts) else "online")
    online = mode in ("online", "run", "shared")
    if online and not any(map(os.environ.get, given)) and not _in_netrc():
        remedy = "run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
        yield f"{what} needs a key of Weights & Biases: {remedy}"


def _in_netrc() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if name and netrc.netrc(Path(name).expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _tokens(config: JobConfig) -> Iterator[str]:
    reward = config.reward
    named = {"[reward] remote_rm_token_env": reward.remote_rm_token_env}
    named |= {
        f"[reward] judge {judge.name!r}: token_env": judge.token_env for judge in reward.judges
    }
    for option, variable in named.items():
        yield from _fault(bearer_token, variable, option)

"""Whose code may run, and why a model or dataset of the Hugging Face hub could not be read."""

from collections.abc import Iterable
from pathlib import Path

_TRUSTED: set[str] = set()  # folders and hub ids


def trust_code_of(sources: Iterable[str]) -> None:
    """From now on, in this process, Python code that comes with these models may run: theirs alone.

    Args: sources, the folders and hub ids whose tables say `trust_remote_code = true`.
    """
    _TRUSTED.clear()
    _TRUSTED.update(sources)


def trusts_code_of(source: str | None) -> bool:
    """What every loader passes on as `trust_remote_code`. Unset, transformers asks at the terminal,
    and runs the code when told yes."""
    return source in _TRUSTED


def hub_fault(source: str, error: BaseException, kind: str = "model") -> str | None:
    """A sentence with the remedy, or None where `source` was reached and its content is at fault.

    Args: source, folder or hub id; error, as `transformers` or `datasets` raised it; kind, "model"
    or "dataset".
    """
    from huggingface_hub import is_offline_mode

    chain = [error]  # libraries wrap what the hub said in errors of their own
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    if kind == "model" and any("trust_remote_code" in str(one) for one in chain):
        return (
            f'"{source}" needs Python code that comes with it, which does not run unasked: read '
            "it, then set trust_remote_code = true in the table that names the model ([model], or "
            "an entry of [reward] models or judges)"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return None
    if path.is_file() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        return f'"{source}" is no folder here: correct the path'
    names = {base.__name__ for one in chain for base in type(one).__mro__}
    page, option = ("datasets/", "--repo-type dataset ") if kind == "dataset" else ("", "")
    if "GatedRepoError" in names or "gated dataset" in str(error):
        why = f"is gated: accept its terms at https://huggingface.co/{page}{source}"
        return f'the {kind} "{source}" {why} and log in by `hf auth login` (or HF_TOKEN)'
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}:
        why = "on the hub for this user: check the spelling; if it is private, `hf auth login`"
        return f'"{source}" is neither a folder here nor a {kind} {why}'
    if names & {"ConnectionError", "TransportError", "LocalEntryNotFoundError"}:
        why = "HF_HUB_OFFLINE is set: unset it" if is_offline_mode() else "the hub is out of reach"
        why = f"{why}, or run `hf download {option}{source}` where there is a network"
        return f'the {kind} "{source}" is no folder here and not in the cache, and {why}'
    if "HfHubHTTPError" in names and "EntryNotFoundError" not in names:
        said = " ".join(str(chain[-1]).split())[:200]
        return f'the hub does not hand out the {kind} "{source}": {said}'
    return None

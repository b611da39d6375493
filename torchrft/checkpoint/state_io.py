"""A nested state dict to and from a folder of torch.distributed.checkpoint (DCP) files.

Tensors and DTensors are saved under their path ("model/lm_head.weight") and loaded in place, so
any number of ranks reads what any other number wrote. Everything else becomes JSON: a dict without
a tensor in it counts as one object, because its keys may differ from one save to the next. A key
`rank<N>` marks what belongs to one rank; all other objects are equal on all ranks and are rank 0's.
"""

import re
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchrft.checkpoint.dcp_files import LoadPlanner, Planner, Reader, Writer, calling_dcp
from torchrft.tools.distributed import is_main, on_all
from torchrft.tools.logging import logger

Tree = dict[Any, Any]
Leaves = dict[str, tuple[Tree, Any]]

RANK_KEY = re.compile(r"rank\d+")
MAX_FAULTS_SHOWN = 10


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` into `folder`. Every rank must call it.

    Raises:
        ValueError: a key is not a plain string or integer, two keys give the same path, or an
            object is no plain data.
    """
    mine = {
        path: container[key]
        for path, (container, key) in _leaves(state).items()
        if is_main() or isinstance(container[key], Tensor) or _belongs_to_rank(path)
    }
    planner = Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with calling_dcp():
        dcp.save(mine, storage_writer=Writer(folder), planner=planner)


def load_state(folder: Path, state: dict[str, Any]) -> None:
    """Load into `state` in place: tensors are overwritten, objects replaced. All ranks call it.

    Top-level keys that `state` lacks are not read. What belongs to a rank that did not exist when
    the checkpoint was saved stays as it is in `state`.

    Raises:
        ValueError: the checkpoint's keys, shapes or dtypes differ from those of `state`; every
            difference is listed (up to ten). Or a file is damaged or was forged.
    """
    reader, leaves = Reader(folder), _leaves(state)

    def compare() -> list[str]:
        saved = reader.read_metadata().state_dict_metadata
        for path in [path for path in leaves if _belongs_to_rank(path) and path not in saved]:
            logger.info("%s is not in the checkpoint; it starts afresh", path)
            del leaves[path]
        return _faults(leaves, {str(key) for key in state}, saved)

    for faults in on_all(compare, "compare checkpoint"):
        if faults:
            raise ValueError(_describe(folder, faults))
    flat = {path: container[key] for path, (container, key) in leaves.items()}
    planner = LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with calling_dcp():
        dcp.load(flat, storage_reader=reader, planner=planner)
    for path, (container, key) in leaves.items():
        container[key] = flat[path]


def _leaves(tree: Tree, prefix: str = "") -> Leaves:
    """Path -> (dict that holds the leaf, its key there), in the order of the tree."""
    leaves: Leaves = {}
    for key, value in tree.items():
        if type(key) not in (str, int):
            raise ValueError(f"checkpoint key {prefix}{key!r} must be a string or an integer")
        path = f"{prefix}{key}"
        found = _leaves(value, f"{path}/") if _is_tree(value) else {path: (tree, key)}
        if twice := leaves.keys() & found.keys():
            raise ValueError(f"two checkpoint keys give the path {min(twice)!r}")
        leaves.update(found)
    return leaves


def _is_tree(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(item, Tensor) or RANK_KEY.fullmatch(str(key)) or _is_tree(item)
        for key, item in value.items()
    )


def _belongs_to_rank(path: str) -> bool:
    return any(RANK_KEY.fullmatch(part) for part in path.split("/"))


def _faults(leaves: Leaves, sections: set[str], saved: dict[str, Any]) -> list[str]:
    faults = [f"{path} is not in the checkpoint" for path in leaves if path not in saved]
    for path, entry in saved.items():
        if path in leaves:
            container, key = leaves[path]
            if (fault := _misfit(path, container[key], entry)) is not None:
                faults.append(fault)
        elif path.split("/")[0] in sections and not _belongs_to_rank(path):
            faults.append(f"{path} is only in the checkpoint")
    return faults


def _misfit(path: str, value: Any, entry: Any) -> str | None:
    if isinstance(value, Tensor) != isinstance(entry, TensorStorageMetadata):
        return f"{path} is a tensor in one of the two, an object in the other"
    if not isinstance(value, Tensor):
        return None
    shapes, dtypes = (list(entry.size), list(value.shape)), (entry.properties.dtype, value.dtype)
    for what, (old, new) in (("shape", shapes), ("dtype", dtypes)):
        if old != new:
            return f"{path} has {what} {old} in the checkpoint, {new} in this run"
    return None


def _describe(folder: Path, faults: list[str]) -> str:
    shown = faults[:MAX_FAULTS_SHOWN]
    if len(faults) > len(shown):
        shown.append(f"... and {len(faults) - len(shown)} more")
    remedy = "resume with the model and optimizer options it was saved with"
    return "\n  ".join([f"checkpoint {folder} does not fit this run ({remedy}):", *shown])

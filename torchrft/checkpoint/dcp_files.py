"""Files of torch.distributed.checkpoint (DCP), written and read without running what they hold.

DCP pickles its `.metadata`, and every object. Here objects are JSON (objects.py), and the metadata
is read by an unpickler that admits only the classes that DCP writes there.
"""

import dataclasses
import io
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what DCP writes down
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import WriteItemType

from torchrft.checkpoint import objects
from torchrft.tools.disk import writing

DATA_FILE = re.compile(r"__[0-9]+_[0-9]+\.distcp")
_CLASSES = (
    *(dcp.BytesStorageMetadata, dcp.ChunkStorageMetadata, dcp.TensorStorageMetadata),
    *(dcp.Metadata, MetadataIndex, StorageMeta, TensorProperties, _StorageInfo),
)
_ADMITTED = {(kind.__module__, kind.__name__) for kind in _CLASSES} | {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *((f"pathlib{module}", "PosixPath") for module in ("", "._local")),
}


class DamagedError(ValueError):
    """`path` does not hold what a checkpoint holds there, as `error` says."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(path, error)  # so that it travels to other ranks
        text = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "bring it back, or take an earlier checkpoint, or one whose origin you trust"
        self.text = f"{path} is damaged or was forged ({text:.300}); {remedy}"

    def __str__(self) -> str:
        return self.text


@contextmanager
def reading(path: Path, faults: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Raises DamagedError for `faults` that a damaged or forged `path` leads to, but for an
    OSError, which is the disk's."""
    try:
        yield
    except OSError:
        raise
    except faults as error:
        reason = ValueError(f"it lacks {error}") if isinstance(error, LookupError) else error
        raise DamagedError(path, reason) from None


class Planner(dcp.DefaultSavePlanner):
    """Writes objects as JSON. Raises ValueError for one that JSON cannot hold, naming its path."""

    def transform_object(self, write_item: dcp.WriteItem, object: Any) -> Any:
        if write_item.type != WriteItemType.BYTE_IO:
            return super().transform_object(write_item, object)
        try:
            return io.BytesIO(objects.dumps(object))
        except ValueError as error:
            raise ValueError(f"{write_item.index.fqn}: {error}") from None


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Reads objects that are JSON, or what earlier versions pickled."""

    def load_bytes(self, read_item: dcp.ReadItem, value: io.BytesIO) -> None:
        name, content = read_item.dest_index.fqn, objects.loads(value.getvalue())
        *parents, key = self.mappings[name] if self.flatten_state_dict else (name,)
        tree: Any = self.original_state_dict if self.flatten_state_dict else self.state_dict
        for parent in parents:
            tree = tree[parent]
        if not self.flatten_state_dict:
            objects.check_kind(content, tree[key], name)
        tree[key] = content


class Writer(dcp.FileSystemWriter):
    """Raises OSError for a disk's fault, which torch's writer hides, before DCP tells all ranks."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        with writing(Path(self.path)):
            return super().write_data(plan, planner)


class Reader(dcp.FileSystemReader):
    """Raises DamagedError for a file that does not hold what DCP writes there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        path = Path(self.path) / ".metadata"
        with reading(path), path.open("rb") as file:
            metadata: dcp.Metadata = _Unpickler(file).load()
            _check(metadata)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future[None]:
        by_file: dict[str, list[dcp.ReadItem]] = {}
        for item in plan.items:
            with reading(Path(self.path) / ".metadata"):  # it may not say where a tensor lies
                name = self.storage_data[item.storage_index].relative_path
            by_file.setdefault(name, []).append(item)
        for name, items in by_file.items():
            with reading(Path(self.path) / name):
                super().read_data(dataclasses.replace(plan, items=items), planner)
        return super().read_data(dataclasses.replace(plan, items=[]), planner)  # which is done


class _Unpickler(pickle._Unpickler):  # the C one does not show what BUILD changes
    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        """Sets attributes of admitted objects alone; those of a class would be everybody's."""
        if type(self.stack[-2]) not in _CLASSES:
            raise pickle.UnpicklingError("it sets attributes of what is no part of a checkpoint")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def _check(metadata: Any) -> None:
    """Raises ValueError for a content that DCP does not write, a path outside the folder say."""
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    good = type(metadata) is dcp.Metadata and type(entries) is type(places) is dict
    good = good and {*map(type, entries)} <= {str} and {*map(type, places)} <= {MetadataIndex}
    good = good and {*map(type, entries.values())} <= {*_CLASSES}
    tensors = (entry for entry in entries.values() if type(entry) is dcp.TensorStorageMetadata)
    if not (good and all(map(_is_whole, tensors)) and all(map(_is_inside, places.values()))):
        raise ValueError("it holds what no checkpoint holds")


def _is_whole(tensor: dcp.TensorStorageMetadata) -> bool:
    """Whether the chunks have as many dimensions as the tensor, and are as large together."""
    sizes = [tensor.size, *(size for c in tensor.chunks for size in (c.offsets, c.sizes))]
    good = type(tensor.properties.dtype) is torch.dtype and {*map(type, sizes)} == {torch.Size}
    good = good and all(len(s) == len(tensor.size) and min((0, *s)) == 0 for s in sizes)
    return good and sum(c.sizes.numel() for c in tensor.chunks) >= tensor.size.numel()


def _is_inside(place: _StorageInfo) -> bool:
    good = type(place) is _StorageInfo and {type(place.offset), type(place.length)} == {int}
    good = good and min(place.offset, place.length) >= 0
    plain = not getattr(place, "transform_descriptors", None)
    return good and plain and bool(DATA_FILE.fullmatch(place.relative_path))


@contextmanager
def calling_dcp() -> Iterator[None]:
    """Raises what DCP found instead of its CheckpointException, which no `except Exception` sees.

    DCP warns when there is no process group; for a single process that is intended.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None

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
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    WriteItem,
    WriteItemType,
)

from torchrft.checkpoint import objects
from torchrft.tools.disk import writing

DATA_FILE = re.compile(r"__[0-9]+_[0-9]+\.distcp")
_CLASSES = (
    *(BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta),
    *(TensorProperties, TensorStorageMetadata, _StorageInfo),
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
        remedy = "take a checkpoint whose origin you trust, or an earlier one"
        self.text = f"{path} is damaged or was forged ({text:.300}); {remedy}"

    def __str__(self) -> str:
        return self.text


class Planner(dcp.DefaultSavePlanner):
    """Writes objects as JSON. Raises ValueError for one that JSON cannot hold, naming its path."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type != WriteItemType.BYTE_IO:
            return super().transform_object(write_item, object)
        try:
            return io.BytesIO(objects.dumps(object))
        except ValueError as error:
            raise ValueError(f"{write_item.index.fqn}: {error}") from None


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Reads objects that are JSON, or what earlier versions pickled."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name, content = read_item.dest_index.fqn, objects.loads(value.getvalue())
        *parents, key = self.mappings[name] if self.flatten_state_dict else (name,)
        tree: Any = self.original_state_dict if self.flatten_state_dict else self.state_dict
        for parent in parents:
            tree = tree[parent]
        tree[key] = content


class Writer(dcp.FileSystemWriter):
    """Raises OSError for a disk's fault, which torch's writer hides, before DCP tells all ranks."""

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Any:
        with writing(Path(self.path)):
            return super().write_data(plan, planner)


class Reader(dcp.FileSystemReader):
    """Raises DamagedError for a file that does not hold what DCP writes there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
            _check(metadata)
        except OSError:
            raise
        except Exception as error:  # a forged one raises whatever it likes
            raise DamagedError(path, error) from None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            name = self.storage_data[item.storage_index].relative_path
            by_file.setdefault(name, []).append(item)
        for name, items in by_file.items():
            try:
                super().read_data(dataclasses.replace(plan, items=items), planner)
            except OSError:
                raise
            except Exception as error:
                raise DamagedError(Path(self.path) / name, error) from None
        done = torch.futures.Future[None]()
        done.set_result(None)
        return done


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
    good = type(metadata) is Metadata and type(entries) is type(places) is dict
    for name, entry in entries.items() if good else ():
        good = good and type(name) is str and type(entry) in _CLASSES
        if type(entry) is TensorStorageMetadata:
            good = good and type(entry.properties.dtype) is torch.dtype
            sizes = [entry.size, *(size for c in entry.chunks for size in (c.offsets, c.sizes))]
            good = good and all(type(size) is torch.Size for size in sizes)
    for index, place in places.items() if good else ():
        good = good and type(index) is MetadataIndex and type(place) is _StorageInfo
        good = good and {type(place.offset), type(place.length)} == {int}
        good = good and bool(DATA_FILE.fullmatch(place.relative_path))
        good = good and not getattr(place, "transform_descriptors", None)
    if not good:
        raise ValueError("it holds what no checkpoint holds")


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

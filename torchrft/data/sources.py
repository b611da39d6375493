"""Raw rows of a prompt source, each with the place it came from.

JSON is read line by line in Python: through Arrow, a file whose labels are now 1 and now "1" is
refused, and dictionaries come back with each other's keys. Everything else goes through `datasets`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from torchrft.tools.hub import hub_fault
from torchrft.tools.payload import DEEPEST, is_deeper

if TYPE_CHECKING:  # imported where used: it takes a second, and JSON files do without it
    from datasets import Dataset

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
_ROWS_PER_READ = 1000


class Row(NamedTuple):
    """One record: `number` counts from 0, `where` is what an error message says of it."""

    number: int
    where: str
    columns: Mapping[str, Any]


class Columns(NamedTuple):
    """Those that every row must have, and those that rows may have."""

    required: list[str]
    optional: list[str]


class JsonRecords:
    """A .jsonl file (one object a line, blank lines skipped), or the array of a .json file."""

    def __init__(self, path: Path, required: list[str]) -> None:
        self.path, self._required = path, required
        self._seen: dict[str, None] = {}
        self.column_names = self._seen.keys()
        self._array = self._read_array() if path.suffix == ".json" else None
        records = self._lines() if self._array is None else self._array
        self._length = sum(1 for _ in records)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Row]:
        for number, where, record in self._records():
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got {record!r:.80}")
            if is_deeper(record, DEEPEST + 1):
                raise ValueError(f"{where}: nested more than {DEEPEST} deep; store it as text")
            _check_columns(self._required, record, where)
            self._seen.update(dict.fromkeys(record))
            yield Row(number, where, record)

    def _records(self) -> Iterator[tuple[int, str, Any]]:
        if self._array is not None:
            for number, record in enumerate(self._array):
                yield number, f"{self.path}, row {number}", record
            return
        for number, line in self._lines():
            where = f"{self.path}, line {number + 1}"
            yield number, where, _parse_json(line, where)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        # Bytes, because text mode would also break lines at characters that JSON strings may hold.
        with self.path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file) if line.strip())

    def _read_array(self) -> list[Any] | None:
        """The records of a file that starts with "[" (one with JSON lines inside does not)."""
        text = self.path.read_bytes()
        if not text.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return None
        return _parse_json(text, str(self.path))


class Table:
    """A `datasets.Dataset`; only the columns that are asked for are read."""

    def __init__(self, dataset: Dataset, origin: str, columns: Columns) -> None:
        self.origin, self.column_names = origin, list(dataset.column_names)
        _check_columns(columns.required, self.column_names, origin)
        wanted = {*columns.required, *columns.optional}
        dataset = dataset.select_columns([n for n in self.column_names if n in wanted])
        dataset = dataset.with_format(None)  # one that was saved would hand out arrays for lists
        for name, feature in dataset.features.items():
            # As the files have them: `datasets` would open pictures of any format, and a damaged
            # one would end the reading of all rows.
            if (encoded := _undecoded(feature)) != feature:
                dataset = dataset.cast_column(name, encoded)
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Row]:
        names = self._dataset.column_names
        batches = self._dataset.iter(batch_size=_ROWS_PER_READ)
        rows = (row for batch in batches for row in zip(*batch.values(), strict=True))
        for number, values in enumerate(rows):
            columns = dict(zip(names, values, strict=True))
            yield Row(number, f"{self.origin}, row {number}", columns)


RowSource = JsonRecords | Table
"""Rows that can be counted before they are read, and read without holding them all.

Every row has the columns `required`, else reading raises ValueError. `column_names` are those that
exist; of JSON, those seen so far.
"""


def open_source(source: str, columns: Columns, require_split: bool) -> RowSource:
    """The rows of a .jsonl, .json or .parquet file, a dataset folder or a hub id.

    `:split` may follow the source. Without it, `train` is taken, or the only split; with
    `require_split` a source of several splits must say which. Raises ValueError naming
    the source, and the row if one is at fault.
    """
    location, split = split_suffix(source)
    path = Path(location).expanduser()
    rows: RowSource
    if path.suffix in FILE_SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        _choose_split(str(path), ["train"], split, False)
        if path.suffix == ".parquet":
            rows = Table(_load_parquet(path), str(path), columns)
        else:
            rows = JsonRecords(path, columns.required)
    elif path.is_file():
        raise ValueError(f"{path}: expected a file ending in {', '.join(FILE_SUFFIXES)}")
    else:
        splits = _load_splits(location, path)
        name = _choose_split(location, list(splits), split, require_split)
        rows = Table(splits[name], f"{location}:{name}", columns)
    if len(rows) == 0:
        raise ValueError(f"{location}: holds no rows")
    return rows


def glance(source: str, required: list[str]) -> None:
    """Raises ValueError as `open_source` would, for what the first row of a file shows.

    Of a dataset folder only the name is looked at, of the hub nothing.
    """
    location, split = split_suffix(source)
    path = Path(location).expanduser()
    if path.suffix == ".parquet" and path.is_file():
        from pyarrow import parquet  # a tenth of the time of `datasets`

        _choose_split(str(path), ["train"], split, False)
        with _refused(f"{path} is not a readable parquet file"):
            file = parquet.ParquetFile(path)
        _check_columns(required, file.schema_arrow.names, str(path))
        if not file.metadata.num_rows:
            raise ValueError(f"{location}: holds no rows")
    elif path.is_file() or (path.suffix in FILE_SUFFIXES and not path.is_dir()):
        next(iter(open_source(source, Columns(required, []), False)))
    else:
        _check_place(location, path)


def split_suffix(source: str) -> tuple[str, str | None]:
    """Divides "place:split"; a path that exists with its colon is left whole.

    >>> split_suffix("data/gsm8k:test")
    ('data/gsm8k', 'test')
    """
    location, colon, split = source.rpartition(":")
    if not colon or Path(source).expanduser().exists():
        return source, None
    if not location or not split or "/" in split:
        raise ValueError(f"{source!r}: expected a file, folder or hub id, then at most :split")
    return location, split


def describe_columns(name: str, names: Collection[str]) -> str:
    """What there is in place of a missing column, to end a message with."""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}columns are {', '.join(map(repr, names)) or 'none'}"


def _undecoded(feature: Any) -> Any:
    """The feature with its images left encoded."""
    from datasets import Image, LargeList, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List | LargeList):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, dict):  # the parts of a message
        return {name: _undecoded(inner) for name, inner in feature.items()}
    return feature


def _check_columns(required: Iterable[str], names: Collection[str], where: str) -> None:
    for name in required:
        if name not in names:
            raise ValueError(f"{where}: no column {name!r}; {describe_columns(name, names)}")


def _load_parquet(path: Path) -> Dataset:
    from datasets import load_dataset

    with _refused(f"{path} is not a readable parquet file"):
        return load_dataset("parquet", data_files=str(path), split="train")


def _load_splits(location: str, path: Path) -> Mapping[str, Dataset]:
    """A folder, or `owner/name` of the hub, or `owner/name/config` where there are several."""
    _check_place(location, path)
    parts = location.split("/")
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not path.is_dir():
        unknown = "is no file or folder here, and could not be loaded from the Hugging Face hub"
        with _refused(f"{location} {unknown}", hub_id="/".join(parts[:2])):
            return load_dataset("/".join(parts[:2]), *parts[2:])
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    with _refused(f"{path} is not a dataset folder that `datasets` can load"):
        loaded = load_from_disk(str(path)) if saved else load_dataset(str(path))
    return loaded if isinstance(loaded, DatasetDict) else {str(loaded.split or "train"): loaded}


def _check_place(location: str, path: Path) -> None:
    parts = location.split("/")
    if not path.is_dir() and (len(parts) > 3 or not all(parts) or parts[0] in (".", "..", "~")):
        raise ValueError(f"{location}: no such file or folder")


@contextmanager
def _refused(message: str, hub_id: str | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        if error.__cause__ is not None:  # `datasets` wraps what went wrong in a general error
            detail += f" ({type(error.__cause__).__name__}: {error.__cause__})"
        fault = hub_id and hub_fault(hub_id, error, "dataset")
        raise ValueError(fault or f"{message}: {detail}") from error


def _choose_split(location: str, splits: list[str], split: str | None, require_split: bool) -> str:
    if split is not None:
        if split not in splits:
            raise ValueError(f"{location}: no split {split!r}; splits are {', '.join(splits)}")
        return split
    if len(splits) == 1:
        return splits[0]
    if "train" in splits and not require_split:
        return "train"
    # Evaluation never falls back to `train`: that would measure the training prompts.
    example = f"{location}:{splits[-1]}; splits are {', '.join(splits)}"
    raise ValueError(f"{location}: say which split to read, as in {example}")


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error.reason})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply; store it as text") from error
    except ValueError as error:
        raise ValueError(f"{where}: invalid JSON: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

"""Data sets opened without being read into memory: any row by its number, or all of them in order as a stream."""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rayalign.data.columns import texts_of
from rayalign.data.config import SourceConfig
from rayalign.data.images import undecoded
from rayalign.data.rows import check_path, csv_table, json_list, json_row, not_loaded, parquet_errors
from rayalign.errors import DataError

Row = dict[str, Any]
Numbered = tuple[int, str, Row | DataError]
KEY = "data.examples"


class Table(Protocol):
    """Rows by number. `fingerprint` is that of their content."""

    fingerprint: str

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """Images as bytes. Raises DataError when this row is not readable."""

    def where(self, index: int) -> str:
        """File and row, for messages."""


class JsonLines:
    """A .jsonl file, mapped into memory; of a row only the place is kept, so that each row may be as it likes."""

    def __init__(self, path: Path):
        self._path = path
        self._starts, self._numbers = array("q"), array("q")
        digest, start = hashlib.blake2b(digest_size=16), 0
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                digest.update(raw)
                if raw.strip():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(raw)
            self._bytes = mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts.append(start)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def row(self, index: int) -> Row:
        raw = self._bytes[self._starts[index] : self._starts[index + 1]]
        return json_row(raw, self.where(index))

    def where(self, index: int) -> str:
        return f"{self._path}:{self._numbers[index]}"


class Rows:
    """Rows of a list, or of a `datasets.Dataset`, which maps its files into memory."""

    def __init__(self, rows: Any, name: str, fingerprint: str):
        self._rows, self._name, self.fingerprint = rows, name, fingerprint
        if hasattr(rows, "info"):
            undecoded(rows.info.features)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        return self._rows[index]

    def where(self, index: int) -> str:
        return f"{self._name}, row {index + 1}"


class Stream:
    """Rows in order, as often as they are asked for."""

    def __init__(self, source: SourceConfig):
        path = Path(source.path).expanduser()
        self._name, self._limit = source.path, source.limit
        self._table = self._rows = None
        if path.is_dir() or path.suffix in (".jsonl", ".json", ".csv"):
            self._table = open_table(source)
            self.fingerprint = self._table.fingerprint
            return
        check_path(path, source.path, KEY)
        if path.suffix == ".parquet":
            self._rows, self.fingerprint = _parquet(source, path, streaming=True), _digest(path)
        else:
            self._rows = _hub(source, streaming=True)
            self.fingerprint = json.dumps([source.path, source.subset, source.split, source.revision])

        if hasattr(self._rows, "decode"):
            self._rows = self._rows.decode(False)  # images as bytes

    def __iter__(self) -> Iterator[Numbered]:
        """(number, file and row, row, or why it cannot be read)."""
        return itertools.islice(self._all(), self._limit)

    def _all(self) -> Iterator[Numbered]:
        if self._table is None:
            for index, row in enumerate(self._rows):
                yield index, f"{self._name}, row {index + 1}", row
            return
        for index in range(len(self._table)):
            where = self._table.where(index)
            try:
                yield index, where, self._table.row(index)
            except DataError as error:
                yield index, where, error


def open_table(source: SourceConfig, key: str = KEY, *, also: Sequence[str] = ()) -> Table:
    """Raises DataError.

    Args:
        key: of the config, where the source stands.
        also: suffixes of files that are read there besides those of tables.
    """
    path = Path(source.path).expanduser()
    if path.is_dir() and _is_saved(path):
        return _dataset(_of_split(_saved(path, key), source, key), source.path)
    check_path(path, source.path, key, also=also)
    if path.suffix == ".jsonl":
        return JsonLines(path)
    if path.suffix == ".json":
        return Rows(json_list(path), source.path, _digest(path))
    if path.suffix == ".csv":
        return Rows(_mapped(path, texts_of(source.columns)), source.path, _digest(path))
    if path.suffix == ".parquet":
        return Rows(_parquet(source, path), source.path, _digest(path))
    return _dataset(_of_split(_hub(source, key), source, key), source.path)


@contextmanager
def quiet_datasets() -> Iterator[Any]:
    """The library `datasets`, without its progress bars."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        if shown:
            datasets.enable_progress_bars()


def _hub(source: SourceConfig, key: str = KEY, *, streaming: bool = False) -> Any:
    named = {"split": source.split, "revision": source.revision}
    return _loaded(source, source.path, source.subset, key=key, streaming=streaming, **named)


def _parquet(source: SourceConfig, path: Path, *, streaming: bool = False) -> Any:
    with parquet_errors(path) as parquet:
        parquet.ParquetFile(path).close()
    return _loaded(source, "parquet", data_files=str(path), streaming=streaming)


def _loaded(source: SourceConfig, *names: str | None, key: str = KEY, split: str = "train", **arguments: Any) -> Any:
    """By `datasets.load_dataset`; a file is one split, which is called train."""
    with quiet_datasets() as datasets:
        try:
            return datasets.load_dataset(*names, split=split, **arguments).with_format(None)
        except Exception as error:  # datasets raises a different class for every way of not finding something
            raise not_loaded(source.path, error, key) from error
        finally:
            _free()


def _mapped(path: Path, texts: Sequence[str]) -> Any:
    """A .csv file as a `datasets.Dataset`: converted once, into the cache of `datasets`, and mapped into memory."""
    import pyarrow

    with quiet_datasets() as datasets:
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "rayalign_csv"
        known = hashlib.blake2b(json.dumps([_digest(path), texts]).encode(), digest_size=16).hexdigest()
        file = folder / f"{known}.arrow"
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            rows = csv_table(path, texts=texts)
            with tempfile.TemporaryDirectory(dir=folder) as apart:
                written = Path(apart) / file.name
                with pyarrow.OSFile(str(written), "wb") as sink, pyarrow.ipc.new_stream(sink, rows.schema) as writer:
                    writer.write_table(rows, max_chunksize=1000)
                written.replace(file)
            del rows
            _free()
        return datasets.Dataset.from_file(str(file))


def _free() -> None:
    """Give back what Arrow's allocator keeps of a conversion: as much as the file."""
    import pyarrow

    pyarrow.default_memory_pool().release_unused()


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(path: Path, key: str) -> Any:
    with quiet_datasets() as datasets:
        try:
            return datasets.load_from_disk(str(path))
        except Exception as error:
            raise not_loaded(str(path), error, key) from error


def _of_split(data: Any, source: SourceConfig, key: str) -> Any:
    """The rows themselves, where a folder holds several splits."""
    if not isinstance(data, dict):
        return data
    if source.split not in data:
        raise DataError(
            "there is no such split",
            where=source.path,
            value=source.split,
            rule=f"one of {', '.join(data)}",
            remedy=f"set split: {next(iter(data))}, say"
            if key == KEY
            else f"save the rows of {next(iter(data))} apart",
        )
    return data[source.split]


def _dataset(data: Any, name: str) -> Rows:
    return Rows(data, name, data._fingerprint)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()

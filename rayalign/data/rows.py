"""The rows of a data file or of a hub data set, as plain dicts; what is not readable is named with its line."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayalign.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
RULE = "a file ({}) or a hub id"
SPLITS = {"data.prompts": "data.split", "data.examples": "split"}  # the key of a data set → the one of its split


def read_rows(source: str, *, split: str = "train") -> list[dict[str, Any]]:
    """All rows of a file, or of a hub data set through `datasets`. Raises DataError."""
    path = Path(source).expanduser()
    check_path(path, source)
    if path.suffix in SUFFIXES:
        return _read_file(path)
    from datasets import load_dataset

    try:
        return load_dataset(source, split=split).to_list()
    except Exception as error:  # datasets raises a different class for every way of not finding something
        raise not_loaded(source, error) from error


def check_path(path: Path, source: str, key: str = "data.prompts", *, also: Sequence[str] = ()) -> None:
    """Refuse what can neither be a data file nor a hub id. Raises DataError.

    Args:
        also: suffixes of files that are read there besides those of data.
    """
    kinds = (*also, *SUFFIXES)
    rule = RULE.format(", ".join(kinds))
    if path.is_dir():
        inside = sorted(each.name for each in path.iterdir() if each.suffix in SUFFIXES)
        raise DataError(
            "this is a folder, not a file",
            where=source,
            value=f"a folder with {', '.join(inside)}" if inside else "a folder without a data file",
            rule=rule,
            remedy=f"did you mean {path / inside[0]}?" if inside else "name a file",
        )
    if path.suffix in kinds:
        if not path.is_file():
            raise _no_file(path, key, rule)
        if path.stat().st_size == 0:
            raise DataError(
                "this file is empty",
                where=str(path),
                value="0 bytes",
                rule="at least one row",
                remedy="look at what was to write it, or name another file",
            )
    elif path.is_file():
        raise DataError(
            "this kind of file is not read",
            where=source,
            value=path.suffix or "a name without a suffix",
            rule=rule,
            remedy=f"name it {path.stem}{also[0]} if it is one plain text"
            if also
            else 'write one JSON object a line, {"prompt": "…"}, into a file that ends in .jsonl',
        )
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise _no_file(path, key, rule)


def not_loaded(source: str, error: Exception, key: str = "data.prompts") -> DataError:
    """What `datasets` says of a hub id that it could not load."""
    return DataError(
        "this data set could not be loaded",
        where=source,
        value=f"{type(error).__name__}: {error}",
        rule=RULE.format(", ".join(SUFFIXES)),
        remedy=f"check the id{f', {SPLITS[key]}' if key in SPLITS else ''} and the network; "
        "a file is named with its suffix",
    )


def _no_file(path: Path, key: str, rule: str) -> DataError:
    near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.*")], n=1, cutoff=0.75)
    return DataError(
        "there is no such file",
        where=str(path),
        value="no file",
        rule=f"{rule}; relative paths start at {Path.cwd()}",
        remedy=f"did you mean {path.parent / near[0]}?" if near else f"correct {key}",
    )


def _read_file(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".csv":
        return csv_table(path).to_pylist()
    return list(_json_lines(path)) if path.suffix == ".jsonl" else json_list(path)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Line by line, since `datasets` names no line."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if raw.strip():
                yield json_row(raw, f"{path}:{number}")


def json_row(raw: bytes, where: str) -> dict[str, Any]:
    """One line of a .jsonl file. Raises DataError."""
    line = decoded(raw, where).strip()
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except ValueError as error:
        raise DataError(
            "this line is not JSON" if isinstance(error, json.JSONDecodeError) else "a key stands twice",
            where=where,
            value=line,
            rule=f"one JSON object a line; {_in_short(error)}",
            remedy=_json_remedy(line, error, whole=raw.endswith(b"\n")),
        ) from None
    if not isinstance(row, dict):
        raise _no_object(where, row)
    return row


def json_list(path: Path) -> list[dict[str, Any]]:
    """One list of objects, or an object a line."""
    text = decoded(path.read_bytes(), str(path))
    lines = text.splitlines()
    try:
        rows = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        if not text.lstrip().startswith("["):
            return list(_json_lines(path))
        line = min(getattr(error, "lineno", 1), len(lines))
        raise DataError(
            "this file is not JSON" if isinstance(error, json.JSONDecodeError) else "a key stands twice",
            where=f"{path}:{line}",
            value=lines[line - 1].strip() or "an empty line",
            rule=f"a list of JSON objects; {_in_short(error)}",
            remedy=_json_remedy(lines[line - 1], error, whole=text.rstrip().endswith("]")),
        ) from None
    if not isinstance(rows, list):
        raise DataError(
            "this file is one JSON value, not a list",
            where=str(path),
            value=f"an object with {', '.join(rows)}" if isinstance(rows, dict) else json.dumps(rows),
            rule='a list of objects, [{"prompt": "…"}, …]',
            remedy="save the list itself, without what is around it",
        )
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise _no_object(f"{path}, row {index + 1}", row)
    return rows


def csv_table(path: Path, *, texts: Sequence[str] = ()) -> Any:
    """By Arrow, which finds out what is a number, once every line has as many columns as the first.

    Args:
        texts: columns that are texts even where they look like numbers.
    """
    from pyarrow import ArrowInvalid, Table, string
    from pyarrow import csv as arrow

    csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))
    width = began = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                width = width or len(cells)
                if cells and len(cells) != width:
                    raise csv.Error(f"{len(cells)} columns here, {width} there")
                began = reader.line_num
        began = 0
        return arrow.read_csv(
            path,
            parse_options=arrow.ParseOptions(newlines_in_values=True),
            convert_options=arrow.ConvertOptions(column_types=dict.fromkeys(texts, string())),
        )
    except (UnicodeDecodeError, csv.Error, ArrowInvalid) as error:
        text = decoded(path.read_bytes(), str(path))
        if not width:
            return Table.from_pylist([])
        raise DataError(
            "this line is not CSV",
            where=f"{path}:{began + 1}",
            value=text.splitlines()[began].strip() or "an empty line",
            rule=f"as many columns in each line as in the first; the reader says: {error}",
            remedy='put "quotes" around a text that holds a comma, and close each quote',
        ) from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    with parquet_errors(path) as parquet:
        return parquet.read_table(path).to_pylist()


@contextmanager
def parquet_errors(path: Path) -> Iterator[Any]:
    """pyarrow's reader; what it raises is a DataError that names the file."""
    from pyarrow import ArrowException, parquet

    try:
        yield parquet
    except (ArrowException, OSError) as error:
        raise DataError(
            "this file is not parquet",
            where=str(path),
            value=_beginning(path),
            rule=f"parquet; the reader says: {str(error).rpartition(chr(39) + ': ')[2]}",
            remedy="write it again; or is it another kind of file, or cut off?",
        ) from None


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return f"a file that begins with {file.read(24)!r}"


def decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # Windows puts a mark before the first line
    except UnicodeDecodeError as error:
        if not re.search(r":\d+$", where):
            where = f"{where}:{raw[: error.start].count(10) + 1}"
        raise DataError(
            "this line is not UTF-8",
            where=where,
            value=f"byte 0x{raw[error.start]:02x}",
            rule="text in UTF-8",
            remedy="save the file as UTF-8 (from Latin-1: iconv -f latin1 -t utf-8)",
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no key stands twice: of two, json would drop the first without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return row


def _in_short(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"the reader says: {error.msg}, column {error.colno}"
    return str(error)


def _json_remedy(line: str, error: ValueError, *, whole: bool) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "keep one of them"
    if "{'" in line:
        return "put double quotes around keys and texts"
    if line in ("{", "[") or line.startswith("[{"):
        return "put each object on one line; a file that is one list ends in .json"
    if not line.startswith(("{", "[")):
        return 'write each line as {"prompt": "…"}'
    return "correct this line, or take it out" if whole else "the file seems to be cut off: write it again"


def _no_object(where: str, row: Any) -> DataError:
    return DataError(
        "this is not a JSON object",
        where=where,
        value=json.dumps(row, ensure_ascii=False),
        rule="each row an object with named columns",
        remedy='write {"prompt": "…"}',
    )

"""The rows of a data file or of a hub data set, as plain dicts; what is not readable is named with its line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayalign.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
RULE = f"a file ({', '.join(SUFFIXES)}) or a hub id"


def read_rows(source: str, *, split: str = "train") -> list[dict[str, Any]]:
    """All rows of a file, or of a hub data set through `datasets`. Raises DataError."""
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(each.name for each in path.iterdir() if each.suffix in SUFFIXES)
        raise DataError(
            "this is a folder, not a file",
            where=source,
            value=f"a folder with {', '.join(inside)}" if inside else "a folder without a data file",
            rule=RULE,
            remedy=f"did you mean {path / inside[0]}?" if inside else "name a file",
        )
    if path.suffix in SUFFIXES:
        return _read_file(path)
    if path.is_file():
        raise DataError(
            "this kind of file is not read",
            where=source,
            value=path.suffix or "a name without a suffix",
            rule=RULE,
            remedy='write one JSON object a line, {"prompt": "…"}, into a file that ends in .jsonl',
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise _no_file(path)
    from datasets import load_dataset

    try:
        return load_dataset(source, split=split).to_list()
    except Exception as error:  # datasets raises a different class for every way of not finding something
        raise DataError(
            "this data set could not be loaded",
            where=source,
            value=f"{type(error).__name__}: {error}",
            rule=RULE,
            remedy="check the id, data.split and the network; a file is named with its suffix",
        ) from error


def _no_file(path: Path) -> DataError:
    near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.*")], n=1)
    return DataError(
        "there is no such file",
        where=str(path),
        value="no file",
        rule=f"{RULE}; relative paths start at {Path.cwd()}",
        remedy=f"did you mean {path.parent / near[0]}?" if near else "correct data.prompts",
    )


def _read_file(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise _no_file(path)
    if path.stat().st_size == 0:
        raise DataError(
            "this file is empty",
            where=str(path),
            value="0 bytes",
            rule="at least one row",
            remedy="look at what was to write it, or name another file",
        )
    if path.suffix == ".jsonl":
        return list(_json_lines(path))
    if path.suffix == ".json":
        return _json(path)
    return _table(path)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Line by line, since `datasets` names no line."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            line = _decoded(raw, f"{path}:{number}").strip()
            if not line:
                continue
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except ValueError as error:
                raise DataError(
                    "this line is not JSON",
                    where=f"{path}:{number}",
                    value=line,
                    rule=f"one JSON object a line; {_in_short(error)}",
                    remedy=_json_remedy(line, whole=raw.endswith(b"\n")),
                ) from None
            if not isinstance(row, dict):
                raise _no_object(f"{path}:{number}", row)
            yield row


def _json(path: Path) -> list[dict[str, Any]]:
    """One list of objects, or an object a line."""
    raw = path.read_bytes()
    text = _decoded(raw, str(path))
    if not text.lstrip().startswith("["):
        return list(_json_lines(path))
    try:
        rows = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise DataError(
            "this file is not JSON",
            where=f"{path}:{line}",
            value=text.splitlines()[line - 1].strip() if line <= len(text.splitlines()) else "the end of the file",
            rule=f"a list of JSON objects; {_in_short(error)}",
            remedy=_json_remedy(text.splitlines()[-1], whole=text.rstrip().endswith("]")),
        ) from None
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise _no_object(f"{path}, row {index + 1}", row)
    return rows


def _table(path: Path) -> list[dict[str, Any]]:
    from datasets import load_dataset

    kind = path.suffix.removeprefix(".")
    try:
        return load_dataset(kind, data_files=str(path), split="train", keep_in_memory=True).to_list()
    except Exception as error:  # pandas, Arrow and datasets have their own
        cause = error.__cause__ or error
        message = " ".join(str(cause).split())
        line = re.search(r"(?:line|row) (\d+)", message)
        not_utf8 = isinstance(cause, UnicodeDecodeError)
        csv = "save it as UTF-8" if not_utf8 else "close every quote, and give each line as many columns as the first"
        raise DataError(
            f"this is not a readable {path.suffix} file",
            where=f"{path}:{line[1]}" if line else str(path),
            value=_beginning(path),
            rule=f"{path.suffix} in UTF-8; its reader says: {message}"
            if kind == "csv"
            else f"parquet; its reader says: {message}",
            remedy=csv if kind == "csv" else "write it again; or is it another kind of file, or cut off?",
        ) from error


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return f"a file that begins with {file.read(24)!r}"


def _decoded(raw: bytes, where: str) -> str:
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


def _json_remedy(line: str, *, whole: bool) -> str:
    if line.strip() in ("{", "["):
        return "put each object on one line; a file that is one list ends in .json"
    if "{'" in line:
        return "JSON has double quotes around keys and texts"
    return "correct this line, or take it out" if whole else "the file seems to be cut off: write it again"


def _no_object(where: str, row: Any) -> DataError:
    return DataError(
        "this is not a JSON object",
        where=where,
        value=json.dumps(row, ensure_ascii=False),
        rule="each row an object with named columns",
        remedy='write {"prompt": "…"}',
    )

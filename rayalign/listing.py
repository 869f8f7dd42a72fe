"""What a config can name, a line each: `rayalign algorithms`, `rayalign scorers`; and every key that it can hold."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from rayalign.record import Record
from rayalign.registry import Tagged, resolve, summary


@dataclass(frozen=True)
class Entry:
    """A part that a config can name.

    Attributes:
        name: as a config says it.
        line: what it is; the first line of its docstring.
        paper: where it was published; empty for what was not.
    """

    name: str
    line: str
    paper: str


def entries(table: Mapping[str, str]) -> list[Entry]:
    """One for each name of a registry's table, and below it one for each part that its own keys can name."""
    found = []
    for name, dotted in sorted(table.items()):
        record = resolve(dotted)
        found.append(_entry(name, record))
        found += [_entry(f"  {choice}", below) for choice, below in _choices(record)]
    return found


def print_entries(title: str, found: list[Entry], *, hint: str) -> None:
    """A table on stdout, and a line on how to name a part of one's own."""
    out = Console(file=sys.stdout, highlight=False)
    table = Table(title=title, title_justify="left", show_lines=False, box=None, pad_edge=False)
    for column in ("name", "what it is", "paper"):
        table.add_column(column, overflow="fold")
    for entry in found:
        table.add_row(entry.name, entry.line, entry.paper)
    out.print(table)
    out.print(hint, markup=False, soft_wrap=True)


def config_keys() -> list[str]:
    """Every key that a config can hold, dotted, whatever names it selects: what a shell completes."""
    from rayalign.schema import json_schema

    schema = json_schema()
    return sorted(set(_keys(schema, schema, "")))


def _keys(node: Mapping[str, Any], root: Mapping[str, Any], prefix: str) -> Iterator[str]:
    if "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())):
        yield from _keys(choice, root, prefix)
    for name, child in node.get("properties", {}).items():
        below = list(_keys(child, root, f"{prefix}{name}."))
        yield from below or [f"{prefix}{name}"]


def _entry(name: str, record: type[Record]) -> Entry:
    return Entry(name, summary(record), getattr(record, "paper", ""))


def _choices(record: type[Record]) -> Iterator[tuple[str, type[Record]]]:
    """What the keys of a part can name in turn, as ("loss: dpo", its record)."""
    for key, field in record.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Record) and "name" in kind.model_fields:
            yield f"{field.alias or key}: {kind.model_fields['name'].default}", kind
        for table in (each.table for each in field.metadata if isinstance(each, Tagged)):
            yield from ((f"{field.alias or key}: {name}", resolve(dotted)) for name, dotted in sorted(table.items()))

"""Names in a config → records. One table for each kind of part; anything else by dotted path.

A table maps a short name to "module:Class", imported only when it is asked for. A name with a colon,
`my_pkg.my_algorithm:MyAlgorithm`, is taken from outside the package in the same way.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema

from rayalign.record import Record, Unfit

DOTTED = "^[^:]+:[^:]+$"


def resolve(dotted: str) -> Any:
    """The object that "package.module:Name" names. Raises Unfit when there is none."""
    module_name, _, attribute = dotted.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module may fail in any way while it is imported
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        remedy = f"run from the folder that holds {module_name.split('.')[0]}, or install it; check the spelling"
        raise Unfit(
            "there is no such module" if missing else f"{module_name} fails while it is imported",
            key="name",
            rule="package.module:Name, importable from where the command runs"
            if missing
            else f"a module that imports; this one raised {type(error).__name__}: {error}",
            remedy=remedy if missing else f"mend it until `python -c 'import {module_name}'` passes",
        ) from error
    if not hasattr(module, attribute):
        raise Unfit(
            f"{module_name} holds no {attribute or 'name after the colon'}",
            key="name",
            rule="package.module:Name, where the module defines Name",
            remedy=did_you_mean(attribute, [name for name, each in vars(module).items() if _is_record(each)]),
        )
    return getattr(module, attribute)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'did you mean …?' for the nearest of the known words, or what there is to choose from."""
    words = sorted(set(known))
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose one of: {', '.join(words)}" if len(words) != 1 else f"use {words[0]}"


@dataclass(frozen=True, eq=False)  # hashed by identity: typing compares annotations of unions
class Tagged:
    """Validates `{name: …, …}` into the record that the name selects from the table, or by dotted path.

    Attributes:
        kind: what is chosen, for messages: "algorithm".
        verb: a method that every record of this kind has.
        usual: the name that a mapping without one means; none: it has to have one.
        elsewhere: a name that is looked for here, and stands somewhere else → what to write.
    """

    kind: str
    table: Mapping[str, str]
    verb: str
    usual: str | None = None
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def select(self, value: Any) -> type[Record]:
        """The record that a mapping with a name, or a name alone, asks for. Raises Unfit."""
        names = ", ".join(sorted(self.table))
        name = value.get("name", self.usual) if isinstance(value, dict) else value
        if not isinstance(name, str):
            raise Unfit(
                f"this {self.kind} has no name" if name is None else f"this does not name {_a(self.kind)}",
                rule=f"a mapping with a name, one of {names}, or package.module:Name",
                remedy=f"write {{name: {next(iter(self.table))}}}, say, and its other keys beside name",
            )
        if ":" not in name and name not in self.table:
            raise Unfit(
                f"no {self.kind} is called {name}",
                key="name",
                rule=f"one of {names}, or package.module:Name for one of your own",
                remedy=self.elsewhere.get(name) or did_you_mean(name, self.table),
            )
        record = resolve(self.table.get(name, name))
        if not (_is_record(record) and hasattr(record, self.verb)):
            raise Unfit(
                f"{name} is no {self.kind}: it has no {self.verb}()" if _is_record(record) else f"{name} is no record",
                key="name",
                rule=f"a class derived from rayalign.record.Record that defines {self.verb}()",
                remedy=f"name such a class, or what is here already: {names}",
            )
        return record

    def _validate(self, value: Any, handler: Callable[[Any], Any]) -> Record:
        if isinstance(value, Record):
            return value
        record = self.select(value)
        # A ValidationError from here becomes part of the one around it, with the whole path in front.
        if not isinstance(value, dict):
            value = {"name": value}
        return record.model_validate(value if "name" in value else {"name": self.usual, **value})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._validate, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Every record of the table, the names that need no other key, and parts from outside with any keys."""
        short, forms = [], []
        for name, dotted in sorted(self.table.items()):
            record = resolve(dotted)
            form = handler(record.__pydantic_core_schema__)
            definition = handler.resolve_ref_schema(form)
            definition["properties"]["name"] |= {"const": name, "description": summary(record)}
            tag = set() if name == self.usual else {"name"}
            needed = definition["required"] = sorted({*tag, *definition.get("required", ())})
            short += [name] if set(needed) <= {"name"} else []
            forms.append(form)
        dotted_name = {"type": "string", "pattern": DOTTED, "description": "package.module:Name, from outside"}
        outside = {"type": "object", "required": ["name"], "properties": {"name": dotted_name}}
        return {"anyOf": [*forms, *([{"enum": short}] if short else []), outside, dotted_name]}


def summary(record: type[Record]) -> str:
    """The first line of a record's docstring."""
    return (inspect.getdoc(record) or "").partition("\n")[0]


def _is_record(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Record)


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"

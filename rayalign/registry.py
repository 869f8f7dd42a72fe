"""Names in a config → records. One table for each kind of part; anything else by dotted path.

A table maps a short name to "module:Class", imported only when it is asked for. A name with a colon,
`my_pkg.my_algorithm:MyAlgorithm`, is taken from outside the package in the same way.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator

from rayalign.errors import ConfigError
from rayalign.record import Record


def resolve(dotted: str) -> Any:
    """The object that "package.module:Name" names. Raises ConfigError when there is none."""
    module_name, _, attribute = dotted.partition(":")
    try:
        module = importlib.import_module(module_name)
        return getattr(module, attribute)
    except Exception as error:  # the module may fail in any way while it is imported
        raise ConfigError(
            "this dotted path does not lead to anything",
            value=dotted,
            rule="package.module:Name, importable from where the command runs",
            remedy=f"{type(error).__name__}: {error}",
        ) from error


def did_you_mean(word: str, known: list[str]) -> str:
    """' did you mean …?' for the nearest of the known words, or what there is to choose from."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"


class InvalidPart(Exception):
    """A tagged record that is not valid: carries its path and class out through pydantic, which would
    flatten a nested ValidationError into text. Deliberately not a ValueError."""

    def __init__(self, path: list[str], error: ValidationError, record: type[Record]):
        super().__init__(str(error))
        self.path, self.error, self.record = path, error, record


def tagged(kind: str, table: Mapping[str, str], verb: str) -> WrapValidator:
    """Validates `{name: …, …}` into the record that the name selects from the table, or by dotted path.

    Args:
        verb: a method that every record of this kind has.
    """

    def validate(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Record:
        if isinstance(value, Record):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError(f"a mapping with a name, one of: {', '.join(sorted(table))}")
        record = _select(kind, table, verb, value["name"])
        try:
            return record.model_validate(value)
        except ValidationError as error:
            raise InvalidPart([info.field_name or kind], error, record) from None
        except InvalidPart as inner:
            raise InvalidPart([info.field_name or kind, *inner.path], inner.error, inner.record) from None

    return WrapValidator(validate)


def _select(kind: str, table: Mapping[str, str], verb: str, name: str) -> type[Record]:
    if ":" not in name and name not in table:
        raise ValueError(f"no {kind} is called {name}; {did_you_mean(name, list(table))}")
    try:
        record = resolve(table.get(name, name))
    except ConfigError as error:
        raise ValueError(f"{name} does not lead to anything ({error.remedy})") from error
    if not (isinstance(record, type) and issubclass(record, Record)):
        raise ValueError(f"{name} has to be a rayalign.record.Record")
    if not hasattr(record, verb):
        raise ValueError(f"{name} is no {kind}: it has no {verb}()")
    return record

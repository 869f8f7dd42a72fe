"""Keys of a config whose value is not the default."""

from __future__ import annotations

from typing import Any

from rayalign.record import Record


def differences(record: Record, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key → (value, default), in the order of the config; None for a key without default. A part with a
    name is compared with the defaults of the record that its name selects."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, field in type(record).model_fields.items():
        key = prefix + (field.alias or name)
        value = getattr(record, name)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(value, Record):
            found |= _part(value, default, key)
        elif _plain(value) != _plain(default):
            found[key] = (_plain(value), _plain(default))
    return found


def _part(value: Record, default: Any, key: str) -> dict[str, tuple[Any, Any]]:
    """A section; its name counts as different when the default is of another name."""
    inside = differences(value, f"{key}.")
    usual = default.get("name") if isinstance(default, dict) else getattr(default, "name", None)
    name = getattr(value, "name", None)
    inside.pop(f"{key}.name", None)
    return ({f"{key}.name": (name, usual)} if name != usual else {}) | inside


def _plain(value: Any) -> Any:
    """As YAML would hold it; of a named part in a list, what differs from its own defaults."""
    if isinstance(value, Record):
        rest = {key: new for key, (new, _) in differences(value).items() if key != "name"}
        return {"name": value.name, **rest} if hasattr(value, "name") else rest
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value

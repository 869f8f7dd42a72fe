"""What a JSON schema allows, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayalign.config.source import in_yaml

KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping of keys",
}
BOUNDS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "below"),
    ("minItems", "of at least"),
)


def rule_of(node: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words, and what it is for."""
    allowed, purpose = _allowed(node), str(node.get("description", "")).rstrip(".")
    return f"{allowed} ({purpose})" if allowed and purpose else allowed or purpose


def _allowed(node: Mapping[str, Any]) -> str:
    choices = choices_of(node)
    if choices:
        return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])
    if "anyOf" in node:
        forms = ["nothing" if _is_null(each) else _allowed(each) for each in node["anyOf"]]
        return " or ".join(filter(None, dict.fromkeys(forms)))
    bounds = [
        f"{words} {_plain(node[bound])}" for bound, words in BOUNDS if bound in node and "prefixItems" not in node
    ]
    kind = KINDS.get("object" if "$ref" in node else node.get("type", ""), "")
    if "prefixItems" in node:
        kind = f"a list of {len(node['prefixItems'])} values, each {_allowed(node['prefixItems'][0])}"
    return kind + (f"{' ' if bounds[0].startswith('of') else ', '}{' and '.join(bounds)}" if bounds else "")


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def choices_of(node: Mapping[str, Any]) -> list[Any]:
    if "anyOf" in node:
        known = [each for each in node["anyOf"] if not _is_null(each)]
        return choices_of(known[0]) if len(known) == 1 else []
    return node.get("enum") or ([node["const"]] if "const" in node else [])


def _is_null(node: Mapping[str, Any]) -> bool:
    return node.get("type") == "null"


def example_of(node: Mapping[str, Any]) -> str:
    for found in (*node.get("examples", ()), node.get("default"), *choices_of(node)):
        if found is not None:
            return in_yaml(found)
    return ""

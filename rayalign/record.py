"""The base of everything that a YAML file can say: a frozen record that refuses unknown keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Unfit(ValueError):
    """Raised by a record's validators, where a plain ValueError would leave a person to guess.

    Args:
        what: one sentence, what is wrong.
        rule: what should be there.
        remedy: what to write instead.
        key: of the record, when the fault is one key's and not the whole record's.
    """

    def __init__(self, what: str, *, rule: str, remedy: str, key: str = ""):
        super().__init__(what)
        self.what, self.rule, self.remedy, self.key = what, rule, remedy, key

    def __reduce__(self):
        return _unfit_again, (self.what, self.rule, self.remedy, self.key)


class Record(BaseModel):
    """A frozen set of settings. Field descriptions are what error messages and the JSON schema say."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, populate_by_name=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Else `steps: true` would be one step."""
        if isinstance(value, bool):
            kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("true and false are no numbers")
        return value


def _unfit_again(what: str, rule: str, remedy: str, key: str) -> Unfit:
    return Unfit(what, rule=rule, remedy=remedy, key=key)


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation names, those of the values of a Literal included."""
    inner = get_args(annotation)
    if not inner:
        return {annotation} if isinstance(annotation, type) else {type(annotation)}
    return set().union(*map(_kinds, inner))


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys: {"train": {"steps": 5}} → {"train.steps": 5}."""
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


_SECRET = r"(?:api[_-]?key|key|token|secret|password|passwd|pwd|credentials?|auth|authorization|cookie|signature|sig)"
_SECRET_KEY = re.compile(rf"(^|[_.-]){_SECRET}$", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^\s?#]*@")
_QUERY = re.compile(r"(?<=[?&])([^=&\s]*=)?[^&\s]+")
_SECRET_IN_QUERY = re.compile(rf"([?&](?:\w+[_-])?{_SECRET}=)[^&\s]+", re.IGNORECASE)


_TYPED_SECRET = re.compile(
    r"^(key|.*api[_-]?key|(.*[_.-])?(token|secret|password|passwd|pwd|credentials?|authorization))$", re.IGNORECASE
)


def is_secret(key: str, value: Any) -> bool:
    """Whether a message about what a person wrote had better not repeat it: the value of a key such as api_key, or
    of one that takes the name of an environment variable and got what is no name, perhaps the key itself."""
    if not isinstance(value, str) or not value:
        return False
    return bool(_TYPED_SECRET.match(key)) or (key.endswith("_env") and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value))


def redacted(value: Any, key: str = "") -> Any:
    """Plain data without what opens doors: values of keys such as api_key or token, and user:password@ in URLs.

    For what leaves the run directory: reports, trackers, error messages.
    """
    if value is not None and value != "" and not isinstance(value, bool) and _SECRET_KEY.search(key):
        return "***"
    if is_secret(key, value):
        return "***"
    if isinstance(value, Mapping):
        return {name: redacted(each, str(name)) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each) for each in value]
    if isinstance(value, str) and key == "url":  # an address is asked in its query with a key of any name
        value = _QUERY.sub(r"\1***", value)
    if isinstance(value, str):
        return _SECRET_IN_QUERY.sub(r"\1***", _USERINFO.sub("***@", value))
    return value

"""The base of everything that a YAML file can say: a frozen record that refuses unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen set of settings. Field descriptions are what `--help` and the JSON schema show."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, populate_by_name=True
    )

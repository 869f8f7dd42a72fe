"""In what one role (critic, reference) differs from the policy, and whether it lives in actors of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from rayalign.record import Record, Unfit

SHARDED = {"zero_stage", "offload", "config"}


class RoleSettings(Record):
    """What is not set here is as the policy's."""

    apart: bool = Field(
        False, description="in a group of actors of its own, as with ranks; else beside the policy, in its processes"
    )
    ranks: int | None = Field(
        None, ge=1, description="processes of the role's own group; none: beside the policy, or apart as many as it has"
    )
    micro_batch_tokens: int | None = Field(None, ge=1, description="as learner.micro_batch_tokens, of this role")
    logprob_chunk: int | None = Field(None, ge=1, description="as learner.logprob_chunk, of this role")
    gradient_checkpointing: bool | None = Field(
        None, description="as learner.gradient_checkpointing, of a role that is trained"
    )

    @property
    def lives_apart(self) -> bool:
        return self.apart or self.ranks is not None

    def changes(self) -> dict[str, Any]:
        """What is set, by its name in the learner's settings."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name != "apart"}
        return {name: value for name, value in named.items() if value is not None}


class TorchRole(RoleSettings):
    """A role of the torch learner: one process, which holds all of it."""

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        asked = sorted(SHARDED & set(data)) + (["ranks"] if data.get("ranks") not in (None, 1) else [])
        if asked:
            raise Unfit(
                "the torch learner is one process, which holds all of a role",
                key=asked[0],
                rule="apart, micro_batch_tokens, logprob_chunk and gradient_checkpointing are what its roles may set",
                remedy=f"take {', '.join(asked)} out, or set learner.name=deepspeed",
            )
        return data


class DeepSpeedRole(RoleSettings):
    """A role of the DeepSpeed learner, with a ZeRO stage of its own."""

    zero_stage: Literal[0, 1, 2, 3] | None = Field(None, description="as learner.zero_stage, of this role")
    offload: Literal["none", "cpu"] | None = Field(
        None, description="as learner.offload, of a role that is trained: where its optimiser state lives"
    )

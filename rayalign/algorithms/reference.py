"""When, and how, the reference follows the policy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayalign.record import Record, Unfit


class Reference(Record):
    """The reference model of a preference loss."""

    update: Literal["fixed", "replace", "average"] = Field(
        "fixed", description="fixed: the initial policy; replace: by the policy every n steps; average: moving average"
    )
    every: int = Field(1, ge=1, description="steps between two updates of the reference")
    decay: float = Field(0.0, ge=0.0, lt=1.0, description="of the moving average: reference ← decay·reference + …")
    cached: bool = Field(False, description="its log-probs of a data set are computed once and kept on disk")

    @model_validator(mode="after")
    def _consistent(self) -> Reference:
        if (self.update == "average") != (self.decay > 0):
            average = self.update == "average"
            raise Unfit(
                "a moving average without a decay" if average else "a decay without a moving average",
                key="decay",
                rule="above 0 with update: average, and 0 with any other update",
                remedy="set decay: 0.99" if average else "set update: average, or take decay out",
            )
        if self.cached and self.update != "fixed":
            raise Unfit(
                "log-probs of a reference that changes cannot be kept",
                key="cached",
                rule="cached: true with update: fixed only",
                remedy="set cached: false, or update: fixed",
            )
        return self

    def decay_after(self, step: int) -> float | None:
        """The decay to use after this step (counted from 1), or None to leave the reference alone."""
        if self.update == "fixed" or step % self.every:
            return None
        return self.decay

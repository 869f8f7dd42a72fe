"""Self-play fine-tuning: the policy learns to tell the data's answers from those that it wrote itself an iteration ago.

What samples those answers, and which of them a step takes, is in `selfplay`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from rayalign.algorithms.base import Offline
from rayalign.algorithms.groups import row
from rayalign.algorithms.preference import pair_metrics, pair_of
from rayalign.algorithms.sft import SFT
from rayalign.maths.preference import spin_loss
from rayalign.protocols import Stretch
from rayalign.record import Unfit
from rayalign.types import AnyColumn, Batch, Column, Example, Group, Metrics, Terms

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
EPOCHS = 2  # of an iteration, as published


class SPIN(Offline):
    """Self-play fine-tuning: the data's answers against those that the policy of the iteration before wrote.

    Iteration t: the reference, which is the policy as iteration t−1 left it, answers the prompts of all rows; the
    data's answers win against these; then the reference is replaced.

    Trained to the optimum, an iteration gives π_{t+1} ∝ π_t·(p/π_t)^{1/λ} for data from p: the log-ratio to p shrinks
    by the factor |1 − 1/λ|, so that it contracts for λ above ½ and grows below. Few steps at a small learning rate
    stay far from that optimum, which is why λ = 0.1 works in the paper.
    """

    paper: ClassVar = "Chen et al. 2024, arXiv:2401.01335"
    rows: ClassVar = ("completion",)
    self_play: ClassVar = True
    needs: ClassVar[Sequence[tuple[str, AnyColumn]]] = (("reference", Column.LOGPS),)
    columns: ClassVar[Sequence[AnyColumn]] = (Column.LOGPS,)
    name: Literal["spin"] = "spin"
    iterations: int = Field(3, ge=1, description="how often the opponent is replaced; more can be added on resume")
    steps: Count | tuple[Count, ...] | None = Field(
        None, description="training steps of an iteration; a list: by iteration, the last for all later ones"
    )
    epochs: int | None = Field(
        None,
        ge=1,
        description=f"instead of steps: passes over an iteration's pairs; neither: {EPOCHS}, as published",
    )
    lam: Positive | tuple[Positive, ...] = Field(
        0.1, description="λ, the published code's β; a list: by iteration, the last for all later ones"
    )
    lr_scale: Positive | tuple[Positive, ...] = Field(
        1.0, description="factor of optimizer.lr; a list: by iteration. Each has its own warm-up and schedule"
    )
    nll_weight: float = Field(0.0, ge=0, description="adds the mean negative log-likelihood of the data's answer")
    mix_previous: bool = Field(
        True, description="from the second iteration on, the samples of the one before are trained on as well"
    )
    shard: int = Field(256, ge=1, description="prompts whose answers are one file in generations/")

    @model_validator(mode="after")
    def _consistent(self) -> SPIN:
        if self.steps is not None and self.epochs is not None:
            raise Unfit(
                "an iteration has both a number of steps and of passes",
                key="epochs",
                rule="steps, or epochs",
                remedy="take one of them out",
            )
        for key in ("steps", "lam", "lr_scale"):
            given = getattr(self, key)
            if isinstance(given, tuple) and not 0 < len(given) <= self.iterations:
                raise Unfit(
                    f"{len(given)} values for {self.iterations} iterations",
                    key=key,
                    rule="one number, or a list of at least one and at most as many as iterations",
                    remedy=f"raise iterations to {len(given)}, or shorten the list" if given else "write a number",
                )
        return self

    # The course of the run. Steps and iterations are counted from 0.

    def over(self, rows: int, count: int) -> SPIN:
        """With steps in place of epochs, for so many training rows, of which a step takes `count`."""
        if self.steps is not None:
            return self
        passes = self.epochs or EPOCHS
        steps = tuple(max(1, part * rows * passes // count) for part in (1, 2))
        mixed = self.mix_previous and self.iterations > 1
        return self.model_copy(update={"steps": steps if mixed else steps[0], "epochs": None})

    @property
    def total_steps(self) -> int | None:
        """Of all iterations; None while nobody knows how many rows an epoch has."""
        return None if self.steps is None else self.first_step(self.iterations)

    def first_step(self, iteration: int) -> int:
        """Where an iteration begins; of one beyond the last, where the run ends."""
        return sum(int(_of(self.steps, t)) for t in range(min(iteration, self.iterations)))

    def iteration(self, step: int) -> int:
        """That this step belongs to; beyond the end the last one."""
        found = 0
        while found + 1 < self.iterations and self.first_step(found + 1) <= step:
            found += 1
        return found

    def begins(self, step: int) -> bool:
        """Whether an iteration begins with this step."""
        return self.steps is not None and any(self.first_step(t) == step for t in range(self.iterations))

    def refresh(self, step: int) -> float | None:
        """After the last step of an iteration (counted from 1) the reference becomes the policy."""
        return 0.0 if step and (self.begins(step) or step == self.total_steps) else None

    def at(self, step: int) -> SPIN:
        if self.steps is None or not isinstance(self.lam, tuple):
            return self
        return self.model_copy(update={"lam": _of(self.lam, self.iteration(step))})

    def stretch(self, step: int) -> Stretch | None:
        if self.steps is None:
            return None
        t = self.iteration(step)
        return Stretch(self.first_step(t), int(_of(self.steps, t)), _of(self.lr_scale, t))

    # What a step learns.

    def for_held_out(self) -> Offline:
        """Held-out rows have no opponent: what is measured is the likelihood of their answers."""
        return SFT()

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """Pairs (the data's answer, the opponent's). A group that lacks one, or has the same answer twice, is left
        out and counted."""
        whole = [group for group in groups if len(group.completions) > 1]
        made = [
            Example((row(group, 0), row(group, 1)))
            for group in whole
            if group.completions[0].token_ids != group.completions[1].token_ids
        ]
        counts = {
            "pairs/kept": len(made),
            "pairs/dropped": len(groups) - len(made),
            "pairs/same_answer": len(whole) - len(made),
        }
        return made, {name: float(count) for name, count in counts.items()}

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        pair, lam = pair_of(batch, columns), _of(self.lam, 0)
        metrics = pair_metrics(pair, lam * pair.ratio) | {"spin/gap": pair.gap}
        loss = spin_loss(pair.gap, lam=lam)
        if self.nll_weight:
            loss = loss - self.nll_weight * pair.means[:, 0]
        return Terms(loss, {name: value.detach() for name, value in metrics.items()})


def _of(given: float | tuple[float, ...] | None, iteration: int) -> float:
    """The setting of an iteration, from one number or from a list whose last holds on."""
    if isinstance(given, tuple):
        return given[min(iteration, len(given) - 1)]
    assert given is not None, "the steps of an iteration are known once the rows are, see over()"
    return given

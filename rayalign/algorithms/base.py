"""What algorithms share: verbs that most need nothing of, and the regulariser KL(π_ref‖π)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from rayalign.algorithms.reference import Reference
from rayalign.maths.logprobs import sequence_logprob
from rayalign.protocols import Stretch
from rayalign.record import Record, Unfit
from rayalign.types import AnyColumn, Batch, Column, Example, Group, Metrics, Sampling, Terms
from rayalign.types import Sequence as Row


class Offline(Record):
    """The verbs of a method that samples nothing, weighs all examples the same, and has no reference."""

    name: str  # first of the keys, wherever they are listed

    rows: ClassVar[Sequence[str]] = ()
    network: ClassVar[str] = "causal"
    images: ClassVar[bool] = False  # whether each row has to have an image
    learns: ClassVar[bool] = True  # else its run trains nothing: it writes a data set
    unscored: ClassVar[bool] = False  # whether a run without a scorer makes sense where it samples
    needs: ClassVar[Sequence[tuple[str, AnyColumn]]] = ()
    statistics: ClassVar = None
    further_statistics: ClassVar = None
    carries: ClassVar[Mapping[str, float]] = {}
    loss_rows: ClassVar[int | None] = None
    by_row: ClassVar[bool] = False  # whether the rows of an example are the same whatever else its step has
    untempered: ClassVar[bool] = False  # whether log-probs are those at temperature 1, however samples are drawn
    takes_gold: ClassVar[bool] = False  # whether it looks at reference answers, the column gold of prompts and rows
    measures_samples: ClassVar[bool] = False  # whether it measures samples of held-out prompts, too, see evaluate.py
    watched: ClassVar[Sequence[str]] = ()
    at_first: ClassVar[Sequence[str]] = ()
    critic_algorithm: ClassVar[Offline | None] = None
    policy_from: ClassVar[int] = 0  # step, counted from 0, that trains the policy first; before it the critic alone
    each_answer: ClassVar[bool] = False  # whether each answer to a prompt is an example, and not all of them together
    whole_distribution: ClassVar[bool] = False  # whether top-p and the like would make its ratios wrong
    self_play: ClassVar[bool] = False  # whether answers of the data meet answers that the policy wrote, see selfplay

    def request(self, sampling: Sampling) -> list[Sampling]:
        return []

    def useful(self, group: Group) -> bool:
        return True

    def planned(self, updates: int) -> Self:
        return self

    def credit(self, examples: Sequence[Example]) -> tuple[Sequence[Example], Metrics]:
        return examples, {}

    def enough(self, metrics: Metrics) -> bool:
        return False

    def adapted(self, state: Mapping[str, float], *, fresh: bool = True) -> Self:
        return self

    def adapt(self, state: Mapping[str, float], metrics: Metrics) -> dict[str, float]:
        return dict(state)

    def dealt(self, examples: Sequence[Example], texts: Sequence[Row]) -> Sequence[Example]:
        return examples

    def denominator(self, examples: Sequence[Example]) -> float:
        return float(len(examples))

    def refresh(self, step: int) -> float | None:
        return None

    def at(self, step: int) -> Self:
        """The algorithm as it is in this step, counted from 0: a setting may change in the course of a run."""
        return self

    def stretch(self, step: int) -> Stretch | None:
        """The part of a run with a learning-rate schedule of its own that this step, counted from 0, belongs to."""
        return None

    def for_held_out(self) -> Offline:
        """The algorithm whose loss and metrics are those of held-out rows of data."""
        return self

    def summarise(self, metrics: Metrics) -> Metrics:
        """Metrics of all examples together, as `update` or `measure` gave them → those to be written down."""
        return metrics


class Regularised(Offline):
    """Adds KL(π_ref‖π), exact over the vocabulary at each token, to a policy's loss when `kl_weight` is above 0.

    The metric `kl/exact` is that divergence, in this direction, summed over the tokens of an example.
    """

    kl_weight: float = Field(0.0, ge=0, description="adds this times KL(π_ref‖π), exact, summed over the tokens")
    reference: Reference = Field(Reference(), description="whether, and how, the reference follows the policy")

    loss_columns: ClassVar[Sequence[AnyColumn]] = (Column.LOGPS,)  # of the policy, without the regulariser's

    @property
    def columns(self) -> tuple[AnyColumn, ...]:
        return (*self.loss_columns, *((Column.REFERENCE_KL,) if self.kl_weight else ()))

    def refresh(self, step: int) -> float | None:
        return self.reference.decay_after(step)

    def regularised(self, terms: Terms, batch: Batch, columns: Mapping[str, Tensor], rows: int | None = None) -> Terms:
        """[B] terms with the regulariser of the first `rows` rows of each example (None: of all)."""
        if not self.kl_weight:
            return terms
        per_row = sequence_logprob(columns["policy/reference_kl"], batch.mask)  # a masked sum, here of KLs
        kl = batch.by_example(per_row)[:, :rows].sum(1)
        return Terms(terms.loss + self.kl_weight * kl, {**terms.metrics, "kl/exact": kl.detach()})

    @model_validator(mode="after")
    def _reference_fits(self) -> Regularised:
        if self.kl_weight and self.reference.cached:
            raise Unfit(
                "an exact KL needs the reference itself, not its cached log-probs",
                key="reference",
                rule="cached: false with kl_weight above 0",
                remedy="take cached out, or set kl_weight: 0",
            )
        if self.reference != Reference() and not (self.needs or self.kl_weight):
            raise Unfit(
                "there is no reference that could follow the policy",
                key="reference",
                rule="a loss that compares with a reference, or kl_weight above 0",
                remedy="take reference out",
            )
        return self


def refuse_cache(reference: Reference) -> None:
    """Raises Unfit when a method that learns from its own samples asks for cached log-probs."""
    if reference.cached:
        raise Unfit(
            "log-probs of samples cannot be cached: they are new at every step",
            key="reference",
            rule="cached: false with an algorithm that samples",
            remedy="take cached out",
        )

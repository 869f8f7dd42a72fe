"""d-PM: a classifier of answers that learns from annotators who disagree, instead of voting their disagreement away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from rayalign.algorithms.base import Offline
from rayalign.algorithms.groups import place_of, row
from rayalign.algorithms.votes import GAP, measured, of_voted, vote_shares
from rayalign.errors import DataError
from rayalign.maths.disagreement import batch_posterior, fit_temperature, posterior_divergence, vote_prior
from rayalign.record import Unfit
from rayalign.types import Batch, Column, Example, Group, Metrics, Terms

Ranges = tuple[tuple[int, int], ...]
LEAST_VOTED = 20  # answers that a temperature is fitted on
LEAST = -700.0  # of log q: its exponential is still a number, so that sums of them are
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "published": {
        "objective": "kl_q_r",
        "detach_posterior": False,
        "prior_weight": 0.0,
        "mass": "batch",
        "temperature_scaling": False,
    }
}


class Disagreement(Offline):
    """A preference model of disagreeing annotators: a classifier over vote classes, trained on votes.

    The objectives kl_q_r, kl_r_q and js draw q(l|x) to the posterior r(l|x_i) ∝ p_i(l)·q(l|x_i)/Σ_j q(l|x_j), where
    p_i are the smoothed votes and the sum goes over all rows of the step, on all ranks. The baselines: majority,
    cross entropy to the class with most votes (ties share); soft, to the shares of the votes; prior, to p_i.

    As published, the gradient flows through r too. That form sharpens itself into over-confidence where votes are few;
    by default r is a fixed target, mixed with the prior's cross entropy. Of the published and the mixed forms, these
    defaults were best on held-out real ratings (tests/bench/disagreement.py); `prior` and `soft` alone come as near as
    the seeds tell apart. An answer on which nobody voted has a uniform prior, and is counted (votes/none).
    """

    paper: ClassVar = "Wang et al. 2023 (d-PM), arXiv:2310.05782; Rolf et al. 2022, arXiv:2202.14000 (the posterior)"
    rows: ClassVar = ("votes",)
    network: ClassVar = "score"
    columns: ClassVar = (Column.CLASSES,)
    name: Literal["disagreement"] = "disagreement"
    preset: Literal["published"] | None = Field(
        None, description="published: KL(q‖r) with the gradient through r and nothing mixed in, unless a key says else"
    )
    classes: tuple[str, ...] = Field(
        min_length=2, description="what votes are for, in their order", examples=[["bad", "neutral", "good"]]
    )
    weights: tuple[float, ...] | None = Field(
        None, description="what each class is worth to a scorer; none: from −1 for the first to 1 for the last, evenly"
    )
    ratings: Annotated[Ranges, Field(min_length=2)] | None = Field(
        None,
        description="ratings that are votes for each class, from … to, where rows have ratings: [[1, 2], [3, 3], "
        "[4, 5]]. None: each whole number is a class",
    )
    objective: Literal["kl_q_r", "kl_r_q", "js", "majority", "soft", "prior"] = Field(
        "js", description="d-PM by divergence of q and r: KL(q‖r), KL(r‖q), Jensen-Shannon; or a baseline"
    )
    smoothing: float = Field(
        0.1,
        ge=0,
        description="α of the prior: votes that each class has before anybody voted; 0 takes "
        "shares as they are, of which a row has one vote in all",
    )
    detach_posterior: bool = Field(True, description="r is a fixed target; false: the gradient flows through it")
    prior_weight: float = Field(
        0.5, ge=0, le=1, description="share of the cross entropy to the prior in the loss; the divergence has the rest"
    )
    mass: Literal["batch", "moving_average", "votes"] = Field(
        "batch",
        description="how common each class is: Σ q of the step's rows, each by its trust; the moving average over "
        "steps of q's mean; or the rows' priors",
    )
    mass_decay: float = Field(0.9, ge=0, lt=1, description="of the moving average: what a step leaves of those before")
    temperature_scaling: bool = Field(
        True,
        description="at the end divide the logits by the temperature that is best on held-out votes, 20 rows with "
        "some at least; it goes into the exported head's weights (Guo et al. 2017)",
    )

    @property
    def class_weights(self) -> tuple[float, ...]:
        count = len(self.classes)
        return self.weights or tuple(2.0 * place / (count - 1) - 1.0 for place in range(count))

    @property
    def diverges(self) -> bool:
        """Whether the posterior has a part in the loss."""
        return self.objective in ("kl_q_r", "kl_r_q", "js") and self.prior_weight < 1

    @property
    def statistics(self) -> Callable[..., dict[str, Tensor]] | None:  # type: ignore[override]
        return self._mass if self.diverges else None

    @property
    def further_statistics(self) -> Callable[..., dict[str, Tensor]] | None:  # type: ignore[override]
        return self._pull if self.diverges and not self.detach_posterior and self.mass != "votes" else None

    @property
    def carries(self) -> dict[str, float]:  # type: ignore[override]
        return {"mass": self.mass_decay} if self.mass == "moving_average" else {}

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """Each answer with its votes. Raises DataError for votes that do not match the classes."""
        examples, none = [], 0
        for group in groups:
            for index in range(len(group.completions)):
                votes = self._votes(group, index)
                none += sum(votes) == 0
                examples.append(Example((row(group, index),), {f"votes/{place}": n for place, n in enumerate(votes)}))
        return examples, {"votes/none": float(none), "answers/kept": float(len(examples))}

    def _votes(self, group: Group, index: int) -> tuple[float, ...]:
        count = len(self.classes)
        votes = (0.0,) * count if group.votes is None else group.votes[index]
        if len(votes) != count:
            raise DataError(
                "these votes do not match the classes",
                where=place_of(group),
                value=f"votes for {len(votes)} classes",
                rule=f"{count} classes: {', '.join(self.classes)}",
                remedy="correct algorithm.classes; with ratings, set algorithm.ratings: which of them are a vote for "
                "each class",
            )
        if not all(0 <= vote < float("inf") for vote in votes):
            raise DataError(
                "these votes cannot be",
                where=place_of(group),
                value=list(votes),
                rule="counts of at least 0, one for each class",
                remedy="correct or drop this row",
            )
        return votes

    def _mass(self, batch: Batch, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Σ_j q(l|x_j), or of the priors, each row as much as it is trusted: [L]."""
        trust = batch.weight.double()
        shares = self._prior(_counts(batch)) if self.mass == "votes" else _log_q(columns).exp()
        return {"mass": trust @ shares} | ({"mass/rows": trust.sum()} if self.carries else {})

    def _pull(self, batch: Batch, columns: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the gradient through the mass needs: Σ_i trust_i·∂D_i/∂log mass, [L]."""
        with torch.enable_grad():
            log_mass = _or_one(known["mass"]).log().requires_grad_()
            divergence = self._divergence(_log_q(columns).detach(), self._prior(_counts(batch)), log_mass)
            return {"pull": torch.autograd.grad(batch.weight.double() @ divergence, log_mass)[0]}

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        log_q, counts = _log_q(columns), _counts(batch)
        if self.objective in ("majority", "soft"):
            loss = -(vote_shares(counts, majority=self.objective == "majority") * log_q).sum(-1)
            return Terms(loss, measured(log_q.detach(), counts))
        prior = self._prior(counts)
        loss = -(prior * log_q).sum(-1)
        if self.diverges:
            mass = _or_one(statistics["mass"])
            divergence = self._divergence(log_q, prior, mass.log())
            if "pull" in statistics:
                # The mass is a number here; what is missing of its gradient is that of Σ_l pull_l·log mass_l. This
                # row's part in it adds 0 to the loss, and is weighed by its trust as the rest of its loss is.
                part = (statistics["pull"] * statistics.get("mass/fresh", 1.0) * log_q.exp() / mass).sum(-1)
                divergence = divergence + part - part.detach()
            loss = self.prior_weight * loss + (1 - self.prior_weight) * divergence
        return Terms(loss, measured(log_q.detach(), counts))

    def _divergence(self, log_q: Tensor, prior: Tensor, log_mass: Tensor) -> Tensor:
        log_r = batch_posterior(log_q, prior, log_mass=log_mass)
        return posterior_divergence(
            log_q, log_r.detach() if self.detach_posterior else log_r, divergence=self.objective
        )

    def _prior(self, counts: Tensor) -> Tensor:
        """[B, L]; uniform where nobody has voted, whatever the smoothing."""
        nobody = counts.sum(-1, keepdim=True) == 0
        return vote_prior(torch.where(nobody, 1.0, counts), smoothing=self.smoothing)

    def fitted_temperature(self, examples: Sequence[Example]) -> tuple[float, float, float] | None:
        """The temperature that is best on these votes, and the nll of a vote before and with it.

        Args:
            examples: annotated with the policy's CLASSES.

        Returns:
            None where there are fewer than 20 answers with votes.
        """
        voted = [example for example in examples if sum(_votes_of(example)) > 0]
        if not self.temperature_scaling or len(voted) < LEAST_VOTED:
            return None
        logits = torch.tensor(np.stack([example.sequences[0].columns["policy/classes"] for example in voted])).double()
        shares = vote_shares(torch.tensor([_votes_of(example) for example in voted], dtype=torch.float64))
        found = fit_temperature(logits, shares)
        before, after = (float(-(shares * torch.log_softmax(logits / t, -1)).sum(-1).mean()) for t in (1.0, found))
        return found, before, after

    def summarise(self, metrics: Metrics) -> Metrics:
        """Means over all rows → over those with votes, and the expected calibration error, for its bins."""
        found = of_voted(metrics)
        gaps = [value for name, value in found.items() if name.startswith(GAP)]
        rest = {name: value for name, value in found.items() if not name.startswith(GAP)}
        return rest | ({"calibration/ece": sum(map(abs, gaps))} if gaps else {})

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """A preset's settings, where no key says otherwise."""
        if isinstance(data, Mapping) and data.get("preset") in PRESETS:
            return {**PRESETS[data["preset"]], **data}
        return data

    @model_validator(mode="after")
    def _classes_fit(self) -> Disagreement:
        if len(set(self.classes)) < len(self.classes):
            raise Unfit(
                "two classes have the same name",
                key="classes",
                rule="a name for each class",
                remedy="rename one of them",
            )
        for key, value in (("weights", self.weights), ("ratings", self.ratings)):
            if value is not None and len(value) != len(self.classes):
                raise Unfit(
                    f"there are not as many {key} as classes",
                    key=key,
                    rule=f"{len(self.classes)}, one for each of {', '.join(self.classes)}",
                    remedy=f"give {len(self.classes)}, or take {key} out",
                )
        ends = [end for each in sorted(self.ratings or ()) for end in each]
        twice = any(high == low for high, low in zip(ends[1::2], ends[2::2], strict=False))
        if twice or ends != sorted(ends):
            raise Unfit(
                "these ratings are not apart",
                key="ratings",
                rule="[lowest, highest] for each class, no rating in two of them",
                remedy="write ratings: [[1, 2], [3, 3], [4, 5]], say",
            )
        return self

    @model_validator(mode="after")
    def _settings_fit(self) -> Disagreement:
        if self.weights is not None and len(set(self.weights)) == 1:
            raise Unfit(
                "all classes are worth the same",
                key="weights",
                rule="weights that differ, so that answers can be ranked",
                remedy="take weights out: they then go from −1 to 1",
            )
        return self


def _log_q(columns: Mapping[str, Tensor]) -> Tensor:
    """[B, L] in float64: a sum over thousands of rows is then the same in any order."""
    return torch.log_softmax(columns["policy/classes"].double(), -1).clamp(min=LEAST)


def _or_one(mass: Tensor) -> Tensor:
    """[L]; 1 for a class without any mass (votes alone and none for it, or rows without any trust), which so stays as
    unlikely as its votes make it."""
    return torch.where(mass > 0, mass, 1.0)


def _counts(batch: Batch) -> Tensor:
    """[B, L]"""
    return torch.stack([batch.values[name] for name in _names(batch.values)], -1).double()


def _votes_of(example: Example) -> list[float]:
    return [float(example.values[name]) for name in _names(example.values)]  # type: ignore[arg-type]


def _names(values: Mapping[str, Any]) -> list[str]:
    """votes/0, votes/1, …"""
    return [f"votes/{place}" for place in range(sum(name.startswith("votes/") for name in values))]

"""Losses of one pair, by name: `loss: {name: ipo, tau: 0.1}`. The formulas are those of `maths.preference`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor

from rayalign.maths import preference as maths
from rayalign.record import Record, Unfit
from rayalign.registry import Tagged

SINGLE_LOSSES = {
    name: f"rayalign.algorithms.losses:{record}"
    for name, record in {
        "dpo": "DPO",
        "robust": "RobustDPO",
        "soft": "SoftDPO",
        "ipo": "IPO",
        "psi_po": "PsiPO",
        "hinge": "Hinge",
        "slic_hf": "SLiCHF",
        "simpo": "SimPO",
        "orpo": "ORPO",
        "spin": "SPIN",
    }.items()
}
PAIR_LOSSES = {**SINGLE_LOSSES, "mix": "rayalign.algorithms.losses:Mix"}
Beta = Annotated[float, Field(gt=0, description="strength of the pull towards the reference")]


@dataclass(frozen=True)
class Pair:
    """What a pair loss may look at, for B pairs.

    Attributes:
        policy: [B, n] log-probs of the answers, summed over tokens, with gradient: chosen, rejected, and the
            target of a loss that has one; n = 2: the chosen one is the target.
        tokens: [B, n] how many tokens they have.
        reference: [B, n] as `policy`, under the reference; None where the loss needs none.
        values: name → [B]. `prob_chosen`: P(chosen ≻ rejected); `utility_gap`: Ψ-PO's u(chosen) − u(rejected).
    """

    policy: Tensor
    tokens: Tensor
    reference: Tensor | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def ratio(self) -> Tensor:
        """[B, n] log π − log π_ref."""
        assert self.reference is not None, "this loss says that it needs no reference"
        return self.policy - self.reference

    @property
    def gap(self) -> Tensor:
        """[B] h, see MATHS: the chosen's log-ratio minus the rejected's."""
        return self.ratio[:, 0] - self.ratio[:, 1]

    @property
    def mean_gap(self) -> Tensor:
        """[B] h of mean log-probs a token."""
        means = self.ratio / self.tokens
        return means[:, 0] - means[:, 1]

    @property
    def means(self) -> Tensor:
        """[B, n] mean log-prob a token."""
        return self.policy / self.tokens


class PairLoss(Record):
    """What all pair losses share.

    Attributes:
        reference: whether reference log-probs are needed.
    """

    reference: ClassVar[bool] = True

    @property
    def takes_best(self) -> bool:
        """Whether the group's best answer is a third row of each pair, unless it is the chosen one."""
        return False

    def of(self, pair: Pair) -> Tensor:
        """[B], unreduced."""
        raise TypeError(f"{type(self).__name__} defines no loss: give it an of(pair)")

    def rewards(self, pair: Pair) -> Tensor:
        """[B, n] the implicit rewards, for metrics: β·log(π/π_ref), or what a loss has in its place."""
        return getattr(self, "beta", 1.0) * pair.ratio

    def metrics(self, pair: Pair) -> dict[str, Tensor]:
        """This loss's own, by name: [B]."""
        return {}


class DPO(PairLoss):
    """Direct preference optimisation; label smoothing above 0 makes it cDPO (Mitchell 2023)."""

    paper: ClassVar = "Rafailov et al. 2023, arXiv:2305.18290"
    name: Literal["dpo"] = Field("dpo", description="which loss")
    beta: Beta = 0.1
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed probability that a label is wrong")

    def of(self, pair: Pair) -> Tensor:
        return maths.dpo_loss(pair.gap, beta=self.beta, label_smoothing=self.label_smoothing)


class RobustDPO(PairLoss):
    """DPO that is unbiased when labels are flipped with a known probability."""

    paper: ClassVar = "Chowdhury et al. 2024, arXiv:2403.00409"
    name: Literal["robust"] = Field("robust", description="which loss")
    beta: Beta = 0.1
    flip_prob: float = Field(0.1, ge=0, lt=0.5, description="probability that a label is flipped")

    def of(self, pair: Pair) -> Tensor:
        return maths.robust_dpo_loss(pair.gap, beta=self.beta, flip_prob=self.flip_prob)


class SoftDPO(PairLoss):
    """DPO on probabilities instead of labels: shares of votes, or what a judge gives. Certain labels make it DPO."""

    paper: ClassVar = "Lee et al. 2023 (RLAIF), arXiv:2309.00267"
    name: Literal["soft"] = Field("soft", description="which loss")
    beta: Beta = 0.1

    def of(self, pair: Pair) -> Tensor:
        return maths.soft_dpo_loss(pair.gap, beta=self.beta, prob_chosen=pair.values["prob_chosen"])


class IPO(PairLoss):
    """Identity preference optimisation: the gap is drawn to 1/(2τ) and stays there, also when labels are certain."""

    paper: ClassVar = "Azar et al. 2023, arXiv:2310.12036"
    name: Literal["ipo"] = Field("ipo", description="which loss")
    tau: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    mean: bool = Field(False, description="means of log-probs instead of sums: another objective than the paper's")

    def of(self, pair: Pair) -> Tensor:
        return maths.ipo_loss(pair.mean_gap if self.mean else pair.gap, tau=self.tau)

    def rewards(self, pair: Pair) -> Tensor:
        return self.tau * (pair.ratio / pair.tokens if self.mean else pair.ratio)

    def metrics(self, pair: Pair) -> dict[str, Tensor]:
        return {"ipo/gap": pair.mean_gap if self.mean else pair.gap}


class PsiPO(PairLoss):
    """Ψ-PO: the gap is drawn to the difference of utilities E Ψ(P(y ≻ y′)) over τ.

    With the identity for Ψ, a pair alone and its label certain it is IPO: votes, probabilities or more than two
    answers a prompt are what it is for.
    """

    paper: ClassVar = "Azar et al. 2023, arXiv:2310.12036"
    name: Literal["psi_po"] = Field("psi_po", description="which loss")
    tau: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    psi: Literal["identity", "logit"] = Field("identity", description="Ψ; logit is RLHF's own, clamped")
    eps: float = Field(1e-3, gt=0, lt=0.5, description="probabilities are clamped to [eps, 1 − eps] for logit")

    def of(self, pair: Pair) -> Tensor:
        return maths.psi_po_loss(pair.gap, pair.values["utility_gap"], tau=self.tau)

    def rewards(self, pair: Pair) -> Tensor:
        return self.tau * pair.ratio

    def metrics(self, pair: Pair) -> dict[str, Tensor]:
        return {"psi_po/gap": pair.gap, "psi_po/target": pair.values["utility_gap"] / self.tau}

    def utilities(self, preferences: Tensor) -> Tensor:
        """[B, K, K] P(i ≻ j) → [B, K]."""
        psi = maths.psi_identity if self.psi == "identity" else lambda p: maths.psi_logit(p, eps=self.eps)
        return maths.psi_utilities(preferences, psi=psi)


class Hinge(PairLoss):
    """SLiC's hinge on log-ratios."""

    paper: ClassVar = "Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2024, arXiv:2309.06657"
    name: Literal["hinge"] = Field("hinge", description="which loss")
    beta: Beta = 0.1

    def of(self, pair: Pair) -> Tensor:
        return maths.hinge_loss(pair.gap, beta=self.beta)

    def metrics(self, pair: Pair) -> dict[str, Tensor]:
        return {"hinge/active": (self.beta * pair.gap < 1).float()}


class SLiCHF(PairLoss):
    """SLiC-HF: a margin between the answers' log-probs, and the likelihood of a target. No reference model."""

    paper: ClassVar = "Zhao et al. 2023, arXiv:2305.10425"
    reference: ClassVar = False
    name: Literal["slic_hf"] = Field("slic_hf", description="which loss")
    delta: float = Field(1.0, ge=0, description="margin, nats")
    weight: float = Field(0.1, ge=0, description="of the target's log-likelihood")
    mean: bool = Field(False, description="means of log-probs instead of sums")
    target: Literal["chosen", "best"] = Field(
        "chosen", description="whose likelihood is kept up: the pair's chosen answer, or the best one (gold) of all"
    )

    @property
    def takes_best(self) -> bool:
        return self.target == "best"

    def of(self, pair: Pair) -> Tensor:
        logps = self.rewards(pair)
        chosen, rejected, target = logps[:, 0], logps[:, 1], logps[:, 2 if logps.shape[1] > 2 else 0]
        return maths.slic_hf_loss(chosen, rejected, target, delta=self.delta, weight=self.weight)

    def rewards(self, pair: Pair) -> Tensor:
        return pair.means if self.mean else pair.policy

    def metrics(self, pair: Pair) -> dict[str, Tensor]:
        logps = self.rewards(pair)
        return {"slic_hf/active": (logps[:, 0] - logps[:, 1] < self.delta).float()}


class SimPO(PairLoss):
    """Mean log-probs with a margin. No reference model."""

    paper: ClassVar = "Meng et al. 2024, arXiv:2405.14734"
    reference: ClassVar = False
    name: Literal["simpo"] = Field("simpo", description="which loss")
    beta: float = Field(2.0, gt=0, description="scale of the mean log-probs")
    gamma: float = Field(0.5, description="margin")

    def of(self, pair: Pair) -> Tensor:
        return maths.simpo_loss(pair.means[:, 0], pair.means[:, 1], beta=self.beta, gamma=self.gamma)

    def rewards(self, pair: Pair) -> Tensor:
        return self.beta * pair.means


class ORPO(PairLoss):
    """Likelihood of the chosen answer and the odds ratio of the two, in one. No reference model."""

    paper: ClassVar = "Hong et al. 2024, arXiv:2403.07691"
    reference: ClassVar = False
    name: Literal["orpo"] = Field("orpo", description="which loss")
    weight: float = Field(0.1, ge=0, description="of the odds ratio")

    def of(self, pair: Pair) -> Tensor:
        return maths.orpo_loss(pair.means[:, 0], pair.means[:, 1], weight=self.weight)

    def rewards(self, pair: Pair) -> Tensor:
        return pair.means

    def metrics(self, pair: Pair) -> dict[str, Tensor]:
        means = pair.means[:, 0], pair.means[:, 1]
        return {"orpo/odds_ratio_loss": maths.orpo_loss(*means, weight=1.0) + means[0]}


class SPIN(PairLoss):
    """Self-play: the data's answer against the previous iterate's own, which is the reference.

    On a data set it is one iteration, whose rejected answers the reference has written before; on any others it is
    DPO with β = λ. The algorithm spin samples those answers itself, iteration after iteration.
    """

    paper: ClassVar = "Chen et al. 2024, arXiv:2401.01335"
    name: Literal["spin"] = Field("spin", description="which loss")
    lam: float = Field(1.0, gt=0, description="λ; the iteration contracts to the data for λ above ½")

    def of(self, pair: Pair) -> Tensor:
        return maths.spin_loss(pair.gap, lam=self.lam)

    def rewards(self, pair: Pair) -> Tensor:
        return self.lam * pair.ratio


_ALGORITHMS = {
    name: f"it is an algorithm of its own: algorithm: {{name: {name}, samples: 4}}; from a data set without samples"
    for name in ("kto", "cringe")
}
AnyPairLoss = Annotated[SerializeAsAny[Record], Tagged("loss", PAIR_LOSSES, "of", "dpo", _ALGORITHMS)]
SinglePairLoss = Annotated[SerializeAsAny[Record], Tagged("loss", SINGLE_LOSSES, "of")]


class Mix(PairLoss):
    """Several pair losses, weighted and added."""

    name: Literal["mix"] = Field("mix", description="which loss")
    losses: tuple[SinglePairLoss, ...] = Field(min_length=1, description="pair losses, each of its own kind")
    weights: tuple[Annotated[float, Field(gt=0)], ...] = Field((), description="their factors in the sum; none: all 1")

    @property
    def reference(self) -> bool:  # type: ignore[override]
        return any(loss.reference for loss in self.losses)

    @property
    def takes_best(self) -> bool:
        return any(loss.takes_best for loss in self.losses)

    def of(self, pair: Pair) -> Tensor:
        weights = self.weights or (1.0,) * len(self.losses)
        terms = [weight * loss.of(pair) for weight, loss in zip(weights, self.losses, strict=True)]
        return torch.stack(terms).sum(0)

    def rewards(self, pair: Pair) -> Tensor:
        """The first loss's."""
        return self.losses[0].rewards(pair)

    def metrics(self, pair: Pair) -> dict[str, Tensor]:
        found = {f"loss/{loss.name}": loss.of(pair) for loss in self.losses}
        return {name: value for loss in self.losses for name, value in loss.metrics(pair).items()} | found

    @model_validator(mode="after")
    def _fit(self) -> Mix:
        names = [loss.name for loss in self.losses]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise Unfit(
                f"{twice} stands in the mix twice",
                key="losses",
                rule="different losses, each once",
                remedy="keep one of them, with the sum of their weights",
            )
        if self.weights and len(self.weights) != len(names):
            raise Unfit(
                f"{len(self.weights)} weights for {len(names)} losses",
                key="weights",
                rule="one weight a loss, or none at all",
                remedy=f"write weights: [{', '.join(['1.0'] * len(names))}], say",
            )
        return self

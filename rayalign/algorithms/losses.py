"""Losses of one pair, by name: `loss: {name: ipo, tau: 0.1}`. The formulas are those of `maths.preference`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor

from rayalign.maths import preference as maths
from rayalign.record import Record
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
    }.items()
}
PAIR_LOSSES = {**SINGLE_LOSSES, "mix": "rayalign.algorithms.losses:Mix"}
Beta = Annotated[float, Field(gt=0, description="strength of the pull towards the reference")]


@dataclass(frozen=True)
class Pair:
    """What a pair loss may look at, for B pairs; chosen first, rejected second.

    Attributes:
        policy: [B, 2] log-probs of the answers, summed over tokens, with gradient.
        tokens: [B, 2] how many tokens they have.
        reference: [B, 2] the same under the reference; None where the loss needs none.
        values: name → [B]. `prob_chosen`: P(chosen ≻ rejected); `utility_gap`: Ψ-PO's u(chosen) − u(rejected).
        target: [B] log-prob of a third answer, gold text say; None: the chosen one is the target.
    """

    policy: Tensor
    tokens: Tensor
    reference: Tensor | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    target: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """[B, 2] log π − log π_ref."""
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
        """[B, 2] mean log-prob a token."""
        return self.policy / self.tokens


class PairLoss(Record):
    """What all pair losses share.

    Attributes:
        reference: whether reference log-probs are needed.
        scale: β of the implicit rewards β·log(π/π_ref), for metrics; 1 where there is none.
    """

    reference: ClassVar[bool] = True

    @property
    def scale(self) -> float:
        return getattr(self, "beta", getattr(self, "tau", 1.0))

    def of(self, pair: Pair) -> Tensor:
        """[B], unreduced."""
        raise TypeError(f"{type(self).__name__} defines no loss: give it an of(pair)")


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
    """DPO on probabilities instead of labels: shares of votes, or what a judge gives."""

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


class PsiPO(PairLoss):
    """Ψ-PO: the gap is drawn to the difference of utilities E Ψ(P(y ≻ y′)) over τ; identity Ψ is IPO."""

    paper: ClassVar = "Azar et al. 2023, arXiv:2310.12036"
    name: Literal["psi_po"] = Field("psi_po", description="which loss")
    tau: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    psi: Literal["identity", "logit"] = Field("identity", description="Ψ; logit is RLHF's own, clamped")
    eps: float = Field(1e-3, gt=0, lt=0.5, description="probabilities are clamped to [eps, 1 − eps] for logit")

    def of(self, pair: Pair) -> Tensor:
        return maths.psi_po_loss(pair.gap, pair.values["utility_gap"], tau=self.tau)

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


class SLiCHF(PairLoss):
    """SLiC-HF: a margin between the answers' log-probs, and the likelihood of a target. No reference model."""

    paper: ClassVar = "Zhao et al. 2023, arXiv:2305.10425"
    reference: ClassVar = False
    name: Literal["slic_hf"] = Field("slic_hf", description="which loss")
    delta: float = Field(1.0, ge=0, description="margin, nats")
    weight: float = Field(0.1, ge=0, description="of the target's log-likelihood")
    mean: bool = Field(False, description="means of log-probs instead of sums")

    def of(self, pair: Pair) -> Tensor:
        chosen, rejected = (pair.means if self.mean else pair.policy).unbind(-1)
        target = chosen if pair.target is None else pair.target
        return maths.slic_hf_loss(chosen, rejected, target, delta=self.delta, weight=self.weight)


class SimPO(PairLoss):
    """Mean log-probs with a margin. No reference model."""

    paper: ClassVar = "Meng et al. 2024, arXiv:2405.14734"
    reference: ClassVar = False
    name: Literal["simpo"] = Field("simpo", description="which loss")
    beta: float = Field(2.0, gt=0, description="scale of the mean log-probs")
    gamma: float = Field(0.5, description="margin")

    def of(self, pair: Pair) -> Tensor:
        return maths.simpo_loss(*pair.means.unbind(-1), beta=self.beta, gamma=self.gamma)


class ORPO(PairLoss):
    """Likelihood of the chosen answer and the odds ratio of the two, in one. No reference model."""

    paper: ClassVar = "Hong et al. 2024, arXiv:2403.07691"
    reference: ClassVar = False
    name: Literal["orpo"] = Field("orpo", description="which loss")
    weight: float = Field(0.1, ge=0, description="of the odds ratio")

    def of(self, pair: Pair) -> Tensor:
        return maths.orpo_loss(*pair.means.unbind(-1), weight=self.weight)


AnyPairLoss = Annotated[SerializeAsAny[Record], Tagged("loss", PAIR_LOSSES, "of", "dpo")]
SinglePairLoss = Annotated[SerializeAsAny[Record], Tagged("loss", SINGLE_LOSSES, "of")]


class Part(Record):
    """One loss of several."""

    loss: SinglePairLoss = Field(description="a pair loss")
    weight: float = Field(1.0, gt=0, description="its factor in the sum")


class Mix(PairLoss):
    """Several pair losses, weighted and added."""

    name: Literal["mix"] = Field("mix", description="which loss")
    parts: tuple[Part, ...] = Field(min_length=1, description="the losses and their weights")

    @property
    def reference(self) -> bool:  # type: ignore[override]
        return any(part.loss.reference for part in self.parts)  # type: ignore[attr-defined]

    @property
    def scale(self) -> float:
        return self.parts[0].loss.scale  # type: ignore[attr-defined]

    def of(self, pair: Pair) -> Tensor:
        terms = [part.weight * part.loss.of(pair) for part in self.parts]  # type: ignore[attr-defined]
        return torch.stack(terms).sum(0)

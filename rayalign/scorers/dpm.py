"""d-PM as a scorer: a classifier over vote classes says what annotators would, and how far they would agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from rayalign.errors import ConfigError
from rayalign.scorers.base import ScoreFunction
from rayalign.scorers.network import NetworkScorer, NetworkScores, check_checkpoint, classes_of
from rayalign.types import Group, Judgement


class DpmScorer(NetworkScorer):
    """A preference model of disagreeing annotators: an answer's score is its expected worth, Σ q(class)·weight.

    The model is a classifier (AutoModelForSequenceClassification), as `algorithm: disagreement` writes it, or another.
    Prompt and answer become tokens as for `reward_model`. With `preferences` it says P(i ≻ j) as well: that annotators'
    votes for the two, drawn apart, put i above j, a tie counting as ½. Soft labels of `soft` DPO are these.

    The agreement of an answer is the probability that two annotators choose the same class for it, 1/classes at the
    least. Answers with less than `min_agreement` are contested: they have scores, but nothing is learned from them, in
    no pair and no ranking. With `weigh` the others count less the less is agreed on: from 0 for 1/classes to 1 for
    certainty, and what is learned from several as the most contested of them.

    Metrics, means over a group's answers: `dpm/entropy` (nats), `dpm/agreement`, `dpm/contested` (their share),
    `dpm/trust`, and `dpm/share_NAME`, the probability of each class. The files of `rayalign label` have those of each
    answer as well, under `shares`.
    """

    paper: ClassVar = "Wang et al. 2023 (d-PM), arXiv:2310.05782"
    what: ClassVar = "preference model"
    head: ClassVar = "head for classes"
    algorithm: ClassVar = "disagreement"
    labels: ClassVar = "two classes or more"
    name: Literal["dpm"] = "dpm"
    model: str = Field(
        description="folder of a checkpoint with several classes, or a hub id",
        examples=["runs/dpm/checkpoints/step-30"],
    )
    weights: tuple[float, ...] | None = Field(
        None,
        description="what each class is worth, in the model's order; none: as in its training, else from −1 to 1. "
        "[0, 0, −1]: least probability of the last class first",
    )
    preferences: bool = Field(False, description="give P(i ≻ j) besides, for losses that learn from probabilities")
    min_agreement: float | None = Field(
        None, gt=0, lt=1, description="answers on which annotators would agree less are not learned from; none: all are"
    )
    weigh: bool = Field(False, description="learn less from answers the less annotators would agree on them")

    @property
    def gives_preferences(self) -> bool:
        return self.preferences

    def fits(self, count: int) -> bool:
        return count > 1

    def check(self, model: str, *, trust_remote_code: bool = False) -> None:
        known = check_checkpoint(self)
        if known is not None:
            self.weights_of(known)
            self.check_agreement(known)

    def check_agreement(self, known: Any) -> None:
        """Whether `min_agreement` can leave anything out. Raises ConfigError.

        Args:
            known: the checkpoint's config.
        """
        names, least = classes_of(known), self.min_agreement
        if least is not None and least <= 1 / len(names):
            raise ConfigError(
                "no answer would be contested",
                where="key scorer.min_agreement",
                value=least,
                rule=f"above {1 / len(names):.3g}: of {len(names)} classes two annotators choose the same one so often "
                "by chance",
                remedy=f"set min_agreement={(1 + 1 / len(names)) / 2:.2g}, say, or take it out",
            )

    def weights_of(self, known: Any) -> tuple[float, ...]:
        """What each class of a checkpoint is worth. Raises ConfigError when `weights` are of other classes.

        Args:
            known: the checkpoint's config.
        """
        names, weights = classes_of(known), self.weights or getattr(known, "class_weights", None)
        if weights is None:
            weights = tuple(2.0 * place / (len(names) - 1) - 1.0 for place in range(len(names)))
        if len(weights) != len(names):
            raise ConfigError(
                "there are not as many weights as classes",
                where="key scorer.weights",
                value=list(weights),
                rule=f"{len(names)}, for {', '.join(names)}",
                remedy="give a weight for each class, or take weights out",
            )
        if len(set(weights)) == 1:
            raise ConfigError(
                "all classes are worth the same",
                where="key scorer.weights",
                value=list(weights),
                rule="weights that differ, so that answers can be ranked",
                remedy="take weights out: they are then as in the model's training, or go from −1 to 1",
            )
        return tuple(float(weight) for weight in weights)

    def start(self) -> ScoreFunction:
        return _Annotators(self)


class _Annotators:
    """The ScoreFunction: groups → judgements."""

    def __init__(self, config: DpmScorer):
        self._config = config
        self._numbers = NetworkScores(config)
        known = self._numbers.model_config
        self.classes, self.weights = classes_of(known), config.weights_of(known)
        config.check_agreement(known)

    def distributions(self, groups: Sequence[Group]) -> list[Any]:
        """For each group a tensor [K, L], log q of the classes for each completion, in float64."""
        import torch

        return [torch.log_softmax(logits.double(), -1) for logits in self._numbers(groups)]

    def __call__(self, groups: Sequence[Group]) -> list[Judgement]:
        return [self._judged(log_q) for log_q in self.distributions(groups)]

    def _judged(self, log_q: Any) -> Judgement:
        import torch

        from rayalign.algorithms.votes import agreement, entropy
        from rayalign.maths.disagreement import preference_score

        weights = torch.tensor(self.weights, dtype=torch.float64)
        agreed, least, by_chance = agreement(log_q), self._config.min_agreement, 1.0 / len(self.classes)
        contested = (agreed < least).tolist() if least is not None else []
        trust = ((agreed - by_chance) / (1.0 - by_chance)).clamp(0, 1).tolist() if self._config.weigh else []
        numbers = {
            "dpm/entropy": entropy(log_q).mean(),
            "dpm/agreement": agreed.mean(),
            **({"dpm/contested": sum(contested) / len(contested)} if contested else {}),
            **({"dpm/trust": sum(trust) / len(trust)} if trust else {}),
            **{f"dpm/share_{name}": log_q[:, place].exp().mean() for place, name in enumerate(self.classes)},
        }
        return Judgement(
            tuple(preference_score(log_q, weights=weights).tolist()),
            beaten(log_q.exp(), weights) if self._config.preferences and len(log_q) > 1 else None,
            {name: float(value) for name, value in numbers.items()},
            tuple(contested),
            trust=tuple(trust),
            shares=tuple(map(tuple, log_q.exp().tolist())),
        )


def beaten(probs: Any, weights: Any) -> tuple[tuple[float, ...], ...]:
    """P(i ≻ j) = P(weight of i's class > weight of j's) + ½ P(they are equal), classes drawn apart.

    Args:
        probs: [K, L] of the classes.
        weights: [L].

    Returns:
        K×K, P(i ≻ j) + P(j ≻ i) = 1, ½ on the diagonal.
    """
    import torch

    wins = (torch.sign(weights.unsqueeze(1) - weights.unsqueeze(0)) + 1) / 2  # [L, L] of a class over another
    found = probs @ wins @ probs.T
    found = (found + 1 - found.T) / 2  # what rounding left of it
    return tuple(tuple(row) for row in found.clamp(0, 1).tolist())

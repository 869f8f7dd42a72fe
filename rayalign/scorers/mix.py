"""Several scorers as one: their scores, weighted and added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, model_validator

from rayalign.errors import ScoreError
from rayalign.record import Record, Unfit
from rayalign.registry import Tagged
from rayalign.scorers import SCORERS
from rayalign.scorers.asking import Asker
from rayalign.scorers.base import ScoreFunction, ScorerConfig, score_groups
from rayalign.types import Group, Judgement

SINGLE = {name: dotted for name, dotted in SCORERS.items() if name != "mix"}
SingleScorer = Annotated[SerializeAsAny[Record], Tagged("scorer", SINGLE, "start")]


class Part(Record):
    """One scorer of a mix."""

    scorer: SingleScorer = Field(
        description="any scorer but a mix; count, deadline_s and max_replacements are those of the mix",
        examples=[{"name": "rules", "rule": "vader"}],
    )
    weight: float = Field(1.0, description="its factor in the sum; below 0 it is a penalty", examples=[1.0])
    label: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="of its metric scores/LABEL; none: its name, or that of its rule or function",
        examples=["brevity"],
    )

    @property
    def called(self) -> str:
        """The label, or else what it is: a rule, or a function, by its own name."""
        own = getattr(self.scorer, "rule", None) or getattr(self.scorer, "function", None)
        return self.label or str(own or self.scorer.name).rpartition(":")[2]  # type: ignore[attr-defined]


class Mix(ScorerConfig):
    """Several scorers at once: weight · score, added up.

    Each one's mean, as it gave it, is the metric scores/LABEL; the metrics of several judges are LABEL/judge/….
    With `standardise: group` a scorer's scores of one prompt have mean 0 and standard deviation 1 before they are
    weighted (all 0 where they are equal), so that weights compare scorers of any scale; what is left is the order
    within a prompt, so that the reward's mean no longer rises as the policy gets better: look at scores/LABEL. Soft
    preferences of the parts are averaged by weight where all of them give some, and no weight is below 0. Rewards of
    tokens are weighted and added as well; the score of a part without them counts at the last token.
    """

    paper: ClassVar = "Wu et al. 2023, arXiv:2306.01693 (weighted); Shao et al. 2024, arXiv:2402.03300 (by group)"
    name: Literal["mix"] = "mix"
    scorers: tuple[Part, ...] = Field(
        min_length=1,
        description="the scorers, each with its weight",
        examples=[[{"scorer": {"name": "rules", "rule": "vader"}, "weight": 1.0}]],
    )
    standardise: Literal["none", "group"] = Field(
        "none", description="group: each scorer's scores of one prompt get mean 0 and standard deviation 1"
    )

    deadline_s: float = Field(
        600.0, gt=0, description="seconds without the scores of any group after which one is lost"
    )

    @model_validator(mode="after")
    def _apart(self) -> Mix:
        labels = [part.called for part in self.scorers]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise Unfit(
                f"two scorers of the mix are called {twice}",
                key="scorers",
                rule="a label for each that no other has: it names the metric scores/LABEL",
                remedy=f"set label: {twice}_2, say, beside the second one's weight",
            )
        reported = {getattr(part.scorer, "report_agreement", None) for part in self.scorers if self.only_judge(part)}
        if both := sorted(reported & set(labels)):
            raise Unfit(
                f"a scorer of the mix is called {both[0]}, as the rule that its judge reports",
                key="scorers",
                rule="a label for each that no other has: it names the metric scores/LABEL",
                remedy=f"take the judge's report_agreement out, or set label: {both[0]}_2, say, for the other",
            )
        if not any(part.weight for part in self.scorers):
            raise Unfit(
                "all weights are 0",
                key="scorers",
                rule="at least one weight that is not 0, or every completion scores 0",
                remedy="set weight: 1.0 for the scorer that counts; one of weight 0 is only reported",
            )
        engines = [getattr(getattr(part.scorer, "ask", None), "engine", None) for part in self.scorers]
        shares = [share for engine in engines if (share := getattr(engine, "gpu_memory", None)) is not None]
        if len(shares) > 1 and math.fsum(shares) > 0.95:
            raise Unfit(
                "the judges of a mix share one GPU, and their engines do not fit on it",
                key="scorers",
                rule="the gpu_memory of their engines adds up to 0.95 at most",
                remedy=f"set ask.engine.gpu_memory={0.9 / len(shares):.2g} for each",
            )
        if self.borrows_engine and self.count > 1:
            raise Unfit(
                "the policy's engines are one pool",
                key="count",
                rule="1 with a judge that asks the policy",
                remedy="take count out; engine.count are asked",
            )
        return self

    def only_judge(self, part: Part) -> bool:
        """Whether its metrics keep their names; those of several judges, and of other scorers, are LABEL/NAME."""
        judges = [each for each in self.scorers if each.scorer.name == "judge"]  # type: ignore[attr-defined]
        return len(judges) == 1 and judges[0] is part

    def check(self, model: str, *, trust_remote_code: bool = False) -> None:
        for part in self.scorers:
            part.scorer.check(model, trust_remote_code=trust_remote_code)  # type: ignore[attr-defined]

    def contents(self) -> dict[str, str]:
        found = [part.scorer.contents() for part in self.scorers]  # type: ignore[attr-defined]
        return {f"scorers.{place}.scorer.{key}": text for place, each in enumerate(found) for key, text in each.items()}

    def check_files(self) -> None:
        for part in self.scorers:
            part.scorer.check_files()  # type: ignore[attr-defined]

    def at_once(self, answers: int) -> int:
        """As many as the slowest takes, in all: they score one after the other."""
        fewest = min(part.scorer.at_once(answers) for part in self.scorers)  # type: ignore[attr-defined]
        return max(1, fewest // len(self.scorers))

    @property
    def gpus(self) -> int:
        """The most that one of them takes: they take turns on it."""
        return max(part.scorer.gpus for part in self.scorers)  # type: ignore[attr-defined]

    @property
    def compares(self) -> bool:
        """Or one of them does: what it adds would be the same for all answers that are alone."""
        return self.standardise == "group" or any(part.scorer.compares for part in self.scorers if part.weight)  # type: ignore[attr-defined]

    @property
    def relative(self) -> bool:
        return all(part.scorer.relative for part in self.scorers)  # type: ignore[attr-defined]

    @property
    def gives_preferences(self) -> bool:
        counted = [part for part in self.scorers if part.weight]
        return all(part.weight > 0 and part.scorer.gives_preferences for part in counted)  # type: ignore[attr-defined]

    @property
    def borrows_engine(self) -> bool:
        return any(part.scorer.borrows_engine for part in self.scorers)  # type: ignore[attr-defined]

    def start(self) -> Mixing:
        return Mixing(self)

    def start_with(self, asker: Asker) -> Mixing:
        """With an asker for the judges that ask the policy."""
        return Mixing(self, asker)


class Mixing:
    """A `ScoreFunction`: what the parts give, each checked as if it were alone."""

    def __init__(self, config: Mix, lent: Asker | None = None):
        self._config = config
        self._started: list[ScoreFunction] = []
        try:
            share = config.deadline_s / len(config.scorers)  # they score one after the other
            for scorer in (part.scorer.within(share) for part in config.scorers):  # type: ignore[attr-defined]
                borrows = lent is not None and scorer.borrows_engine  # type: ignore[attr-defined]
                self._started.append(scorer.start_with(lent) if borrows else scorer.start())  # type: ignore[attr-defined]
        except BaseException:
            self.close()
            raise

    def __call__(self, groups: Sequence[Group]) -> list[Judgement]:
        parts = zip(self._config.scorers, self._started, strict=True)
        bare = [replace(group, metrics={}) for group in groups]  # what is known of them already no part has said
        judged = [score_groups(score, bare, who=f"scorer {part.called} of the mix") for part, score in parts]
        return [joined(self._config, each) for each in zip(*judged, strict=True)]

    def memory_gib(self) -> float:
        return sum(score.memory_gib() for score in self._started if hasattr(score, "memory_gib"))

    def close(self) -> None:
        for score in self._started:
            if hasattr(score, "close"):
                score.close()


def parts_of(scorer: Any, key: str = "scorer") -> list[tuple[str, Any]]:
    """The scorers of a mix, each with its key in a config; of any other scorer that one alone."""
    if not isinstance(scorer, Mix):
        return [(key, scorer)]
    return [(f"{key}.scorers.{place}.scorer", part.scorer) for place, part in enumerate(scorer.scorers)]


def joined(config: Mix, given: Sequence[Group]) -> Judgement:
    """One group, as each of the parts judged it, as one judgement."""
    rows = [group.scores or () for group in given]
    weights = [part.weight for part in config.scorers]
    weighed = [standardised(row) for row in rows] if config.standardise == "group" else rows
    columns = zip(*weighed, strict=True)
    scores = tuple(math.fsum(w * s for w, s in zip(weights, column, strict=True)) for column in columns)
    metrics: dict[str, float] = {}
    for part, group in zip(config.scorers, given, strict=True):
        before = "" if config.only_judge(part) else f"{part.called}/"
        metrics |= {f"{before}{name}": number for name, number in group.metrics.items()}
        if there := [score for score in group.known_scores if score is not None]:
            metrics[f"scores/{part.called}"] = math.fsum(there) / len(there)
    counted = [group for weight, group in zip(weights, given, strict=True) if weight]
    contested = tuple(map(any, zip(*filter(None, (group.contested for group in counted)), strict=True)))
    skipped = tuple(map(any, zip(*filter(None, (group.skipped for group in counted)), strict=True)))
    tokens, preferences = _token_scores(given, weights, config.standardise), _preferences(given, weights)
    trust = tuple(map(min, zip(*filter(None, (group.trust for group in counted)), strict=True)))
    # A mean of which a part was not asked is inferred.
    inferred = sorted({pair for group in counted for pair in group.inferred}) if preferences is not None else ()
    shares = next((group.shares for group in counted if group.shares), ())  # of the first that has classes
    return Judgement(scores, preferences, metrics, contested, tokens, tuple(inferred), trust, shares, skipped)


def standardised(scores: Sequence[float]) -> tuple[float, ...]:
    """[K] with mean 0 and standard deviation 1 (of the K scores themselves); all 0 where they are equal."""
    mean = math.fsum(scores) / len(scores)
    spread = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    equal = spread <= 1e-12 * max(1.0, max(map(abs, scores)))
    return tuple(0.0 if equal else (score - mean) / spread for score in scores)


def _token_scores(given: Sequence[Group], weights: Sequence[float], standardise: str) -> tuple[tuple[float, ...], ...]:
    """Of each completion the parts' rewards of its tokens, weighted and added, where one that counts gives some."""
    counted = [(weight, group) for weight, group in zip(weights, given, strict=True) if weight]
    if not any(group.token_scores for _, group in counted):
        return ()
    if standardise != "none":
        raise ScoreError(
            "a scorer of the mix gives each token its own reward, which has no mean and spread by prompt",
            where=f"scorer mix, prompt {given[0].prompt.index}",
            value=f"standardise: {standardise}",
            rule="standardise: none with rewards of tokens",
            remedy="set scorer.standardise=none, and weights that fit the scorers' scales",
        )
    rows = [[[weight * score for score in row] for row in by_token(group)] for weight, group in counted]
    return tuple(tuple(map(math.fsum, zip(*of_one, strict=True))) for of_one in zip(*rows, strict=True))


def by_token(group: Group) -> Sequence[Sequence[float]]:
    """The rewards of each completion's tokens; where there are none, its score at the last."""
    lengths = [len(completion.token_ids) for completion in group.completions]
    there = zip(lengths, group.scores or (), strict=True)
    return group.token_scores or [[0.0] * (length - 1) + [score] * (length > 0) for length, score in there]


def _preferences(given: Sequence[Group], weights: Sequence[float]) -> tuple[tuple[float, ...], ...] | None:
    """[K, K] mean of the parts' soft preferences by weight; None where one that counts gives none, or is a penalty."""
    parts = [(weight, each.preferences) for weight, each in zip(weights, given, strict=True) if weight]
    counted = [(weight, matrix) for weight, matrix in parts if weight > 0 and matrix is not None]
    if len(counted) < len(parts):
        return None
    total = math.fsum(weight for weight, _ in counted)
    count = len(given[0].completions)
    return tuple(
        tuple(math.fsum(weight * matrix[i][j] for weight, matrix in counted) / total for j in range(count))
        for i in range(count)
    )

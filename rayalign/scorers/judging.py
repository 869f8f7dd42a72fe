"""From a judge's answers to preferences and scores: both orders, ties, refusals, and what is counted of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from rayalign.errors import ScoreError
from rayalign.maths.feedback import debiased_preference, expected_score
from rayalign.record import Record
from rayalign.scorers import schedule
from rayalign.scorers.asking import Answer, Asker, Question
from rayalign.scorers.rules import RULES
from rayalign.scorers.schedule import Pair, Schedule, ScheduleName
from rayalign.scorers.templates import Mode, Template
from rayalign.types import Group, Judgement

WINDOW, LEAST = 64, 8  # newest comparisons in which refusals are counted, and how many there have to be


class JudgeRules(Record):
    """How a judge is asked, and how its answers are read."""

    mode: Mode = Field(
        "pairwise",
        description="pairwise: P(i ≻ j), the mean over both orders; direct: an expected score, from −1 to 1",
    )
    reasoning: int = Field(0, ge=0, description="tokens of thinking before the answer, at most; 0: the answer at once")
    schedule: ScheduleName = Field(
        "all", description="pairwise: all pairs of the K; a knockout tournament; swiss rounds with a budget"
    )
    comparisons: int | None = Field(None, ge=1, description="budget of swiss rounds, for the K answers of one prompt")
    tie_margin: float = Field(0.01, ge=0, lt=0.5, description="P(i ≻ j) nearer to ½ than this is a tie: ½")
    min_mass: float = Field(
        0.2, ge=0, le=1, description="probability that is on the answers together; below it the judge refused"
    )
    max_refused: float = Field(
        0.5, ge=0, le=1, description=f"stop when more than this share of the last {WINDOW} comparisons was refused"
    )
    report_agreement: Literal["vader", "brevity"] | None = Field(
        None, description="a rule: how often it agrees with the judge, and its own score, become metrics"
    )

    def questions(self, count: int) -> int:
        """That are asked about `count` answers of one prompt, at most."""
        if self.mode == "direct":
            return count
        pairs = count * (count - 1) // 2
        known = {"all": pairs, "tournament": count - 1, "swiss": min(pairs, self.comparisons or pairs)}
        return 2 * known[self.schedule]


class Read(NamedTuple):
    """An answer: what it stands for in expectation, P(the first is better) or a score from −1 to 1, None where the
    judge refused; and the probability that is on the answers together, None where that is not known."""

    value: float | None
    mass: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Of one comparison.

    Attributes:
        prob: P(the first is better), ½ for a tie or where the judge refused.
        flips: whether the verdict is another one in the other order: the same place is picked in both.
        masses: of the answers in both orders, as far as they are known.
    """

    prob: float
    tied: bool = False
    refused: bool = False
    flips: bool = False
    masses: tuple[float, ...] = ()


@dataclass
class Game:
    """One group while its answers are compared."""

    group: Group
    plan: Schedule
    results: dict[Pair, float] = field(default_factory=dict)
    verdicts: dict[Pair, Verdict] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)  # to be compared now
    over: bool = False

    @classmethod
    def begin(cls, group: Group, plan: Schedule) -> Game:
        game = cls(group, plan)
        game._next(lambda: next(plan))
        return game

    def take(self, verdicts: Mapping[Pair, Verdict]) -> None:
        """The verdicts on `asked`; then what the schedule wants next. Equal texts are as good as each other."""
        found = {pair: verdicts[pair].prob if pair in verdicts else 0.5 for pair in self.pairs}
        self.verdicts |= verdicts
        self.results |= found
        self._next(lambda: self.plan.send(found))

    def _next(self, ask: Callable[[], list[Pair]]) -> None:
        try:
            self.pairs = ask()
        except StopIteration:
            self.pairs, self.over = [], True

    @property
    def asked(self) -> list[Pair]:
        """The pairs whose texts differ: there is nothing to ask about others."""
        return [(i, j) for i, j in self.pairs if self.group.texts[i] != self.group.texts[j]]


class Judging:
    """A `ScoreFunction`: groups → judgements. See `judge.Judge`."""

    def __init__(self, rules: JudgeRules, template: Template, asker: Asker):
        self.rules, self._template, self._asker = rules, template, asker
        asker.tokenizes(tuple(template.answers))
        self._rule = RULES[rules.report_agreement]() if rules.report_agreement else None
        self._refusals: deque[bool] = deque(maxlen=WINDOW)
        self._reason = ""  # of the last refusal

    def __call__(self, groups: Sequence[Group]) -> list[Judgement]:
        return self._rate(groups) if self.rules.mode == "direct" else self._compare(groups)

    def memory_gib(self) -> float:
        return self._asker.memory_gib()

    def close(self) -> None:
        self._asker.close()

    # Pairwise.

    def _compare(self, groups: Sequence[Group]) -> list[Judgement]:
        """The comparisons of all groups that stand in one round of their schedules are asked together."""
        plans = [schedule.start(self.rules.schedule, len(group.texts), self.rules.comparisons) for group in groups]
        games = [Game.begin(group, plan) for group, plan in zip(groups, plans, strict=True)]
        while going := [game for game in games if not game.over]:
            for game, verdicts in zip(going, self._verdicts(going), strict=True):
                game.take(verdicts)
        return [self._judgement(game) for game in games]

    def _verdicts(self, games: Sequence[Game]) -> list[dict[Pair, Verdict]]:
        """Of the pairs that each game wants compared, both orders in one call."""
        questions = []
        for place, game in enumerate(games):
            texts = game.group.texts
            for pair in game.asked:
                for first, second in (pair, pair[::-1]):
                    values = {"prompt": game.group.prompt.conversation, "first": texts[first], "second": texts[second]}
                    questions.append(self._question(f"{place}/{first}/{second}", values))
        told = iter(self._read(questions))
        found = [{pair: self._verdict(next(told), next(told)) for pair in game.asked} for game in games]
        self._count_refusals([verdict.refused for verdicts in found for verdict in verdicts.values()])
        return found

    def _verdict(self, *orders: Read) -> Verdict:
        """From P(the first shown is better) in both orders."""
        masses = tuple(read.mass for read in orders if read.mass is not None)
        first, swapped = (read.value for read in orders)
        if first is None or swapped is None:
            return Verdict(0.5, refused=True, masses=masses)
        one = torch.float64
        prob = float(debiased_preference(torch.tensor([first], dtype=one), torch.tensor([swapped], dtype=one)))
        flips = (first - 0.5) * (swapped - 0.5) > 0
        tied = abs(prob - 0.5) <= self.rules.tie_margin
        return Verdict(0.5 if tied else prob, tied=tied, flips=flips, masses=masses)

    def _judgement(self, game: Game) -> Judgement:
        count, verdicts = len(game.group.texts), list(game.verdicts.values())
        matrix = schedule.complete(count, game.results)
        metrics: dict[str, float] = {}
        if verdicts:
            metrics["judge/refused"] = _share(verdict.refused for verdict in verdicts)
        if heard := [verdict for verdict in verdicts if not verdict.refused]:
            metrics["judge/ties"] = _share(verdict.tied for verdict in heard)
            metrics["judge/order_dependent"] = _share(verdict.flips for verdict in heard)
        metrics |= _mass([mass for verdict in verdicts for mass in verdict.masses])
        leads = {pair: verdict.prob - 0.5 for pair, verdict in game.verdicts.items()}
        inferred = tuple(pair for pair in combinations(range(count), 2) if pair not in game.results)
        return Judgement(
            schedule.win_rates(matrix), matrix, metrics | self._agreement(game.group, leads), inferred=inferred
        )

    # Direct.

    def _rate(self, groups: Sequence[Group]) -> list[Judgement]:
        questions = [
            self._question(f"{place}/{k}", {"prompt": group.prompt.conversation, "answer": text})
            for place, group in enumerate(groups)
            for k, text in enumerate(group.texts)
        ]
        told = self._read(questions)
        self._count_refusals([read.value is None for read in told])
        judgements, at = [], 0
        for group in groups:
            reads = told[at : at + len(group.texts)]
            at += len(reads)
            own = [read.value for read in reads]
            heard = [score for score in own if score is not None]
            middle = sum(heard) / len(heard) if heard else 0.0  # neither the best nor the worst
            filled = tuple(middle if score is None else score for score in own)
            metrics = {"judge/refused": _share(score is None for score in own)}
            metrics |= _mass([read.mass for read in reads if read.mass is not None])
            rated = [k for k, score in enumerate(own) if score is not None]
            leads = {(i, j): filled[i] - filled[j] for i, j in combinations(rated, 2)}
            judgements.append(Judgement(filled, None, metrics | self._agreement(group, leads)))
        return judgements

    # Both.

    def _question(self, id: str, values: Mapping[str, str]) -> Question:
        return self._template.question(id, values, reasoning=self.rules.reasoning)

    def _read(self, questions: Sequence[Question]) -> list[Read]:
        """What is asked twice (of equal answers) is asked once."""
        once = {question.messages_key: question for question in questions}
        answers = self._asker.ask(list(once.values())) if once else []
        found = dict(zip(once, map(self._value, answers), strict=True))
        return [found[question.messages_key] for question in questions]

    def _value(self, answer: Answer) -> Read:
        """No value when the judge answered none of what it was asked for."""
        logps = answer.logps
        if answer.error or logps is None:
            self._reason = answer.error or "no answer"
            return Read(None)
        if len(logps) != len(self._template.answers) or not all(logp < 1e-3 for logp in logps):  # NaN is not below
            self._reason = f"log-probs {', '.join(f'{logp:.3g}' for logp in logps)}"
            return Read(None)
        mass = sum(map(math.exp, logps))
        if mass < self.rules.min_mass or mass == 0:
            self._reason = f"{mass:.3g} of the probability is on its answers, min_mass is {self.rules.min_mass:g}"
            return Read(None, mass)
        values = torch.tensor(list(self._template.answers.values()), dtype=torch.float64)
        known = torch.tensor([bounded(logps, answer.unseen)], dtype=torch.float64)
        if self.rules.mode == "pairwise":
            return Read(min(1.0, max(0.0, float((known.softmax(-1) * values).sum()))), mass)
        return Read(float(expected_score(known, values, low=float(values.min()), high=float(values.max()))), mass)

    def _count_refusals(self, refused: Sequence[bool]) -> None:
        """Raises ScoreError when too many of the newest comparisons were refused."""
        self._refusals += refused
        share = sum(self._refusals) / max(1, len(self._refusals))
        if len(self._refusals) >= LEAST and share > self.rules.max_refused:
            raise ScoreError(
                "the judge does not answer",
                where="scorer judge",
                value=f"{sum(self._refusals)} of the last {len(self._refusals)} refused; the last: {self._reason}",
                rule=f"at most {self.rules.max_refused:g} of them (scorer.max_refused), else nothing is learned",
                remedy="try the template on this model: its ask has to make one of "
                f"{', '.join(self._template.answers)} the next token; or lower scorer.min_mass; "
                "a model that thinks first is told not to by scorer.ask.chat_template_kwargs (of a server, ask.extra)",
            )

    def _agreement(self, group: Group, leads: Mapping[Pair, float]) -> dict[str, float]:
        """How often the rule ranks two answers as the judge does, where both prefer one; and the rule's mean score."""
        if self._rule is None:
            return {}
        scores = [self._rule(text) for text in group.texts]
        signs = [lead * (scores[i] - scores[j]) for (i, j), lead in leads.items()]
        told = [sign > 0 for sign in signs if sign]
        name = self.rules.report_agreement
        return {f"scores/{name}": sum(scores) / len(scores)} | ({"judge/agreement": _share(told)} if told else {})


def bounded(logps: Sequence[float], unseen: float) -> tuple[float, ...]:
    """The same with the most that an answer can have that was not given back: no more than `unseen`, than any that
    was, and than what the others leave. So it is no certain verdict that an answer is missing."""
    seen = [logp for logp in logps if logp > -math.inf]
    missing = len(logps) - len(seen)
    left = (1 - sum(map(math.exp, seen))) / max(1, missing)
    most = min(unseen, *seen, math.log(left)) if left > 0 else -math.inf
    return tuple(logp if logp > -math.inf else most for logp in logps)


def _mass(masses: Sequence[float]) -> dict[str, float]:
    return {"judge/mass": sum(masses) / len(masses)} if masses else {}


def _share(found: Iterable[bool]) -> float:
    told = list(found)
    return sum(told) / len(told)

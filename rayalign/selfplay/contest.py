"""How a self-play run is doing on held-out prompts: against the model that it began with, and against the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.errors import ScorerLost
from rayalign.evaluate import bootstrap_interval
from rayalign.protocols import Learner, Scorer
from rayalign.rollouts import Collector, sample_seed
from rayalign.selfplay.generations import FOLDER
from rayalign.selfplay.shards import Answer, Shard, settings_of
from rayalign.types import Column, Completion, Example, Group, Metrics, Prompt, Sampling
from rayalign.types import Sequence as Row


class Contest:
    """Held-out rows: their prompts are answered at each evaluation, with the same seeds.

    Args:
        rows: held-out rows of the data.
        collector: of answers; it scores them where there is a scorer.
        scorer: says which of two answers is better; none: there is no win rate.
        samples: answers to each prompt.
        identity: all that decides what the first answers are.
    """

    def __init__(
        self,
        rows: Sequence[Group],
        collector: Collector,
        scorer: Scorer | None,
        run_dir: Path,
        *,
        sampling: Sampling,
        samples: int,
        seed: int,
        identity: dict[str, Any],
        say: Callable[[str], None] = lambda text: None,
    ):
        self._say = say
        self._rows, self._collector, self._scorer = rows, collector, scorer
        self._sampling, self._samples, self._seed = [sampling] * samples, samples, seed
        known = identity | {"sampling": settings_of(sampling), "samples": samples, "seed": seed, "held_out": True}
        self._file = Shard(run_dir / FOLDER / "start.jsonl", known, range(len(rows) * samples))

    @property
    def prompts(self) -> list[Prompt]:
        return [row.prompt for row in self._rows]

    def sample(self, step: int) -> tuple[Group, ...]:
        """The policy's answers, as the engine has it now."""
        groups, _, _ = self._collector.collect(
            self.prompts,
            self._sampling,
            lambda prompt, k: sample_seed(self._seed, "evaluation", prompt, k),
            label=f"contest-{step}",
        )
        return groups

    def metrics(self, step: int, policy: Learner, groups: Sequence[Group]) -> Metrics:
        """`gap`: log π of the data's answers less that of the policy's own (their mean), in nats an answer, and a
        token: 0 where the data are what the policy writes. `win_rate`: the share of answers that are better than the
        first model's to the same prompt, a tie counts ½. With bootstrap intervals over prompts.

        Args:
            step: of the evaluation; before the first the answers are kept, for all later ones.
            groups: what the policy answers, in the order of `prompts`.
        """
        metrics = self._gap(policy, groups)
        if self._scorer is None:
            return metrics
        answers = [completion for group in groups for completion in group.completions]
        texts = [text for group in groups for text in group.texts]
        if step == 0:
            numbered = enumerate(zip(answers, texts, strict=True))
            first = {n: Answer(n, c.token_ids, "", text, c.finish_reason) for n, (c, text) in numbered}
            self._file.finish(first)
        else:
            first = self._file.read()
        if len(first) < len(answers):
            self._say(f"no win rate: {self._file.damage or f'{self._file.path} is not there'}")
            return metrics
        wins = np.array(self._wins(groups, answers, texts, first)).reshape(len(groups), -1)
        low, high = bootstrap_interval(wins.mean(axis=1), seed=self._seed)
        rate = {"win_rate": float(wins.mean()), "win_rate/low": low, "win_rate/high": high}
        return metrics | rate | {"win_rate/ties": float((wins == 0.5).mean())}

    def _gap(self, policy: Learner, groups: Sequence[Group]) -> Metrics:
        examples = [
            Example(
                tuple(Row(row.prompt.token_ids, each.token_ids) for each in (row.completions[0], *group.completions))
            )
            for row, group in zip(self._rows, groups, strict=True)
        ]
        sums, means = [], []
        for example in policy.annotate(examples, (Column.LOGPS,)):
            logps = [row.columns["policy/logps"].astype(np.float64) for row in example.sequences]
            sums.append(logps[0].sum() - np.mean([each.sum() for each in logps[1:]]))
            means.append(logps[0].mean() - np.mean([each.mean() for each in logps[1:]]))
        found: Metrics = {}
        for name, values in (("gap", np.array(sums)), ("gap_per_token", np.array(means))):
            found[name] = float(values.mean())
            found[f"{name}/low"], found[f"{name}/high"] = bootstrap_interval(values, seed=self._seed)
        return found

    def _wins(
        self, groups: Sequence[Group], answers: Sequence[Completion], texts: Sequence[str], first: dict[int, Answer]
    ) -> list[float]:
        """P(answer ≻ the first model's) for each answer, both shown to the scorer as one group."""
        pairs = {}
        for number, (completion, text) in enumerate(zip(answers, texts, strict=True)):
            other = first[number].as_completion(0)
            if other.token_ids != completion.token_ids:
                group = groups[number // self._samples]
                both = Group(f"contest/{number}", group.prompt, (completion, other), (text, first[number].completion))
                pairs[both.id] = both
        scored = self._scored(list(pairs.values()))
        outcomes = (scored.get(f"contest/{number}") for number in range(len(answers)))
        return [0.5 if outcome is None else _beats(outcome) for outcome in outcomes]

    def _scored(self, pairs: Sequence[Group]) -> dict[str, Group]:
        assert self._scorer is not None
        self._scorer.submit(pairs)
        scored: dict[str, Group] = {}
        while len(scored) < len(pairs):
            if self._collector.stop:
                raise ScorerLost("scoring was stopped")
            scored |= {group.id: group for group in self._scorer.poll()}
        return scored


def _beats(group: Group) -> float:
    """P(first ≻ second): a judge's, or by the scores."""
    if group.preferences is not None:
        return float(group.preferences[0][1])
    one, other = group.scores or (0.0, 0.0)
    return 0.5 + 0.5 * float(np.sign(one - other))


class Unscored:
    """A scorer that says nothing: for answers that nobody has to judge."""

    def __init__(self) -> None:
        self._done: list[Group] = []

    def submit(self, groups: Sequence[Group]) -> None:
        self._done += groups

    def poll(self, timeout_s: float = 1.0) -> list[Group]:
        done, self._done = self._done, []
        return done

    def memory_gib(self) -> float:
        return 0.0

    def close(self) -> None:
        self._done = []

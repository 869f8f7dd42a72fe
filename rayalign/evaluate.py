"""How good a policy is on held-out prompts: reward, KL to the reference, length, variety, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator

from rayalign.errors import ConfigError
from rayalign.maths.divergence import kl_k1, kl_k3
from rayalign.protocols import Algorithm, Roles
from rayalign.record import Record, Unfit
from rayalign.registry import did_you_mean
from rayalign.rollouts import Collector, Progress, sample_seed
from rayalign.samples import group_metrics
from rayalign.types import FAILED, Column, Example, Group, Metrics, Prompt, Sampling
from rayalign.types import Sequence as Row

RESAMPLES = 2000  # of the bootstrap
# Ends of metrics' names → whether more of them is better.
BETTER = dict.fromkeys(("loss", "nll", "perplexity", "ece"), False)
BETTER |= dict.fromkeys(("reward", "accuracy", "accuracies", "kendall_tau", "top1", "win_rate"), True)


class EvaluationConfig(Record):
    """Held-out prompts, sampled with the same seeds each time, and held-out rows of data."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: before and after training only")
    before: bool = Field(True, description="evaluate the model before its first step, to compare with")
    reference: bool = Field(
        False, description="keep the model as it began, to report KL to it, also for an algorithm without a reference"
    )
    prompts: int = Field(40, ge=0, description="held-out prompts; 0: never evaluate")
    samples: int = Field(4, ge=1, description="completions for each of them")
    rows: int = Field(200, ge=0, description="held-out rows of data.examples that are measured; 0: none")
    show: int = Field(3, ge=0, description="prompts shown before and after")


class EarlyStop(Record):
    """When a run ends before its last step: as evaluations get no better. The best one's weights are what it leaves."""

    metric: str = Field(
        description="of the evaluations: held_out/… of rows, or reward of samples, say", examples=["held_out/nll"]
    )
    patience: int = Field(3, ge=1, description="evaluations in a row without a better one, after which the run ends")
    higher_is_better: bool | None = Field(
        None,
        description=f"of the metric; none: true for {', '.join(k for k, v in BETTER.items() if v)}, false for "
        f"{', '.join(k for k, v in BETTER.items() if not v)}; has to be said of others",
    )
    min_change: float = Field(0.0, ge=0, description="by which a better one has to be better")

    def best(self, evaluations: Mapping[int, Evaluation]) -> int | None:
        """The step of the best evaluation, the first of equals; None where there is none."""
        return self._found(evaluations)[0]

    def due(self, evaluations: Mapping[int, Evaluation]) -> bool:
        """Whether there has been no better one for long enough."""
        return self._found(evaluations)[1] >= self.patience

    def _found(self, evaluations: Mapping[int, Evaluation]) -> tuple[int | None, int]:
        """The best one's step, and how many came after it."""
        known = sorted({name for each in evaluations.values() for name in each.metrics})
        if evaluations and self.metric not in known:
            raise ConfigError(
                "evaluations have no such metric",
                where="key train.stop.metric",
                value=self.metric,
                rule=f"one of {', '.join(known) or 'none: nothing is held out'}",
                remedy=did_you_mean(self.metric, known),
            )
        best, held, since = None, -math.inf, 0
        for step in sorted(evaluations):
            value = evaluations[step].metrics.get(self.metric, math.nan)
            value = value if self._higher else -value
            if math.isfinite(value) and value - held > self.min_change:
                best, held, since = step, value, 0
            else:
                since += 1
        return best, since

    @property
    def _higher(self) -> bool | None:
        return BETTER.get(self.metric.rpartition("/")[2]) if self.higher_is_better is None else self.higher_is_better

    @model_validator(mode="after")
    def _has_a_direction(self) -> EarlyStop:
        if self._higher is None:
            raise Unfit(
                "whether more of this metric is better is not known",
                key="higher_is_better",
                rule="true or false, for a metric other than " + ", ".join(BETTER),
                remedy="set higher_is_better: true where a higher value is a better one, else false",
            )
        return self


@dataclass(frozen=True)
class EvaluatedSample:
    """One completion of a held-out prompt. KL values are sums over its tokens, in nats; see `sequence_kl`. Without a
    score is one that its scorer failed on and skipped."""

    prompt_index: int
    prompt: str
    completion: str
    score: float | None
    tokens: int
    truncated: bool
    kl_k1: float | None
    kl_k3: float | None


@dataclass(frozen=True)
class Evaluation:
    """Samples in the order of the prompts, `samples` for each, and what they come to."""

    step: int
    samples: tuple[EvaluatedSample, ...]
    metrics: Metrics = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "samples": [asdict(sample) for sample in self.samples]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Evaluation:
        return cls(record["step"], tuple(EvaluatedSample(**s) for s in record["samples"]), record["metrics"])

    def scores(self) -> np.ndarray:
        """[prompts, samples], NaN where there is none."""
        prompts = len({sample.prompt_index for sample in self.samples})
        return np.array([sample.score for sample in self.samples], dtype=float).reshape(prompts, -1)

    def rewards(self) -> np.ndarray:
        """[prompts] mean scores, each of those that there are; NaN where there is none."""
        scores = self.scores()
        there = ~np.isnan(scores)
        return np.where(there, scores, 0.0).sum(axis=1) / np.where(there.any(axis=1), there.sum(axis=1), np.nan)


def evaluate(
    collector: Collector,
    roles: Roles,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    step: int = 0,
    learner_temperature: float,
    progress: Progress | None = None,
    further: Callable[[Sequence[Group]], Metrics] | None = None,
) -> Evaluation:
    """Sample held-out prompts with seeds that are the same at every evaluation, score them, and compare
    the policy with the reference on the policy's own samples, where the learners' log-probs are those of the
    distribution that was sampled. Nothing else may be open in the engine.

    Args:
        sampling: of a run that searches its candidates, samples of the same length are drawn at temperature 1.
        further: more metrics of the scored groups.
    """
    sampling = sampling.ordinary
    groups, _, _ = collector.collect(
        prompts,
        [sampling] * samples,
        lambda prompt, k: sample_seed(seed, "evaluation", prompt, k),
        label=f"evaluation-{step}",
        progress=progress,
    )
    another = sampling.truncated or sampling.temperature != learner_temperature
    divergences = sequence_kl(groups, roles, truncated=another)
    found = []
    for group in groups:
        for text, score, completion in zip(group.texts, group.known_scores, group.completions, strict=True):
            k1, k3 = divergences[len(found)]
            truncated = completion.finish_reason == "length"
            found.append(
                EvaluatedSample(
                    group.prompt.index, group.prompt.text, text, score, len(completion.token_ids), truncated, k1, k3
                )
            )
    metrics = said(groups, seed=seed) | summarise(Evaluation(step, tuple(found)), seed=seed)
    return Evaluation(step, tuple(found), metrics | (further(groups) if further is not None else {}))


def measure(rows: Sequence[Group], algorithm: Algorithm, roles: Roles) -> Metrics:
    """Loss and metrics of held-out rows of data, as training would see them, under held_out/."""
    algorithm = algorithm.for_held_out()
    examples, metrics = algorithm.examples(rows)
    if examples:
        for role, column in algorithm.needs:
            examples = roles[role].annotate(examples, (column,))
        metrics |= algorithm.summarise(roles.policy.measure(algorithm.credit(examples)[0], algorithm))
    return {f"held_out/{name}": value for name, value in metrics.items()}


def measures(algorithm: Algorithm, roles: Roles, rows: Sequence[Group]) -> Callable[[Sequence[Group]], Metrics] | None:
    """What `evaluate` measures of scored samples, too: what `measure` says of held-out rows, where there are none and
    the algorithm wants it. None: nothing."""
    if rows or not getattr(algorithm, "measures_samples", False):
        return None
    return lambda groups: measure(groups, algorithm, roles)


def fitted_temperature(
    rows: Sequence[Group], algorithm: Algorithm, roles: Roles, say: Callable[[str], None]
) -> float | None:
    """The temperature that an algorithm's classifier is best exported with; None for one that wants none, and, which is
    said, with too few rows to tell."""
    if not getattr(algorithm, "temperature_scaling", False):
        return None
    examples, _ = algorithm.examples(rows)
    fitted = algorithm.fitted_temperature(roles.policy.annotate(examples, algorithm.columns) if examples else [])
    if fitted is None:
        say(f"no temperature was fitted: too few of {len(rows)} held-out rows (evaluation.rows) have votes")
        return None
    temperature, before, after = fitted
    say(f"temperature {temperature:.3g}, in the exported head: nll {before:.4f} → {after:.4f} held out")
    return temperature


def sequence_kl(groups: Sequence[Group], roles: Roles, *, truncated: bool = False) -> list[tuple[Any, Any]]:
    """(k1, k3) of KL(policy‖reference) for each completion: sums over its tokens, in nats, both from the
    learners' log-probs, so that engine and learner rounding apart does not look like divergence. None without a
    reference, and for samples of a truncated distribution, which these log-probs do not describe; 0 for an answer
    without a token."""
    rows = [Row(g.prompt.token_ids, c.token_ids, c.logps) for g in groups for c in g.completions]
    if roles.reference is None or truncated:
        return [(None, None)] * len(rows)
    there = [place for place, row in enumerate(rows) if row.completion_ids]
    examples = [Example((rows[place],)) for place in there]
    for learner in (roles.policy, roles.reference):
        examples = learner.annotate(examples, (Column.LOGPS,))
    sums = [(0.0, 0.0)] * len(rows)
    for place, example in zip(there, examples, strict=True):
        columns = example.sequences[0].columns
        policy, reference = (torch.from_numpy(columns[f"{role}/logps"]).double() for role in ("policy", "reference"))
        sums[place] = (kl_k1(policy, reference).sum().item(), kl_k3(policy, reference).sum().item())
    return sums


def summarise(evaluation: Evaluation, *, seed: int) -> Metrics:
    """Means over prompts, each with its 95 % bootstrap interval (as …/low and …/high). distinct-n is that of
    the samples of one prompt."""
    samples, shape = evaluation.samples, evaluation.scores().shape
    columns = {
        "kl/k1": [s.kl_k1 for s in samples],
        "kl/k3": [s.kl_k3 for s in samples],
        "length": [float(s.tokens) for s in samples],
        "truncated": [float(s.truncated) for s in samples],
    }
    known = {name: values for name, values in columns.items() if None not in values}
    rewards = evaluation.rewards()
    scored = rewards[~np.isnan(rewards)]
    by_prompts = {"reward": scored} if scored.size else {}
    by_prompts |= {name: np.array(values).reshape(shape).mean(axis=1) for name, values in known.items()}
    texts = np.array([s.completion for s in samples], dtype=object).reshape(shape)
    for n in (1, 2):
        by_prompts[f"distinct_{n}"] = np.array([distinct_n(list(row), n) for row in texts])
    metrics: Metrics = {}
    for name, by_prompt in by_prompts.items():
        metrics[name] = float(by_prompt.mean())
        metrics[f"{name}/low"], metrics[f"{name}/high"] = bootstrap_interval(by_prompt, seed=seed)
    return metrics


def said(groups: Sequence[Group], *, seed: int) -> Metrics:
    """What the scorer says of groups besides their scores, as `summarise` gives it: over the groups that have it."""
    metrics: Metrics = {}
    for name, mean in group_metrics(groups).items():
        metrics[name] = mean
        if name.endswith(FAILED):
            continue  # a count, and no mean that could have an interval
        values = np.array([group.metrics[name] for group in groups if name in group.metrics])
        metrics[f"{name}/low"], metrics[f"{name}/high"] = bootstrap_interval(values, seed=seed)
    return metrics


def rise(before: Evaluation, after: Evaluation, *, seed: int) -> tuple[float, float, float]:
    """Mean of after − before in reward, paired by prompt, and its 95 % bootstrap interval; NaN where no prompt has a
    score in both."""
    difference = after.rewards() - before.rewards()
    difference = difference[~np.isnan(difference)]
    if not difference.size:
        return math.nan, math.nan, math.nan
    return (float(difference.mean()), *bootstrap_interval(difference, seed=seed))


def bootstrap_interval(values: np.ndarray, *, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of values [n] (Efron 1979)."""
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words in some texts as a share of all of them (Li et al. 2016); 0 when there is none."""
    grams = [tuple(words[i : i + n]) for text in texts for words in [text.split()] for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0

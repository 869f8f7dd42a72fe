"""Which samples a report shows: a few prompts over time, chosen by counting and never by how good they look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rayalign.metrics import records
from rayalign.report.data import Run, spread

PROMPTS = 12  # of each kind
MOMENTS = 5  # of one prompt in one run
COMPLETIONS = 4  # at one moment
CHARACTERS = 1500  # of one text


@dataclass(frozen=True)
class Text:
    """What a model or a user wrote. `more` counts the characters that were cut off."""

    shown: str
    more: int

    @classmethod
    def of(cls, value: Any) -> Text:
        text = value if isinstance(value, str) else str(value)
        return cls(visible(text[:CHARACTERS]), max(0, len(text) - CHARACTERS))


@dataclass(frozen=True)
class Completion:
    text: Text
    score: float | None
    tokens: int | None
    truncated: bool


@dataclass(frozen=True)
class Moment:
    """The completions of one prompt at one step of one run.

    Attributes:
        label: before, during or after training; empty for samples that were trained on.
        version: of the weights that sampled them; None where the step says it.
        completions: the first few.
        count, mean: of all that were sampled, and their mean score; None where none has a score.
    """

    step: int
    label: str
    version: int | None
    completions: tuple[Completion, ...]
    count: int
    mean: float | None

    @classmethod
    def of(cls, step: int, samples: Sequence[dict[str, Any]], label: str = "") -> Moment:
        """Of all samples of a prompt at a step."""
        version = samples[0].get("version")
        scores = [score for score in map(_score, samples) if score is not None]
        return cls(
            step,
            label,
            version if isinstance(version, int) else None,
            tuple(map(_completion, samples[:COMPLETIONS])),
            len(samples),
            sum(scores) / len(scores) if scores else None,
        )


@dataclass(frozen=True)
class Story:
    """One prompt over time; `moments` by the number of the run."""

    prompt: Text
    moments: dict[int, tuple[Moment, ...]]


def visible(text: str) -> str:
    """Control characters as pictures of them and lone surrogates as U+FFFD: what is there can be seen and encoded."""
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    code = ord(char)
    if code < 32 and char not in "\n\t":
        return chr(0x2400 + code)
    if 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000:
        return "\ufffd"
    return char


def held_out(runs: Sequence[Run]) -> list[Story]:
    """Held-out prompts, evenly chosen between the one whose score fell most and the one whose score rose most."""
    found = [_evaluated(run) for run in runs]
    prompts = _shared([list(by_prompt) for by_prompt in found])

    def rise(prompt: str) -> float:
        means = [moment.mean or 0.0 for moment in next(f[prompt] for f in found if prompt in f)]
        return means[-1] - means[0]

    chosen = spread(sorted(prompts, key=rise), PROMPTS)
    return [Story(Text.of(p), {i: f[p] for i, f in enumerate(found) if p in f}) for p in reversed(chosen)]


def trained_on(runs: Sequence[Run]) -> list[Story]:
    """The prompts of the rollouts that were sampled at most steps (in most of the runs)."""
    found = [_steps_by_prompt(run) for run in runs]
    keys = _shared([list(steps) for steps in found])
    keys.sort(key=lambda key: -min(len(steps[key]) for steps in found if key in steps))
    chosen = keys[:PROMPTS]
    wanted = [{key: set(spread(sorted(s[key]), MOMENTS)) for key in chosen if key in s} for s in found]
    stories: dict[int, Story] = {}
    for number, run in enumerate(runs):
        for key, (prompt, moments) in _collect(run, wanted[number]).items():
            stories.setdefault(key, Story(Text.of(prompt), {})).moments[number] = moments
    return [stories[key] for key in chosen if key in stories]


def _shared(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """Prompts that as many runs as possible have in common, in the order in which they first appear."""
    counts: dict[Any, int] = defaultdict(int)
    for each in lists:
        for prompt in each:
            counts[prompt] += 1
    most = max(counts.values(), default=0)
    return [prompt for prompt, count in counts.items() if count == most]


def _evaluated(run: Run) -> dict[str, tuple[Moment, ...]]:
    """Each held-out prompt's moments."""
    moments: dict[str, list[Moment]] = defaultdict(list)
    for record in spread(run.evaluations, MOMENTS):
        step = int(record["step"])
        label = "before" if step == 0 else "after" if step == run.last_step else "during"
        by_prompt: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for sample in record["samples"]:
            by_prompt[str(sample.get("prompt", ""))].append(sample)
        for prompt, samples in by_prompt.items():
            moments[prompt].append(Moment.of(step, samples, label))
    return {prompt: tuple(each) for prompt, each in moments.items()}


def _steps_by_prompt(run: Run) -> dict[int, set[int]]:
    """At which steps each prompt was sampled; prompts by their hash, because there may be many."""
    steps: dict[int, set[int]] = defaultdict(set)
    _each_sample(run, lambda prompt, step, sample: steps[hash(prompt)].add(step))
    return dict(steps)


def _collect(run: Run, wanted: dict[int, set[int]]) -> dict[int, tuple[str, tuple[Moment, ...]]]:
    """The samples of these prompts at these steps."""
    prompts: dict[int, str] = {}
    kept: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)

    def keep(prompt: str, step: int, sample: dict[str, Any]) -> None:
        key = hash(prompt)
        if step in wanted.get(key, ()):
            prompts[key] = prompt
            kept[key, step].append(sample)

    _each_sample(run, keep)
    return {
        key: (prompts[key], tuple(Moment.of(step, kept[key, step]) for step in sorted(wanted[key]))) for key in prompts
    }


def _each_sample(run: Run, visit: Callable[[str, int, dict[str, Any]], None]) -> None:
    for sample in records(run.path / "samples.jsonl"):
        if isinstance(sample.get("step"), int):
            visit(str(sample.get("prompt", "")), sample["step"], sample)


def _score(sample: dict[str, Any]) -> float | None:
    score = sample.get("score")
    return float(score) if isinstance(score, int | float) else None


def _completion(sample: dict[str, Any]) -> Completion:
    """Of a rollout's sample or an evaluation's, which say in two ways that they were cut."""
    tokens = sample.get("tokens")
    return Completion(
        Text.of(sample.get("completion", "")),
        _score(sample),
        tokens if isinstance(tokens, int) else None,
        sample.get("truncated") is True or sample.get("finish_reason") == "length",
    )

"""What a person sees while a run goes on: bars with rate and remaining time, one calm line a step."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rayalign.evaluate import Evaluation, rise
from rayalign.types import Metrics

NOISY = ("transformers", "datasets", "vllm", "ray", "deepspeed", "torch", "wandb", "mlflow", "alembic")


class Console:
    """Lines and bars on stderr; bars only where there is a terminal. Results go to stdout."""

    def __init__(self) -> None:
        self.rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.rich,
            transient=True,
            disable=not self.rich.is_terminal,
        )
        self._steps = self._samples = None
        self._total = self._done = 0

    def say(self, text: str) -> None:
        self.rich.print(escape(text))

    @contextmanager
    def bars(self, steps: int | None = None) -> Iterator[None]:
        """While inside, `step` (of so many) and `sampled` move the bars."""
        self._total = steps or 0
        if steps:
            self._steps = self._progress.add_task("steps", total=steps, rate="")
        self._samples = self._progress.add_task("samples", total=None, rate="", visible=False)
        with self._progress:
            yield

    def sampled(self, done: int, total: int) -> None:
        """Completions of the current rollout."""
        if self._samples is None:
            return
        if done <= self._done:  # the next rollout has begun
            self._progress.reset(self._samples, total=total)
        self._done = done
        speed = self._progress.tasks[-1].speed
        rate = f"{speed:.1f} samples/s" if speed else ""
        self._progress.update(self._samples, completed=done, total=total, rate=rate, visible=done < total)

    def step(self, step: int, metrics: Metrics, *, learns: bool = True) -> None:
        """One line: what was learned, on what reward, how far from the reference, in what time. Of a shard of a
        labelling, which learns nothing, without the first."""
        if self._steps is not None:
            self._progress.update(self._steps, completed=step, rate=f"{metrics['time/step_s']:.1f} s/step")
        parts = [f"{'step' if learns else 'shard'} {step:>{len(str(self._total))}}/{self._total}"]
        if "loss" in metrics:
            parts.append(f"loss {metrics['loss']:.4f}")
        elif "critic/loss" in metrics:  # the first steps may train the critic alone
            parts.append(f"critic only, its loss {metrics['critic/loss']:.4f}")
        elif learns:
            parts.append("skipped: nothing to learn from")
        if "reward/mean" in metrics:
            parts.append(f"reward {metrics['reward/mean']:+.3f} ± {metrics['reward/std']:.3f}")
        said = (("kl/k1", "kl/k1"), ("rewards/accuracies", "accuracy"), ("ranking/kendall_tau", "tau"))
        parts += [f"{label} {metrics[key]:.2f}" for key, label in said if key in metrics]
        parts.append(f"{metrics['completion/length_mean']:.0f} tokens")
        parts.append(f"{metrics['time/step_s']:.1f} s")
        self.say("  ".join(parts))


@contextmanager
def logged(console: Console, path: Path) -> Iterator[None]:
    """While inside, library noise and warnings go to a file, and our own warnings (who is waited for, who was
    replaced) to the console as well. What the caller had set up is put back afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root, ours = logging.getLogger(), logging.getLogger("rayalign")
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [root, ours, *(logging.getLogger(name) for name in NOISY)]
    before = [(each, each.handlers, each.propagate, each.level) for each in loggers]
    for each in loggers:
        each.handlers, each.propagate = [], True
    root.handlers, ours.handlers = [handler], [_Lines(console)]
    root.setLevel(logging.INFO)
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except Exception:
        ours.info("the run ended with an error", exc_info=True)
        raise
    finally:
        logging.captureWarnings(False)
        for each, handlers, propagate, level in before:
            each.handlers, each.propagate = handlers, propagate
            each.setLevel(level)
        handler.close()


class _Lines(logging.Handler):
    """Our own warnings as lines on the console."""

    def __init__(self, console: Console):
        super().__init__(level=logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(record.getMessage())


def print_evaluation(evaluation: Evaluation, title: str) -> None:
    """A table of means and 95 % intervals, on stdout."""
    _table([(title, evaluation)])


def print_before_after(before: Evaluation, after: Evaluation, *, show: int, seed: int) -> None:
    """Both tables side by side, the rise of the reward with its interval, and a few prompts."""
    _table([("before", before), ("after", after)])
    if not before.samples:
        return
    mean, low, high = rise(before, after, seed=seed)
    out = RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
    said = f"reward rose by {mean:+.3f}, 95 % bootstrap interval [{low:+.3f}, {high:+.3f}] over prompts"
    out.print("no prompt has a reward before and after" if math.isnan(mean) else said, markup=False)
    seen = list(dict.fromkeys(sample.prompt_index for sample in before.samples))[:show]
    for index in seen:
        first = next(s for s in before.samples if s.prompt_index == index)
        last = next(s for s in after.samples if s.prompt_index == index)
        out.print(f"\n{first.prompt}", markup=False, style="bold")
        for name, sample in (("before", first), ("after ", last)):
            score = "unscored" if sample.score is None else f"{sample.score:+.2f}"
            out.print(f"  {name} {score}  {_one_line(sample.completion)}", markup=False)


def _table(columns: Sequence[tuple[str, Evaluation]]) -> None:
    out = RichConsole(file=sys.stdout, highlight=False)
    samples = columns[0][1].samples
    prompts = len({sample.prompt_index for sample in samples})
    title = f"{prompts} held-out prompts × {len(samples) // max(prompts, 1)}, mean [95 % bootstrap interval]"
    table = Table(title=title if samples else "held-out rows")
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    labels = {
        "reward": "reward",
        "win_rate": "win rate over the first model",
        "gap": "log-prob of the data's answers less that of the policy's own, nats",
        "gap_per_token": "the same a token",
        "kl/k1": "KL to the reference, k1, nats",
        "kl/k3": "KL to the reference, k3, nats",
        "length": "tokens",
        "truncated": "share truncated",
        "distinct_1": "distinct-1",
        "distinct_2": "distinct-2",
    }
    further = [key for key in columns[0][1].metrics if key.startswith(("held_out/", "judge/", "scores/", "ratings/"))]
    rows = [key for key in further if not key.endswith(("/low", "/high"))]
    for key, label in {**labels, **{key: key.replace("held_out/", "held-out ") for key in rows}}.items():
        if key in columns[0][1].metrics:
            table.add_row(label, *(_cell(evaluation.metrics, key) for _, evaluation in columns))
    out.print(table)


def _cell(metrics: Metrics, key: str) -> str:
    if key not in metrics:
        return "–"
    if f"{key}/low" not in metrics:
        return f"{metrics[key]:.3f}"
    return f"{metrics[key]:.3f} [{metrics[f'{key}/low']:.3f}, {metrics[f'{key}/high']:.3f}]"


def _one_line(text: str) -> str:
    return " ".join(text.split())

"""Metrics → panels: plotly figures as plain data. Colours are numbers here; the page's style sheet knows them,
light and dark, and the page's script draws, smooths and hides."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayalign.report.data import Run, Series
from rayalign.report.samples import visible
from rayalign.report.summary import number
from rayalign.report.thinning import bucket_means, jsonable, thinned

COLORS = 8  # in the style sheet; a ninth run has the first colour again
DASHES = ("solid", "dash", "dot")


@dataclass(frozen=True)
class Key:
    """One entry of a panel's legend. `color` None: that of each run."""

    label: str
    mark: str  # solid, dash, dot, area, held-out
    color: int | None
    value: str = ""  # the newest, when there is one run


@dataclass(frozen=True)
class Panel:
    """One figure with its title and legend; `summary` says in words what it shows."""

    title: str
    unit: str
    figure: dict[str, Any]
    legend: tuple[Key, ...]
    summary: str
    note: str = ""
    run: int | None = None  # where a panel is of one run among several


@dataclass(frozen=True)
class Curves:
    """What stands in one panel.

    Attributes:
        lines: metric → its label.
        band: metric that is a standard deviation around the first line.
        held_out: metric → the measure of evaluations that is drawn with it.
        log: logarithmic, where every value allows it.
    """

    title: str
    unit: str
    lines: Mapping[str, str]
    band: str = ""
    held_out: Mapping[str, str] = field(default_factory=dict)
    log: bool = False
    share: bool = False


REWARD = Curves("Reward", "score", {"reward/mean": "mean ± std"}, "reward/std", {"reward/mean": "reward"})
LEARNING = (
    Curves(
        "KL to the reference",
        "nats a completion",
        {"kl/k1": "k1", "kl/k3": "k3"},
        held_out={"kl/k1": "kl/k1", "kl/k3": "kl/k3"},
    ),
    Curves("Loss", "", {"loss": "mean over the step’s examples"}),
    Curves(
        "Implicit rewards",
        "β·log(π/π_ref)",
        {"rewards/margins": "margin", "rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    ),
    Curves("Accuracy", "share of pairs", {"rewards/accuracies": "margin above 0"}, share=True),
    Curves(
        "Completion length", "tokens", {"completion/length_mean": "mean"}, held_out={"completion/length_mean": "length"}
    ),
    Curves(
        "Truncated",
        "share of completions",
        {"completion/truncated": "cut at max_tokens"},
        held_out={"completion/truncated": "truncated"},
        share=True,
    ),
    Curves("Learning rate", "", {"lr": "lr"}),
    Curves("Gradient norm", "before clipping", {"grad_norm": "largest of the step"}),
    Curves("Pairs", "a step", {"pairs/kept": "kept", "pairs/dropped": "dropped, tied"}),
)
MACHINE = (
    Curves("Sampling speed", "tokens/s", {"rollout/tokens_per_s": "rollout"}),
    Curves("Peak memory", "GiB, all processes", {"memory/peak_gib": "peak"}),
    Curves(
        "Log-prob gap, learner to engine",
        "nats a token",
        {"sync/logp_gap_mean": "mean", "sync/logp_gap_max": "largest"},
        log=True,
    ),
)
STAGES = ("rollout", "score", "annotate", "update", "sync")  # of a step, in their order


def learning(runs: Sequence[Run]) -> list[Panel]:
    """What was learned."""
    found = [curves(runs, REWARD), reward_against_kl(runs), *(curves(runs, each) for each in LEARNING)]
    return [panel for panel in found if panel]


def machine(runs: Sequence[Run]) -> list[Panel]:
    """What it took."""
    found = [*(timings(runs, i) for i in range(len(runs))), *(curves(runs, each) for each in MACHINE)]
    return [panel for panel in found if panel]


def others(runs: Sequence[Run]) -> list[Panel]:
    """Every metric that has no panel of its own, by name."""
    shown = {key for each in (REWARD, *LEARNING, *MACHINE) for key in (*each.lines, each.band)}
    keys = sorted({key for run in runs for key in run.keys if key not in shown and not _is_time(key)})
    found = [curves(runs, Curves(visible(key), "", {key: visible(key)})) for key in keys]
    return [panel for panel in found if panel]


def curves(runs: Sequence[Run], spec: Curves) -> Panel | None:
    """One or more metrics over the steps; None where no run has any of them."""
    traces, legend, words, broken, all_values = [], [], [], [], []
    for place, (key, label) in enumerate(spec.lines.items()):
        dash = DASHES[place % len(DASHES)] if len(runs) > 1 else "solid"
        newest = ""
        for number_of_run, run in enumerate(runs):
            series = run.series(key)
            if not len(series.finite):
                broken += [_broken(run, label, series)] if len(series) else []
                continue
            color = number_of_run if len(runs) > 1 else place
            band = run.series(spec.band) if spec.band and place == 0 else None
            name = f"{run.name} {label}" if len(runs) > 1 else label
            traces.append(_curve(series, band, name, number_of_run, color, dash))
            if spec.held_out.get(key):
                traces += _held_out(run, spec.held_out[key], f"{name}, held out", number_of_run, color)
            words.append(_in_words(name, series))
            broken += [_broken(run, label, series)] if len(series.finite) < len(series) else []
            all_values.append(series.finite)
            newest = number(series.finite[-1]) if len(runs) == 1 else ""
        if any(len(run.series(key).finite) for run in runs):
            legend.append(Key(label, dash, place if len(runs) == 1 else None, newest))
    if not traces:
        return None
    if any(trace["meta"]["role"] == "held-out" for trace in traces):
        legend.append(Key("held-out prompts, 95 % interval", "held-out", None if len(runs) > 1 else 0))
    axis: dict[str, Any] = {"type": "log" if spec.log and min(map(np.min, all_values)) > 0 else "linear"}
    if spec.share:
        axis |= {"range": [-0.03, 1.03], "tickformat": ".0%"}
    return Panel(
        spec.title,
        spec.unit,
        {"data": traces, "layout": {"xaxis": {"title": {"text": "step"}}, "yaxis": axis, "hovermode": "x unified"}},
        tuple(legend),
        f"{spec.title} by step. " + " ".join(words),
        " ".join(broken),
    )


def reward_against_kl(runs: Sequence[Run]) -> Panel | None:
    """What the reward has cost in divergence: one point a step, joined in the order of the steps."""
    traces, words = [], []
    for number_of_run, run in enumerate(runs):
        kl, reward = run.series("kl/k1"), run.series("reward/mean")
        steps, kl_at, reward_at = np.intersect1d(kl.steps, reward.steps, return_indices=True)
        x, y = kl.values[kl_at], reward.values[reward_at]
        there = np.isfinite(x) & np.isfinite(y)
        if not there.any():
            continue
        steps, x, y = bucket_means(steps[there], x[there], y[there])
        name = run.name if len(runs) > 1 else "training"
        meta = {"role": "path", "run": number_of_run, "color": number_of_run % COLORS}
        trace = _trace(x, y, name, meta) | {"mode": "markers", "customdata": jsonable(steps)}
        traces.append(trace)
        words.append(f"{visible(name)}: from reward {number(y[0])} at {number(x[0])} nats "
                     f"to {number(y[-1])} at {number(x[-1])} nats.")  # fmt: skip
        traces += _held_out_path(run, name, number_of_run)
    if not traces:
        return None
    held_out = any(trace["meta"]["role"] == "held-out" for trace in traces)
    color = None if len(runs) > 1 else 0
    layout = {
        "xaxis": {"title": {"text": "KL to the reference, k1, nats a completion"}},
        "yaxis": {"title": {"text": "reward"}},
        "hovermode": "closest",
    }
    legend = [Key("a step", "point", color), *([Key("held-out prompts", "held-out", color)] if held_out else [])]
    return Panel(
        "Reward against KL",
        "a point a step",
        {"data": traces, "layout": layout},
        tuple(legend),
        "Mean reward against KL. " + " ".join(words),
    )


def timings(runs: Sequence[Run], number_of_run: int) -> Panel | None:
    """Seconds of each step by stage, stacked; what no stage accounts for is `other`."""
    run = runs[number_of_run]
    whole = run.series("time/step_s")
    stages = sorted((key for key in run.keys if _is_time(key) and key != "time/step_s"), key=_stage_order)
    steps = np.array([r["step"] for r in run.metrics], dtype=float)
    parts = {_stage(key): _filled(run.series(key), steps) for key in stages}
    total = _filled(whole, steps)
    if len(whole.finite):
        parts["other"] = np.maximum(total - sum(parts.values(), np.zeros_like(total)), 0.0)
    if not parts:
        return None
    means = bucket_means(steps, *parts.values(), total)
    traces = [
        _trace(means[0], y, label, {"role": "area", "run": number_of_run, "color": place % COLORS}) | {"mode": "lines"}
        for place, (label, y) in enumerate(zip(parts, means[1:-1], strict=True))
    ]
    legend = [
        Key(visible(label), "area", i % COLORS, f"{np.median(y):.2f} s") for i, (label, y) in enumerate(parts.items())
    ]
    if len(whole.finite):
        outline = _trace(means[0], means[-1], "whole step", {"role": "outline", "run": number_of_run, "color": None})
        traces.append(outline | {"mode": "lines"})
    axis = {"rangemode": "tozero", "ticksuffix": " s"}
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": axis, "hovermode": "x unified"}
    words = ", ".join(f"{key.label} {key.value}" for key in legend)
    several = len(runs) > 1
    return Panel(
        f"Time of a step, {visible(run.name)}" if several else "Time of a step",
        "seconds, with medians",
        {"data": traces, "layout": layout},
        tuple(legend),
        f"Seconds of a step by stage, medians: {words}.",
        "Stages overlap where rollouts run ahead (rollout.depth): the line is the whole step."
        if len(whole.finite) and np.any(sum(parts.values(), np.zeros_like(total)) > total * 1.01 + 1e-3)
        else "",
        number_of_run if several else None,
    )


def _curve(series: Series, band: Series | None, name: str, run: int, color: int, dash: str) -> dict[str, Any]:
    """A line with what the page's script needs to smooth it: bucket means where points were left out."""
    kept = thinned(series.values)
    meta: dict[str, Any] = {"role": "curve", "run": run, "color": color % COLORS}
    around = [_filled(band, series.steps, np.nan)] if band is not None and len(band) else []
    if around or len(kept) < len(series):
        steps, values, *deviation = bucket_means(series.steps, series.values, *around)
        meta["mean"] = {"x": jsonable(steps), "y": jsonable(values), "band": jsonable(deviation[0]) if around else None}
    trace = _trace(series.steps[kept], series.values[kept], name, meta)
    return trace | {"mode": "lines" if len(series.finite) > 1 else "lines+markers", "line": {"dash": dash}}


def _held_out(run: Run, measure: str, name: str, number_of_run: int, color: int) -> list[dict[str, Any]]:
    found = run.evaluated(measure)
    if not found:
        return []
    steps, mean, low, high = np.array(found, dtype=float).T
    meta = {"role": "held-out", "run": number_of_run, "color": color % COLORS}
    return [_trace(steps, mean, name, meta) | {"mode": "markers", "error_y": _bars(mean, low, high)}]


def _held_out_path(run: Run, name: str, number_of_run: int) -> list[dict[str, Any]]:
    kl = {step: rest for step, *rest in run.evaluated("kl/k1")}
    found = [(step, *kl[step], *rest) for step, *rest in run.evaluated("reward") if step in kl]
    if not found:
        return []
    steps, x, x_low, x_high, y, y_low, y_high = np.array(found, dtype=float).T
    meta = {"role": "held-out", "run": number_of_run, "color": number_of_run % COLORS}
    bars = {"error_x": _bars(x, x_low, x_high), "error_y": _bars(y, y_low, y_high)}
    return [_trace(x, y, f"{name}, held out", meta) | {"mode": "markers", "customdata": jsonable(steps)} | bars]


def _bars(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    return {"type": "data", "symmetric": False, "array": jsonable(high - mean), "arrayminus": jsonable(mean - low)}


def _trace(x: np.ndarray, y: np.ndarray, name: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Plotly takes names for a kind of HTML: they are escaped once more for it."""
    return {"type": "scatter", "x": jsonable(x), "y": jsonable(y), "name": html.escape(visible(name)), "meta": meta}


def _filled(series: Series, steps: np.ndarray, missing: float = 0.0) -> np.ndarray:
    """The values at these steps; `missing` where there is none or it is not finite."""
    values = np.full(len(steps), missing)
    _, to, of = np.intersect1d(steps, series.steps, return_indices=True)
    values[to] = np.where(np.isfinite(series.values[of]), series.values[of], missing)
    return values


def _in_words(name: str, series: Series) -> str:
    there = np.isfinite(series.values)
    steps, values = series.steps[there], series.values[there]
    return (
        f"{visible(name)}: {number(values[0])} at step {steps[0]:.0f}, {number(values[-1])} at step {steps[-1]:.0f}, "
        f"between {number(values.min())} and {number(values.max())}."
    )


def _broken(run: Run, label: str, series: Series) -> str:
    steps = series.steps[~np.isfinite(series.values)]
    more = f" and {len(steps) - 1} more" if len(steps) > 1 else ""
    return f"{visible(run.name)}, {visible(label)}: not a finite number at step {steps[0]:.0f}{more}."


def _is_time(key: str) -> bool:
    return key.startswith("time/") and key.endswith("_s")


def _stage(key: str) -> str:
    return key.removeprefix("time/").removesuffix("_s")


def _stage_order(key: str) -> tuple[int, str]:
    stage = _stage(key)
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)

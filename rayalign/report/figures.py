"""Metrics → panels: plotly figures as plain data. Colours are numbers here; the page's style sheet knows them,
light and dark, and the page's script draws, smooths and hides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayalign.report.data import Run, Series
from rayalign.report.panels import COLORS, Key, Panel, filled, trace
from rayalign.report.samples import visible
from rayalign.report.summary import PEAKS, number
from rayalign.report.thinning import bucket_means, jsonable, thinned
from rayalign.report.timings import is_time, timings

DASHES = ("solid", "dash", "dot")


@dataclass(frozen=True)
class Curves:
    """What stands in one panel.

    Attributes:
        lines: metric → its label.
        band: metric that is a standard deviation around the first line.
        held_out: metric → the measure of evaluations that is drawn with it.
        log: logarithmic, where every value allows it.
        exact: set rather than measured, so never smoothed.
        share: of a whole, from 0 to 1.
    """

    title: str
    unit: str
    lines: Mapping[str, str]
    band: str = ""
    held_out: Mapping[str, str] = field(default_factory=dict)
    log: bool = False
    exact: bool = False
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
        "Ranking by likelihood",
        "against the scorer’s",
        {"ranking/kendall_tau": "Kendall’s τ", "ranking/top1": "likeliest is its best, share"},
    ),
    Curves("Reference answers", "perplexity", {"gold/perplexity": "of a token"}, log=True),
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
    Curves("Learning rate", "", {"lr": "lr"}, exact=True),
    Curves("Gradient norm", "before clipping", {"grad_norm": "largest of the step"}),
    Curves("Pairs", "a step", {"pairs/kept": "kept", "pairs/dropped": "dropped, tied"}),
)
MACHINE = (
    Curves("Sampling speed", "tokens/s", {"rollout/tokens_per_s": "rollout"}),
    Curves("Peak memory", f"GiB, {PEAKS}", {"memory/peak_gib": "peak"}, exact=True),
    Curves(
        "Log-prob gap, learner to engine",
        "nats a token",
        {"sync/logp_gap_mean": "mean", "sync/logp_gap_max": "largest"},
        log=True,
    ),
)


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
    keys = sorted({key for run in runs for key in run.keys if key not in shown and not is_time(key)})
    found = [curves(runs, Curves(visible(key), "", {key: visible(key)})) for key in keys]
    return [panel for panel in found if panel]


def curves(runs: Sequence[Run], spec: Curves) -> Panel | None:
    """One or more metrics over the steps; None where no run has a finite value of any of them. With one run, colours
    tell metrics apart; with several they tell runs apart, and dashes the metrics."""
    several = len(runs) > 1
    traces, legend, words = [], [], []
    for place, (key, label) in enumerate(spec.lines.items()):
        dash = DASHES[place % len(DASHES)] if several else "solid"
        found = [(i, run, series) for i, run in enumerate(runs) if len((series := run.series(key)).finite)]
        for number_of_run, run, series in found:
            name = f"{run.name} {label}" if several else label
            meta = {"run": number_of_run, "color": (number_of_run if several else place) % COLORS}
            band = run.series(spec.band) if spec.band and place == 0 else None
            traces.append(_curve(series, band, name, meta | {"exact": spec.exact}, dash))
            traces += _held_out(run, spec.held_out.get(key, ""), name, meta)
            words.append((_in_words(name, series), _broken(name, series)))
        if found:
            newest = "" if several else number(found[0][2].finite[-1])
            legend.append(Key(label, dash, None if several else place, newest))
    if not traces:
        return None
    if any(each["meta"]["role"] == "held-out" for each in traces):
        legend.append(
            Key("held-out prompts, 95 % interval", "held-out", 0 if len(legend) == 1 and not several else None)
        )
    values = np.concatenate([run.series(key).finite for run in runs for key in spec.lines])
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": _axis(spec, values), "hovermode": "x unified"}
    return Panel(
        spec.title,
        spec.unit,
        {"data": traces, "layout": layout},
        tuple(legend),
        f"{spec.title} by step. " + " ".join(shown for shown, _ in words),
        " ".join(broken for _, broken in words if broken),
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
        traces.append(trace(x, y, name, meta) | {"mode": "markers", "customdata": jsonable(steps)})
        words.append(f"{visible(name)}: from reward {number(y[0])} at {number(x[0])} nats "
                     f"to {number(y[-1])} at {number(x[-1])} nats.")  # fmt: skip
        traces += _held_out_path(run, name, number_of_run)
    if not traces:
        return None
    held_out = any(each["meta"]["role"] == "held-out" for each in traces)
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


def _axis(spec: Curves, values: np.ndarray) -> dict[str, Any]:
    if spec.share:
        return {"range": [-0.03, 1.03], "tickformat": ".0%"}
    if values.min() == values.max():  # else plotly shows one unit around it, which hides a small constant
        return {"rangemode": "tozero"}
    if not spec.log or values.min() <= 0:
        return {}
    few_decades = values.max() / values.min() < 1000
    return {"type": "log", **({"dtick": "D2", "tickformat": "~g"} if few_decades else {"dtick": 1})}


def _curve(series: Series, band: Series | None, name: str, meta: dict[str, Any], dash: str) -> dict[str, Any]:
    """A line with what the page's script needs to smooth it: bucket means where points were left out."""
    kept = thinned(series.values)
    meta = meta | {"role": "curve"}
    around = [filled(band, series.steps, np.nan)] if band is not None and len(band) else []
    if around or len(kept) < len(series):
        steps, values, *deviation = bucket_means(series.steps, series.values, *around)
        meta["mean"] = {"x": jsonable(steps), "y": jsonable(values), "band": jsonable(deviation[0]) if around else None}
    shown = trace(series.steps[kept], series.values[kept], name, meta)
    return shown | {"mode": "lines" if len(series.finite) > 1 else "lines+markers", "line": {"dash": dash}}


def _held_out(run: Run, measure: str, name: str, meta: dict[str, Any]) -> list[dict[str, Any]]:
    found = run.evaluated(measure)
    if not found:
        return []
    steps, mean, low, high = np.array(found, dtype=float).T
    shown = trace(steps, mean, f"{name}, held out", meta | {"role": "held-out"})
    return [shown | {"mode": "markers", "error_y": _bars(mean, low, high)}]


def _held_out_path(run: Run, name: str, number_of_run: int) -> list[dict[str, Any]]:
    kl = {step: rest for step, *rest in run.evaluated("kl/k1")}
    found = [(step, *kl[step], *rest) for step, *rest in run.evaluated("reward") if step in kl]
    if not found:
        return []
    steps, x, x_low, x_high, y, y_low, y_high = np.array(found, dtype=float).T
    meta = {"role": "held-out", "run": number_of_run, "color": number_of_run % COLORS}
    bars = {"error_x": _bars(x, x_low, x_high), "error_y": _bars(y, y_low, y_high)}
    return [trace(x, y, f"{name}, held out", meta) | {"mode": "markers", "customdata": jsonable(steps)} | bars]


def _bars(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    return {"type": "data", "symmetric": False, "array": jsonable(high - mean), "arrayminus": jsonable(mean - low)}


def _in_words(name: str, series: Series) -> str:
    there = np.isfinite(series.values)
    steps, values = series.steps[there], series.values[there]
    return (
        f"{visible(name)}: {number(values[0])} at step {steps[0]:.0f}, {number(values[-1])} at step {steps[-1]:.0f}, "
        f"between {number(values.min())} and {number(values.max())}."
    )


def _broken(name: str, series: Series) -> str:
    steps = series.steps[~np.isfinite(series.values)]
    if not len(steps):
        return ""
    more = f" and {len(steps) - 1:,} more" if len(steps) > 1 else ""
    return f"{visible(name)}: not a finite number at step {steps[0]:.0f}{more}."

"""Where the time of a step goes, as stacked areas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayalign.report.data import Run
from rayalign.report.panels import Key, Panel, filled, trace
from rayalign.report.samples import visible
from rayalign.report.thinning import bucket_means

STAGES = ("rollout", "score", "annotate", "update", "sync")  # in the order of a step; each has its colour
OTHER = "other"
STEP = "time/step_s"


def timings(runs: Sequence[Run], number_of_run: int) -> Panel | None:
    """Seconds of each step by stage, stacked; what no stage accounts for is `other`. None where no time was logged.
    Panels of several runs have the same scale."""
    run, several = runs[number_of_run], len(runs) > 1
    steps = np.array([r["step"] for r in run.metrics], dtype=float)
    keys = sorted((key for key in run.keys if is_time(key) and key != STEP), key=_order)
    parts = {_stage(key): filled(run.series(key), steps) for key in keys}
    whole, stages = filled(run.series(STEP), steps), sum(parts.values(), np.zeros(len(steps)))
    timed = STEP in run.keys
    if timed:
        parts[OTHER] = np.maximum(whole - stages, 0.0)
    if not parts:
        return None
    at, *means, whole_means = bucket_means(steps, *parts.values(), whole)
    traces = [
        trace(at, y, name, {"role": "area", "run": number_of_run, "color": _color(name)}) | {"mode": "lines"}
        for name, y in zip(parts, means, strict=True)
    ]
    if timed:
        outline = trace(at, whole_means, "whole step", {"role": "outline", "run": number_of_run})
        traces.append(outline | {"mode": "lines"})
    legend = tuple(Key(visible(name), "area", _color(name), f"{y.mean():.2f} s") for name, y in parts.items())
    axis = {"rangemode": "tozero", "ticksuffix": " s"} | ({"range": [0, _highest(runs)]} if several else {})
    overlap = timed and bool(np.any(stages > whole * 1.01 + 1e-3))
    return Panel(
        f"Time of a step, {visible(run.name)}" if several else "Time of a step",
        "seconds, with means",
        {
            "data": traces,
            "layout": {"xaxis": {"title": {"text": "step"}}, "yaxis": axis, "hovermode": "x unified"},
        },
        legend,
        "Seconds of a step by stage, means: " + ", ".join(f"{key.label} {key.value}" for key in legend) + ".",
        "Stages overlap where rollouts run ahead: the line is the whole step." if overlap else "",
        number_of_run if several else None,
    )


def is_time(key: str) -> bool:
    return key.startswith("time/") and key.endswith("_s")


def _highest(runs: Sequence[Run]) -> float:
    """A little above the slowest step of all, or above all stages of it where they overlap."""
    tops = [1e-9]
    for run in runs:
        sums = [sum(v for k, v in r.items() if is_time(k) and k != STEP) for r in run.metrics]
        tops += [value for value in (*sums, *run.series(STEP).values) if np.isfinite(value)]
    return round(1.05 * max(tops), 3)


def _stage(key: str) -> str:
    return key.removeprefix("time/").removesuffix("_s")


def _order(key: str) -> tuple[int, str]:
    stage = _stage(key)
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


def _color(stage: str) -> int:
    if stage == OTHER:
        return 7
    return STAGES.index(stage) if stage in STAGES else 5 + sum(map(ord, stage)) % 2

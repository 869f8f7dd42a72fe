"""What a panel is made of."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayalign.report.data import Series
from rayalign.report.samples import visible
from rayalign.report.thinning import jsonable

COLORS = 8  # in the style sheet; a ninth run has the first colour again


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


def trace(x: np.ndarray, y: np.ndarray, name: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Plotly takes names for a kind of HTML: they are escaped once more for it."""
    return {"type": "scatter", "x": jsonable(x), "y": jsonable(y), "name": html.escape(visible(name)), "meta": meta}


def filled(series: Series, steps: np.ndarray, missing: float = 0.0) -> np.ndarray:
    """The values at these steps; `missing` where there is none or it is not finite."""
    values = np.full(len(steps), missing)
    _, to, of = np.intersect1d(steps, series.steps, return_indices=True)
    values[to] = np.where(np.isfinite(series.values[of]), series.values[of], missing)
    return values

"""Long curves in few points."""

from __future__ import annotations

from typing import Any

import numpy as np

POINTS = 2000  # of one curve


def thinned(values: np.ndarray, limit: int = POINTS) -> np.ndarray:
    """Which of the values [n] to draw, at most `limit`: the first, the last, and of each bucket the lowest and the
    highest, so that no spike is lost."""
    if len(values) <= limit:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for bucket in np.array_split(np.arange(len(values)), (limit - 2) // 2):
        there = bucket[np.isfinite(values[bucket])]
        kept |= {int(there[values[there].argmin()]), int(there[values[there].argmax()])} if len(there) else {bucket[0]}
    return np.array(sorted(kept))


def bucket_means(*columns: np.ndarray, limit: int = POINTS // 2) -> list[np.ndarray]:
    """Columns [n] as means over at most `limit` buckets. A bucket's mean is over what is finite in it, NaN where
    nothing is. Unlike the extremes, this is what an average over steps may be made of."""
    if len(columns[0]) <= limit:
        return list(columns)
    starts = np.unique(np.linspace(0, len(columns[0]), limit, endpoint=False).astype(int))
    means = []
    for column in columns:
        there = np.isfinite(column)
        counts = np.add.reduceat(there.astype(float), starts)
        sums = np.add.reduceat(np.where(there, column, 0.0), starts)
        means.append(np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0))
    return means


def jsonable(values: np.ndarray) -> list[Any]:
    """Six digits, whole numbers as such, None for what is not finite."""
    return [
        None if not np.isfinite(v) else int(v) if v == int(v) and abs(v) < 1e15 else float(f"{v:.6g}") for v in values
    ]

"""A push of weights that is seen to have arrived: checksums by the engine, then log-probs on a probe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from rayalign.errors import SyncMismatch
from rayalign.protocols import Engine, Learner
from rayalign.record import Record
from rayalign.types import Metrics


class SyncConfig(Record):
    """How a push of weights is verified."""

    max_gap: float | None = Field(
        None,
        gt=0,
        description="largest mean log-prob gap on the probe after a push; default: 1e-3 in float32, 0.15 in bfloat16",
    )
    probe_prompts: int = Field(2, ge=1, description="prompts whose log-probs are compared after each push")


def push_weights(
    learner: Learner, engine: Engine, *, version: int, probe: Sequence[tuple[int, ...]], max_gap: float
) -> Metrics:
    """Load the learner's weights into the engine as `version`, and compare the two on the probe.

    Returns:
        sync/version, and sync/logp_gap_mean and sync/logp_gap_max: |learner − engine| in nats a token.

    Raises:
        SyncMismatch: a checksum differs (from the engine), or the mean gap is above `max_gap`.
    """
    engine.load(learner.push(version))
    probe = [ids if len(ids) > 1 else ids * 2 for ids in probe]  # a first token has no log-prob
    gaps = np.concatenate(
        [
            np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))
            for a, b in zip(learner.logps(probe), engine.logps(probe), strict=True)
        ]
    )
    mean, largest = float(gaps.mean()), float(gaps.max())
    if not mean <= max_gap:  # a NaN is a mismatch as well
        raise SyncMismatch(
            "engine and learner disagree after a push of weights",
            where=f"version {version}, {len(gaps)} probe tokens",
            value=f"mean log-prob gap {mean:.3g}, largest {largest:.3g}",
            rule=f"mean at most {max_gap:g} (sync.max_gap)",
            remedy="check that engine and learner use the same dtype and architecture; or raise sync.max_gap",
        )
    return {"sync/version": float(version), "sync/logp_gap_mean": mean, "sync/logp_gap_max": largest}

"""Ray and vLLM really started, each in a process of its own, so that doctor neither crashes nor hangs with them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rayalign.doctor.finding import Finding
from rayalign.runtime.probe import MARK as RAY_MARK
from rayalign.selftest import engine_start, selftest
from rayalign.selftest.child import Child
from rayalign.selftest.stage import Stage

RAY_DEADLINE_S = 90.0
LEVELS = {"passed": "ok", "failed": "problem", "skipped": "note"}


def ray_findings() -> Iterator[Finding]:
    """A small cluster of its own, and one task on it."""
    folder = Path(tempfile.mkdtemp(prefix="rayalign-ray-"))
    child = Child(["rayalign.runtime.probe"], deadline_s=RAY_DEADLINE_S, log=folder / "ray.log")
    lines = [line for line in child.lines() if line.startswith(RAY_MARK)]
    if trouble := child.trouble() or ("" if lines else "no answer"):
        remedy = f"see {child.log} and /tmp/ray/session_latest/logs; look at /dev/shm, memory and ports above"
        yield Finding("problem", "Ray start-up", trouble, remedy)
        return
    shutil.rmtree(folder, ignore_errors=True)
    found = json.loads(lines[-1].removeprefix(RAY_MARK))
    what = f"a cluster of {found['cpus']:g} cores and {found['gpus']:g} GPUs ran a task"
    yield Finding("ok", "Ray start-up", f"{what}, {found['seconds']:.1f} s")


def vllm_findings(gpus_gib: Sequence[float]) -> Iterator[Finding]:
    """An engine on a tiny model."""
    yield from stage_findings(engine_start(gpus_gib=gpus_gib))


def selftest_findings(gpus_gib: Sequence[float]) -> Iterator[Finding]:
    """All of the self-test."""
    yield from stage_findings(selftest(gpus_gib=gpus_gib))


def stage_findings(stages: Iterable[Stage]) -> Iterator[Finding]:
    """A finding for each stage, as soon as it is there."""
    for done in stages:
        seconds = f", {done.seconds:.1f} s" if done.outcome == "passed" and done.seconds >= 0.1 else ""
        yield Finding(LEVELS[done.outcome], done.name, done.found + seconds, done.remedy)  # type: ignore[arg-type]

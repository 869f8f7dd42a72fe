"""Ray and vLLM really started, each in a process of its own, so that doctor neither crashes nor hangs with them."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from rayalign.doctor.finding import Finding
from rayalign.runtime.probe import MARK as RAY_MARK
from rayalign.selftest import engine_start, in_folder, selftest
from rayalign.selftest.child import Child
from rayalign.selftest.devices import Gpu
from rayalign.selftest.stage import Stage, Stages

RAY = "Ray start-up"
RAY_DEADLINE_S = 90.0
LEVELS = {"passed": "ok", "failed": "problem", "skipped": "note"}


def ray_findings() -> Iterator[Finding]:
    """A small cluster of its own, and one task on it."""
    return stage_findings(in_folder("rayalign-ray-", _ray_stages))


def _ray_stages(folder: Path) -> Stages:
    child = Child(["rayalign.runtime.probe"], deadline_s=RAY_DEADLINE_S, log=folder / "ray.log")
    answers = [line for line in child.run() if line.startswith(RAY_MARK)]
    if trouble := child.trouble() or ("" if answers else "no answer"):
        remedy = f"see {child.log} and /tmp/ray/session_latest/logs; look at /dev/shm, memory and ports above"
        yield Stage(RAY, "failed", trouble, remedy)
        return
    found = json.loads(answers[-1].removeprefix(RAY_MARK))
    what = f"a cluster of {found['cpus']:g} cores and {found['gpus']:g} GPUs ran a task"
    yield Stage(RAY, "passed", what, seconds=found["seconds"])


def vllm_findings(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """An engine on a tiny model."""
    return stage_findings(engine_start(gpus=gpus))


def selftest_findings(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """All of the self-test."""
    return stage_findings(selftest(gpus=gpus))


def stage_findings(stages: Generator[Stage, None, None]) -> Iterator[Finding]:
    """A finding for each stage, as soon as it is there."""
    with closing(stages):
        for done in stages:
            seconds = f", {done.seconds:.1f} s" if done.outcome == "passed" and done.seconds >= 0.1 else ""
            yield Finding(LEVELS[done.outcome], done.name, done.found + seconds, done.remedy)  # type: ignore[arg-type]

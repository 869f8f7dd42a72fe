"""The self-test: the real path on a tiny random model, stage by stage, on whatever this machine has."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rayalign.selftest.child import Child
from rayalign.selftest.stage import CHECKPOINT, PUSH, PUSH_TP, RANKS, START, START_TP, WAKE, Stage, from_line

ENGINE_DEADLINE_S = 240.0


def selftest(*, gpus_gib: Sequence[float] = ()) -> Iterator[Stage]:
    """Train two steps on Ray actors, push weights each way there is, put an engine to sleep and wake it.

    Each part is a process of its own with a deadline, so that a crash is a finding and the next part still runs.
    Takes under a minute on two CPU cores. When a stage fails, its logs stay in the temporary folder that it names.

    Args:
        gpus_gib: memory of each GPU; none: everything runs on the CPU.
    """
    folder = Path(tempfile.mkdtemp(prefix="rayalign-selftest-"))
    whole = True
    for done in _stages(folder, list(gpus_gib)):
        whole &= done.outcome != "failed"
        yield done
    if whole:
        shutil.rmtree(folder, ignore_errors=True)


def engine_start(*, gpus_gib: Sequence[float] = ()) -> Iterator[Stage]:
    """Only the start of vLLM, and some tokens sampled."""
    from rayalign.selftest.tiny_model import build_model

    folder = Path(tempfile.mkdtemp(prefix="rayalign-start-"))
    whole = True
    for done in _engine(build_model(folder / "model"), folder, gpus_gib, weights=None):
        whole &= done.outcome != "failed"
        yield done
    if whole:
        shutil.rmtree(folder, ignore_errors=True)


def _stages(folder: Path, gpus_gib: list[float]) -> Iterator[Stage]:
    from rayalign.selftest.tiny_model import build_model
    from rayalign.selftest.training import STEPS, training_stages

    model = build_model(folder / "model")
    yield from training_stages(model, folder, gpus_gib=gpus_gib)
    trained = folder / "run" / "checkpoints" / f"step-{STEPS}"
    weights = trained if trained.is_dir() else build_model(folder / "other-model", seed=1)
    yield from _engine(model, folder, gpus_gib, weights=weights)
    if len(gpus_gib) < 2:
        for name in (START_TP, PUSH_TP, RANKS):
            yield Stage(name, "skipped", "not tried: needs 2 GPUs")
        return
    yield from _engine(model, folder, gpus_gib, weights=weights, ranks=2)
    yield from two_ranks(model, folder, gpus_gib=gpus_gib)


def two_ranks(model: Path, folder: Path, *, gpus_gib: Sequence[float] = ()) -> Iterator[Stage]:
    """Two learner ranks in processes of their own."""
    command = ["rayalign.selftest.ranks", str(model), *_gpus(gpus_gib)]
    yield from _from_child(Child(command, deadline_s=ENGINE_DEADLINE_S, log=folder / "ranks.log"), (RANKS,))


def _engine(
    model: Path, folder: Path, gpus_gib: Sequence[float], *, weights: Path | None, ranks: int = 1
) -> Iterator[Stage]:
    command = ["rayalign.selftest.engine", str(model), "--ranks", str(ranks), *_gpus(gpus_gib)]
    expected: tuple[str, ...] = (START if ranks == 1 else START_TP,)
    if weights is not None:
        command += ["--weights", str(weights)]
        expected += (CHECKPOINT, PUSH, WAKE) if ranks == 1 else (CHECKPOINT, PUSH_TP)
    log = folder / f"engine-{ranks}.log"
    yield from _from_child(Child(command, deadline_s=ENGINE_DEADLINE_S, log=log), expected)


def _gpus(gpus_gib: Sequence[float]) -> list[str]:
    return ["--gpus-gib", *(f"{size:.1f}" for size in gpus_gib)] if gpus_gib else []


def _from_child(child: Child, expected: Sequence[str]) -> Iterator[Stage]:
    """A child's stages as they come; those that it ended without are failed, or skipped after one that did."""
    missing, failed, see = list(expected), False, f"see {child.log}"
    for line in child.lines():
        if (done := from_line(line)) is not None:
            missing.remove(done.name)
            if done.outcome == "failed":
                failed, done = True, replace(done, remedy=f"{see}; {done.remedy}" if done.remedy else see)
            yield done
    for name in missing:
        if failed:
            yield Stage(name, "skipped", "not tried: a stage before it failed")
        else:
            yield Stage(name, "failed", child.trouble() or "the process ended before this stage", see)
            failed = True

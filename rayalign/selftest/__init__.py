"""The self-test: the real path on a tiny random model, stage by stage, on whatever this machine has."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

from rayalign.selftest.child import Child
from rayalign.selftest.devices import Gpu
from rayalign.selftest.stage import PUSH, PUSH_TP, RANKS, START, START_TP, WAKE, Stage, Stages, from_child, side_by_side

DEADLINE_S = 240.0


def selftest(*, gpus: Sequence[Gpu] = ()) -> Generator[Stage, None, None]:
    """Train two steps on Ray actors, push weights each way there is, put an engine to sleep and wake it.

    Each part is a process of its own with a deadline, so that a crash is a finding and the next part still runs.
    Takes about 95 s of CPU time: under a minute on two quiet cores. When a stage fails, its logs stay in the temporary
    folder that it names.

    Args:
        gpus: that torch can use; none: everything runs on the CPU.
    """
    return in_folder("rayalign-selftest-", lambda folder: _stages(folder, gpus))


def engine_start(*, gpus: Sequence[Gpu] = ()) -> Generator[Stage, None, None]:
    """Only the start of vLLM, and some tokens sampled."""
    from rayalign.selftest.tiny_model import build_model

    return in_folder("rayalign-start-", lambda folder: engines(build_model(folder / "model"), folder, gpus=gpus))


def in_folder(prefix: str, try_in: Callable[[Path], Stages]) -> Generator[Stage, None, None]:
    """The stages of what is tried in a temporary folder, which stays only when one failed, for its logs."""
    folder, failed = Path(tempfile.mkdtemp(prefix=prefix)), False
    try:
        with closing(try_in(folder)) as stages:
            for done in filter(None, stages):
                failed |= done.outcome == "failed"
                yield done
    except BaseException:  # Ctrl-C, or nobody listens any more: the logs are of no use
        failed = False
        raise
    finally:
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)


def _stages(folder: Path, gpus: Sequence[Gpu]) -> Stages:
    from rayalign.selftest.tiny_model import build_model

    model, other = build_model(folder / "model"), build_model(folder / "other-model", seed=1)
    if not gpus:
        pushes = engines(model, folder, weights=other, ranks=(1, 2))
        yield from side_by_side([_training_then_ranks(model, folder, gpus), pushes])
        return
    # One after the other: how much memory an engine frees asleep is seen only while nobody else uses the GPU. In
    # processes of their own, because a process gives a GPU's memory back for certain only when it ends.
    if len(gpus) > 1:
        yield from _training_then_ranks(model, folder, gpus)
        yield from engines(model, folder, gpus=gpus, weights=other)
        yield from engines(model, folder, gpus=gpus, weights=other, ranks=(2,))
        return
    from rayalign.selftest.training import training_stages

    yield from training_stages(model, folder, gpus=gpus)
    yield from engines(model, folder, gpus=gpus, weights=other)
    for name in (START_TP, PUSH_TP, RANKS):
        yield Stage(name, "skipped", "not tried: needs 2 GPUs")


def _training_then_ranks(model: Path, folder: Path, gpus: Sequence[Gpu]) -> Stages:
    from rayalign.selftest.training import training_stages, written_checkpoint

    yield from training_stages(model, folder, gpus=gpus)
    yield from two_ranks(written_checkpoint(folder) or model, folder, gpus=gpus)


def two_ranks(model: Path, folder: Path, *, gpus: Sequence[Gpu] = ()) -> Stages:
    """Two learner ranks in processes of their own."""
    command = ["rayalign.selftest.ranks", str(model), "--gpus", *map(str, gpus)]
    return from_child(Child(command, deadline_s=DEADLINE_S, log=folder / "ranks.log"), (RANKS,))


def engines(
    model: Path, folder: Path, *, gpus: Sequence[Gpu] = (), weights: Path | None = None, ranks: Sequence[int] = (1,)
) -> Stages:
    """An engine for each number of tensor parallel ranks, one after the other in one process.

    Args:
        weights: of the same shapes, to push; none: the engines are only started.
    """
    command = ["rayalign.selftest.engine", str(model), "--ranks", *map(str, ranks), "--gpus", *map(str, gpus)]
    command += ["--weights", str(weights)] if weights else []
    expected: list[str] = []
    for count in ranks:
        expected += [START if count == 1 else START_TP]
        expected += ([PUSH, WAKE] if count == 1 else [PUSH_TP]) if weights else []
    log = folder / f"engine-{'-'.join(map(str, ranks))}.log"
    return from_child(Child(command, deadline_s=DEADLINE_S, log=log), expected)

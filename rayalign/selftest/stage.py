"""How one stage of the self-test went, as it crosses from a child process to the one that reports it, and the stages
of several children together."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Literal

from rayalign.selftest.child import Child

MARK = "STAGE "  # libraries print to stdout too: only lines that begin so are ours

# The stages, here because the process that reports them imports nothing of what it tries.
TRAINING, OBJECT_STORE = "training on Ray actors", "push by object store"
START, CHECKPOINT, PUSH, WAKE = "vLLM start-up", "checkpoint", "push in one process", "sleep and wake"
START_TP, PUSH_TP = "vLLM, tensor parallel", "push by mapped files"
RANKS = "two DeepSpeed ranks"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: what was tried.
        outcome: passed, failed, or skipped because this machine or an earlier failure does not allow it.
        found: what was seen, or the cause.
        remedy: what to do, when there is something to do.
        seconds: how long it took.
    """

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    found: str
    remedy: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        return MARK + json.dumps(asdict(self))


def from_line(line: str) -> Stage | None:
    """The stage of a child's line, or None when the line is something else."""
    return Stage(**json.loads(line.removeprefix(MARK))) if line.startswith(MARK) else None


# None: nothing new for a moment, so that what runs beside it gets its turn. Closing it ends its processes.
Stages = Generator["Stage | None", None, None]


def from_child(child: Child, expected: Sequence[str]) -> Stages:
    """A child's stages as they come; those that it ended without are failed, or skipped after one that did."""
    missing, failed, see = list(expected), False, f"see {child.log}"
    with closing(child.lines()) as lines:
        for line in lines:
            if line is None or (done := from_line(line)) is None:
                yield None
                continue
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


def side_by_side(chains: Sequence[Stages]) -> Stages:
    """The stages of all chains, each as it comes. However this ends, all chains are closed."""
    with ExitStack() as stack:
        running = [stack.enter_context(closing(chain)) for chain in chains]
        while running:
            for chain in tuple(running):
                try:
                    yield next(chain)
                except StopIteration:
                    running.remove(chain)


class Note:
    """What a stage says about itself when it passes."""

    found = ""


@contextmanager
def stage(name: str, remedy: str = "") -> Iterator[Note]:
    """Print the stage that is done inside: passed with the note's `found`, or failed with the error, which ends
    there so that the next stage still runs."""
    note, started = Note(), perf_counter()
    try:
        yield note
    except Exception as error:  # noqa: BLE001  whatever it is, it is this stage's finding
        import traceback

        traceback.print_exc()
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        done = Stage(name, "failed", cause, remedy, perf_counter() - started)
    else:
        done = Stage(name, "passed", note.found, "", perf_counter() - started)
    print(done.line(), flush=True)

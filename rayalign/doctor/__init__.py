"""Whether this machine can run rayalign: each thing looked at, what was found, and what to do about it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from time import perf_counter

from rich.console import Console
from rich.text import Text

from rayalign.doctor.environment import environment_findings
from rayalign.doctor.finding import Finding, guarded
from rayalign.doctor.gpus import gpu_findings
from rayalign.doctor.machine import machine_findings
from rayalign.doctor.network import network_findings
from rayalign.doctor.startup import ray_findings, selftest_findings, vllm_findings
from rayalign.doctor.versions import version_findings
from rayalign.selftest.devices import Gpu

MARKS = {"ok": ("✓", "green"), "note": ("–", "yellow"), "problem": ("✗", "bold red")}
STOPPED = "stopped; the processes that doctor had started have ended"
WIDTH = 26  # of the topics' column


def diagnose(*, selftest: bool = False) -> int:
    """Look at versions, machine, GPUs, network and environment, start Ray and vLLM, and print what is found.

    Args:
        selftest: then train two steps on a tiny model, push weights each way there is, sleep and wake; about 95 s of
            CPU time: under a minute on two quiet cores.

    Returns:
        the number of problems; 0: rayalign runs here.
    """
    out = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    started, problems = perf_counter(), 0
    looking = "looking" + (", then a self-test of under a minute" if selftest else "")  # seen in a terminal alone
    with _ended_by_signals(out), out.status(looking), closing(findings(selftest=selftest)) as found:
        for finding in found:
            problems += finding.level == "problem"
            show(out, finding)
    verdict = "ready" if not problems else f"{problems} problem{'s' if problems > 1 else ''}"
    out.print(f"{verdict} ({perf_counter() - started:.0f} s)", markup=False)
    return problems


@contextmanager
def _ended_by_signals(out: Console) -> Iterator[None]:
    """On Ctrl-C or SIGTERM what was started is ended and its folders removed, then doctor ends with 130 or 143."""
    asked: list[int] = []

    def handle(number: int, frame: object) -> None:
        if not asked:  # while things end, asking once more changes nothing
            asked.append(number)
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        out.print(STOPPED, markup=False)
        raise SystemExit(128 + asked[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def findings(*, selftest: bool) -> Generator[Finding, None, None]:
    """Everything that doctor looks at, what is quick first."""
    yield from guarded("versions", version_findings)
    yield from guarded("machine", machine_findings)
    gpus: list[Gpu] = []

    def look_at_gpus() -> Iterable[Finding]:
        found, usable = gpu_findings()
        gpus.extend(usable)
        return found

    yield from guarded("GPUs", look_at_gpus)
    yield from guarded("network", network_findings)
    yield from guarded("environment", environment_findings)
    if selftest:  # which starts both as well
        yield from guarded("self-test", partial(selftest_findings, gpus))
        return
    yield from guarded("Ray start-up", ray_findings)
    yield from guarded("vLLM start-up", partial(vllm_findings, gpus))


def show(out: Console, finding: Finding) -> None:
    """One line, and the remedy indented under it."""
    mark, style = MARKS[finding.level]
    problem = "problem: " if finding.level == "problem" else ""
    out.print(Text.assemble((mark, style), f" {finding.topic:<{WIDTH}} {problem}{finding.found}"))
    if finding.remedy:
        out.print(Text(f"    remedy: {finding.remedy}"))

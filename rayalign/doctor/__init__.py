"""Whether this machine can run rayalign: each thing looked at, what was found, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
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

MARKS = {"ok": ("✓", "green"), "note": ("–", "yellow"), "problem": ("✗", "bold red")}
WIDTH = 26  # of the topics' column


def diagnose(*, selftest: bool = False) -> int:
    """Look at versions, machine, GPUs, network and environment, start Ray and vLLM, and print what is found.

    Args:
        selftest: then train two steps on a tiny model, push weights each way there is, sleep and wake.

    Returns:
        the number of problems; 0: rayalign runs here.
    """
    out = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    started, problems = perf_counter(), 0
    with out.status("looking" + (", then a self-test of about a minute" if selftest else "")):  # a terminal's alone
        for finding in findings(selftest=selftest):
            problems += finding.level == "problem"
            show(out, finding)
    verdict = "ready" if not problems else f"{problems} problem{'s' if problems > 1 else ''}"
    out.print(f"{verdict} ({perf_counter() - started:.0f} s)", markup=False)
    return problems


def findings(*, selftest: bool) -> Iterator[Finding]:
    """Everything that doctor looks at, what is quick first."""
    yield from guarded("versions", version_findings)
    yield from guarded("machine", machine_findings)
    gpus_gib: list[float] = []

    def gpus() -> Iterable[Finding]:
        found, sizes = gpu_findings()
        gpus_gib.extend(sizes)
        return found

    yield from guarded("GPUs", gpus)
    yield from guarded("network", network_findings)
    yield from guarded("environment", environment_findings)
    yield from guarded("Ray start-up", ray_findings)
    if selftest:
        yield from guarded("self-test", partial(selftest_findings, gpus_gib))
    else:
        yield from guarded("vLLM start-up", partial(vllm_findings, gpus_gib))


def show(out: Console, finding: Finding) -> None:
    """One line, and the remedy indented under it."""
    mark, style = MARKS[finding.level]
    problem = "problem: " if finding.level == "problem" else ""
    out.print(Text.assemble((mark, style), f" {finding.topic:<{WIDTH}} {problem}{finding.found}"))
    if finding.remedy:
        out.print(Text(f"    remedy: {finding.remedy}"))

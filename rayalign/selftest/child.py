"""A command in a process of its own: its lines as they come, a deadline, and a crash that stays there."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import IO

import psutil

GRACE_S = 5.0  # between asking a late process to end and ending it


class Child:
    """`python -m MODULE ARGUMENTS`, with what it prints to stderr in a log file.

    Args:
        command: module and arguments.
        deadline_s: after which it is ended, with every process that it has started.
        log: file for stderr, and for stdout lines as well.
        environment: variables to set for it; None unsets one.

    Attributes:
        returncode: of the ended process, negative for a signal; None before the end.
        late: whether the deadline ended it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        deadline_s: float,
        log: Path,
        environment: Mapping[str, str | None] | None = None,
    ):
        self.command, self.deadline_s, self.log = command, deadline_s, log
        self._environment = child_environment(environment or {})
        self.returncode: int | None = None
        self.late = False

    def run(self) -> list[str]:
        """All lines of its stdout."""
        with closing(self.lines()) as lines:
            return [line for line in lines if line is not None]

    def lines(self) -> Generator[str | None, None, None]:
        """The lines of its stdout, None while there is none. When they end, so has the process; closing it early, or
        an exception in here (Ctrl-C), ends the process."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        limit = time.monotonic() + self.deadline_s
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                errors="replace",
                env=self._environment,
                start_new_session=True,
            )
            arrived: queue.SimpleQueue[str] = queue.SimpleQueue()
            assert process.stdout is not None
            reader = threading.Thread(target=_read, args=(process.stdout, arrived), daemon=True)
            reader.start()
            try:
                while True:
                    ended = _has_ended(process)
                    if ended:  # grandchildren may hold the pipe open: what the process wrote is there soon
                        reader.join(timeout=1.0)
                    yield from _drained(arrived, log, wait_s=0.0 if ended else 0.1)
                    if ended:
                        break
                    yield None
                    if time.monotonic() > limit:
                        self.late = True
                        break
            finally:
                _end(process)
                self.returncode = process.returncode

    def trouble(self) -> str:
        """Why it ended badly, or an empty string: the deadline, a signal, or the last line of its log."""
        if self.late:
            return f"no end within {self.deadline_s:g} s"
        if not self.returncode:
            return ""
        if self.returncode < 0:
            return f"ended by {signal.Signals(-self.returncode).name}"
        return last_error(self.log) or f"ended with exit code {self.returncode}"


def child_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment for a child that has to find the same rayalign."""
    import rayalign

    changes = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": None, **changes}
    environment = {key: value for key, value in os.environ.items() if key not in changes}
    environment |= {key: value for key, value in changes.items() if value is not None}
    home = str(Path(rayalign.__file__).resolve().parents[1])
    if not home.startswith((sys.prefix, sys.base_prefix)):  # a checkout, perhaps not installed
        paths = [home, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def last_error(log: Path) -> str:
    """The line of a log that most likely names the cause: the last one that begins with an error's name."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "error"))]
    chosen = named[-1:] or [line for line in lines if line.strip()][-1:]
    return " ".join(chosen[0].split()).removeprefix("error: ")[:400] if chosen else ""


def _read(pipe: IO[str], arrived: queue.SimpleQueue[str]) -> None:
    for line in pipe:
        arrived.put(line)


def _drained(arrived: queue.SimpleQueue[str], log: IO[str], *, wait_s: float) -> Iterator[str]:
    """What has arrived; waits a moment for the first line."""
    while True:
        try:
            line = arrived.get(timeout=wait_s) if wait_s else arrived.get_nowait()
        except queue.Empty:
            return
        wait_s = 0.0
        log.write(line)
        log.flush()
        yield line.rstrip("\n")


def _has_ended(process: subprocess.Popen[str]) -> bool:
    """Whether it has ended; it stays ours to wait for, so that its group is certainly this one."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: subprocess.Popen[str]) -> None:
    """End it, unless it has, and whatever it has started: asked first, so that it can end its own children. Ray's
    workers have groups of their own and notice only when they have started that the rest is gone: they are ended by
    descent, the others with the group."""
    family: set[psutil.Process] = set()
    try:
        limit = time.monotonic() + GRACE_S
        if not _has_ended(process):
            family |= _descendants(process.pid)
            os.killpg(process.pid, signal.SIGTERM)
        while not _has_ended(process) and time.monotonic() < limit:
            family |= _descendants(process.pid)
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()  # refuses where the number is another process's by now
        psutil.wait_procs(family, timeout=1.0)  # a killed process needs a moment to go


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()

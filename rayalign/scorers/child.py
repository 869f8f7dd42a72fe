"""Calls in a process of their own, which is ended when it does not answer, whatever holds it: a lock that is never
released, an endless loop, C code that keeps the interpreter to itself, threads that it has left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rayalign.errors import RayalignError
from rayalign.memory import read_text

# The child finds modules where its parent does. It does not run its parent's script again, as multiprocessing's would.
CODE = "import sys; sys.path[:] = {path!r}; from rayalign.scorers.child import serve; serve({descriptor})"
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class TooLate(Exception):
    """A call has not come back within its time; its process was ended."""


class Died(Exception):
    """The process ended instead of answering; the text says how."""


class Child:
    """A function that a process of its own makes and calls. It is started once, and again when it had to be ended.

    Args:
        make: of a module's top level; gives the function, of one argument.
        arguments: of `make`.
    """

    def __init__(self, make: Callable[..., Callable[[Any], Any]], *arguments: Any):
        self._made = (make, arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection

    def start(self, wait_s: float) -> None:
        """Unless it runs already. Raises TooLate, Died, and the RayalignError of `make`."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", CODE.format(path=sys.path, descriptor=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # so that what it starts itself can be ended with it
            )
        try:
            self(self._made, wait_s)
        except RayalignError:  # nothing was made that could be called
            self.close()
            raise

    def __call__(self, argument: Any, wait_s: float) -> Any:
        """What the function gives, once it is started. Raises TooLate, Died, and the function's RayalignError."""
        try:
            until = time.monotonic() + max(wait_s, 0.0)
            self._send(argument, until)
            if not self._pipe.poll(max(until - time.monotonic(), 0.0)):
                raise TooLate
            value, error = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise Died(self._ending()) from None
        except BaseException:  # an answer that comes later must not be taken for that of the next call
            self.close()
            raise
        if error is not None:
            raise error
        return value

    def _send(self, argument: Any, until: float) -> None:
        """By a thread, as a child that reads nothing blocks what is more than the pipe holds. Raises TooLate."""
        failed: list[BaseException] = []

        def send() -> None:
            try:
                self._pipe.send(argument)
            except BaseException as error:  # noqa: BLE001  raised where it was asked for
                failed.append(error)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        thread.join(max(until - time.monotonic(), 0.0))
        if thread.is_alive():
            raise TooLate
        if failed:
            raise failed[0]

    def memory_gib(self) -> float:
        """Peak of its resident set; 0 where it does not run, or the system does not say."""
        pid = self._process.pid if self._process is not None else 0
        lines = map(str.split, read_text(Path(f"/proc/{pid}/status")).splitlines())
        return next((int(line[1]) for line in lines if line[0] == "VmHWM:"), 0) / 2**20

    def close(self) -> None:
        """End the process, and what it has started."""
        if self._process is not None:
            self._pipe.close()
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _ending(self) -> str:
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)  # its pipe closes a moment before
        code = self._process.returncode
        self.close()
        return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def serve(descriptor: int) -> None:
    """The child: make the function, then call it for whatever comes, until the parent is gone."""
    if sys.platform == "linux":  # a call that hangs would not see that it is
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    with Connection(descriptor) as pipe, suppress(EOFError, ConnectionError):
        make, arguments = pipe.recv()
        call, error = _attempt(make, *arguments)
        pipe.send((None, error))
        while error is None:
            pipe.send(_attempt(call, pipe.recv()))


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, RayalignError | None]:
    try:
        return function(*arguments), None
    except RayalignError as error:
        return None, error

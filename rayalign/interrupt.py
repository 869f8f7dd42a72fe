"""Ctrl-C once: finish the step and write a checkpoint. Twice: stop at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupt:
    """Whether the run was asked to stop (SIGINT, or SIGTERM as schedulers send it)."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listen(self, say: Callable[[str], None]) -> Iterator[Interrupt]:
        """While inside, the first signal sets `requested`, the second raises KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # signals belong to the main thread; without it, they act as they always do
            return

        def handle(number: int, frame: object) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            say("stopping after this step and a checkpoint; once more to stop at once")

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

"""Ranks of a test, each a process."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch


def free_port() -> int:
    """Of this machine, where ranks can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(main: Callable[..., None], args: tuple, ranks: int, *, join: bool = True) -> Any:
    """main(rank, *args) in `ranks` processes. What one raises is raised here."""
    return torch.multiprocessing.spawn(_leave_at_once, (main, args), nprocs=ranks, join=join)


def _leave_at_once(rank: int, main: Callable[..., None], args: tuple) -> None:
    """Without the interpreter's end: gloo's threads may still run then, and what destroys them aborts the process."""
    main(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

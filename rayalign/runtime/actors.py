"""Plain objects made into Ray actors, at this one place."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayalign.runtime.placement import Place

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


class Host:
    """Holds one object in an actor's process, and sends what the process prints to its own log file."""

    def __init__(self, log_path: Path, factory: Callable[..., Any], arguments: dict[str, Any]):
        _redirect(log_path)
        self._object = factory(**arguments)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._object, method)(*args, **kwargs)

    def process_id(self) -> int:
        return os.getpid()


def start_actor(place: Place, log_dir: Path, factory: Callable[..., Any], **arguments: Any) -> Any:
    """An actor that holds `factory(**arguments)` at its place. Returns at once; the first call waits."""
    threads = str(max(1, len(place.cores)))
    environment = {**QUIET, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    actor = ray.remote(Host).options(
        num_cpus=place.cpus,
        num_gpus=place.gpus,
        scheduling_strategy=NodeAffinitySchedulingStrategy(place.node.id, soft=False),
        runtime_env={"env_vars": environment},
        max_restarts=0,
        max_concurrency=1,
    )
    return actor.remote(log_dir / f"{place.actor}.log", factory, arguments)


def _redirect(log_path: Path) -> None:
    """File descriptors 1 and 2, so that what C++ code and child processes print goes there as well."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    file = open(log_path, "a", buffering=1)  # noqa: SIM115 - lives as long as the process
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    logging.basicConfig(stream=file, level=logging.INFO, force=True, format="%(asctime)s %(name)s %(message)s")

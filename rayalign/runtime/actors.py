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

    def __init__(self, log_path: Path):
        _redirect(log_path)
        self._object: Any = None

    def start(self, factory: Callable[..., Any], arguments: dict[str, Any]) -> None:
        """Build the object; not in __init__, so that an error arrives as it is."""
        self._object = self._logged("start", factory, **arguments)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._logged(method, getattr(self._object, method), *args, **kwargs)

    def process_id(self) -> int:
        return os.getpid()

    def _logged(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception:
            logging.getLogger("rayalign").exception("%s failed", what)
            raise


def start_actor(place: Place, log_dir: Path, factory: Callable[..., Any], **arguments: Any) -> tuple[Any, Any]:
    """An actor that holds `factory(**arguments)` at its place, and the reference that is ready once it does."""
    threads = str(max(1, len(place.cores)))
    environment = {**QUIET, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": _own_paths()}
    actor = (
        ray.remote(Host)
        .options(
            num_cpus=place.cpus,
            num_gpus=place.gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node.id, soft=False),
            runtime_env={"env_vars": environment},
            max_restarts=0,
            max_concurrency=1,
        )
        .remote(log_dir / f"{place.actor}.log")
    )
    return actor, actor.start.remote(factory, arguments)


def _own_paths() -> str:
    """Where this process imports from, its environment's packages apart: parts that a config names by dotted
    path have to be found in the actors as well."""
    installed = (sys.prefix, sys.base_prefix)
    paths = [path for path in sys.path if path and not path.startswith(installed)]
    return os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def own_cores(cores: tuple[int, ...]) -> tuple[int, ...]:
    """Core numbers counted from 0 → those that this process may use (a container may have cores 8 and 9)."""
    allowed = sorted(os.sched_getaffinity(0))
    return tuple(sorted({allowed[core % len(allowed)] for core in cores}))


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

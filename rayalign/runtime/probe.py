"""Ray tried on its own: a small cluster of this machine, and one task on it.

Run as a child: `python -m rayalign.runtime.probe`.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter

MARK = "RAY "  # what the parent looks for among Ray's own lines


def main() -> int:
    """Prints MARK and {"version", "seconds", "cpus", "gpus"} as JSON."""
    started = perf_counter()
    import ray

    from rayalign.runtime import cluster
    from rayalign.runtime.placement import RayPlacement

    cluster.connect(RayPlacement(object_store_gib=0.1))
    try:
        answer = ray.get(ray.remote(num_cpus=1)(_square).remote(7), timeout=60)
        if answer != 49:
            raise RuntimeError(f"a task answered {answer}, not 49")
        have = ray.cluster_resources()
        found = {"version": ray.__version__, "cpus": have.get("CPU", 0), "gpus": have.get("GPU", 0)}
        print(MARK + json.dumps({**found, "seconds": perf_counter() - started}), flush=True)
    finally:
        cluster.disconnect()
    return 0


def _square(number: int) -> int:
    return number * number


if __name__ == "__main__":
    sys.exit(main())

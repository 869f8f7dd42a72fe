"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys


def peak_gib() -> float:
    """Highest resident set of this process so far, in GiB; on a GPU what was reserved there is added."""
    unit = 1 if sys.platform == "darwin" else 1024
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        total += torch.cuda.max_memory_reserved()
    return total / 2**30

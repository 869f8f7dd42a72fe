"""What torch sees of this machine, as JSON on one line. A child: importing a broken torch can end a process."""

from __future__ import annotations

import json
import sys
from typing import Any

MARK = "TORCH "


def facts() -> dict[str, Any]:
    """{"version", "cuda", "available", "error", "nccl", "gpus", "no_peer"}; see gpus.py."""
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "available": False,
        "error": "",
        "nccl": "",
        "gpus": [],
        "no_peer": [],
    }
    if torch.version.cuda is None:
        return found
    try:
        torch.cuda.init()
    except Exception as error:  # noqa: BLE001  what torch says is the finding: no driver, an old one, no device
        return found | {"error": " ".join(str(error).split())[:200]}
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found["gpus"].append({"name": properties.name, "free": free, "total": total, "capability": capability})
    pairs = [(a, b) for a in range(count) for b in range(count) if a < b]
    found["no_peer"] = [[a, b] for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found | {"available": count > 0}


if __name__ == "__main__":
    print(MARK + json.dumps(facts()), flush=True)
    sys.exit(0)

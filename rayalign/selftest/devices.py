"""The GPUs that a self-test may use, and how its tiny model is computed on them, or on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_GAP = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.15}  # nats a token, by the engine's dtype
BFLOAT16_FROM = 8.0  # compute capability: below it vLLM refuses bfloat16


@dataclass(frozen=True)
class Gpu:
    """Its memory in GiB, and its compute capability. As text, for children: 79.2:9.0."""

    gib: float
    capability: float

    def __str__(self) -> str:
        return f"{self.gib:.1f}:{self.capability:.1f}"

    @classmethod
    def parse(cls, text: str) -> Gpu:
        gib, _, capability = text.partition(":")
        return cls(float(gib), float(capability))


def engine_dtype(gpus: Sequence[Gpu]) -> str:
    """vLLM's attention kernels for GPUs have no float32."""
    if not gpus:
        return "float32"
    return "bfloat16" if _all_have_bfloat16(gpus) else "float16"


def learner_dtype(gpus: Sequence[Gpu]) -> str:
    return "bfloat16" if gpus and _all_have_bfloat16(gpus) else "float32"


def engine_settings(gpus: Sequence[Gpu]) -> dict[str, Any]:
    """Of a tiny engine: about 3 GiB of a GPU, so that it fits beside others."""
    share = min(0.9, max(0.05, 3 / min(gpu.gib for gpu in gpus))) if gpus else 0.85
    return {
        "dtype": engine_dtype(gpus),
        "max_context": 128,
        "max_running": 16,
        "kv_cache_gib": 0.1,
        "gpu_memory": round(share, 3),
        "deadline_s": 120,
    }


def _all_have_bfloat16(gpus: Sequence[Gpu]) -> bool:
    return all(gpu.capability >= BFLOAT16_FROM for gpu in gpus)

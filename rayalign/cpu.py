"""What this machine's CPU computes in hardware."""

from __future__ import annotations

from pathlib import Path

BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")  # of x86 and of ARM, as Linux names them


def bfloat16_flags(cpuinfo: str | None = None) -> list[str]:
    """Instructions for bfloat16; empty where it is computed in software, up to thirty times slower than float32.

    Args:
        cpuinfo: the text of /proc/cpuinfo, of this machine by default. Without it (macOS) nothing is known.

    Raises:
        OSError: there is no such file.
    """
    text = Path("/proc/cpuinfo").read_text("utf-8") if cpuinfo is None else cpuinfo
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return sorted({word for line in lines for word in line.split()} & set(BFLOAT16))


def slow_bfloat16() -> bool:
    """Whether this CPU is known to compute bfloat16 in software."""
    try:
        return not bfloat16_flags()
    except OSError:
        return False

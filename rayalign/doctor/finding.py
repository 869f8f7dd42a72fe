"""What doctor says about one thing that it looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of doctor.

    Attributes:
        level: ok; note: worth knowing, a run works; problem: a run fails or is not what was tested.
        topic: what was looked at.
        found: what was there, with its value.
        remedy: what to do, where there is something to do.
    """

    level: Literal["ok", "note", "problem"]
    topic: str
    found: str
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]


def guarded(topic: str, check: Check) -> Iterator[Finding]:
    """A check's findings; one that fails is a finding itself."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001  doctor is for machines on which things are broken
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield Finding(
            "problem", topic, f"the check itself failed: {cause}", "repair what the error names, then try again"
        )


def gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"

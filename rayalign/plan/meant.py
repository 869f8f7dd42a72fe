"""What someone probably meant by nodes that cannot be read: `8xh100` → `1x8xH100`."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches

LOOSE = re.compile(r"(?:(?P<first>[1-9]\d*)x)?(?:(?P<second>[1-9]\d*)x)?(?P<rest>.+)", re.IGNORECASE)
CORES = re.compile(r"(\d+)(?:cpu|core)s?", re.IGNORECASE)
MEMORY = re.compile(r"(\d+(?:\.\d+)?)(?:Gi?B?)", re.IGNORECASE)


def compact(part: str) -> str:
    """Without spaces, and with plain letters for signs."""
    return "".join(part.split()).replace("×", "x")


def probably_meant(part: str, gpus: Collection[str]) -> str:
    """'did you mean …?' with texts that can be read; an empty string when none is near.

    Args:
        gpus: names of those that are known.
    """
    core, *items = compact(part).split("/")
    found = LOOSE.fullmatch(core)
    host = [_host_item(item, alone=n == len(items) - 1) for n, item in enumerate(items)]
    if not found or not all(host):
        return ""
    counts = [count for count in (found["first"], found["second"]) if count]
    options: dict[str, None] = {}
    if (cores := CORES.fullmatch(found["rest"])) and len(counts) < 2:
        options[f"{(counts or ['1'])[0]}x{cores[1]}cpu"] = None
    elif kind := _gpu(found["rest"], gpus):
        for pair in [("1", *counts), (*counts, "1")] if len(counts) < 2 else [counts]:
            options["x".join((*(pair if len(pair) == 2 else ("1", "1")), kind))] = None
    texts = ["/".join([option, *host]) for option in options]
    return f"did you mean {', or '.join(texts)}?" if texts else ""


def _host_item(item: str, *, alone: bool) -> str:
    """The last one may lack its unit: memory, since cores stand before it."""
    if cores := CORES.fullmatch(item):
        return f"{cores[1]}cpu"
    memory = MEMORY.fullmatch(item) or (re.fullmatch(r"(\d+)", item) if alone else None)
    return f"{memory[1]}GiB" if memory else ""


def _gpu(word: str, gpus: Collection[str]) -> str:
    if memory := MEMORY.fullmatch(word):
        return f"{memory[1]}GiB"
    known = {name.upper(): name for name in gpus}
    return next((known[name] for name in get_close_matches(word.upper(), known, n=1)), "")

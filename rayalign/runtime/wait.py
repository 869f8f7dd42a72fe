"""Waiting for actors: always with a deadline, always saying for whom, and with the root cause first."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rayalign.errors import RayalignError

log = logging.getLogger("rayalign")
SAY_EVERY_S = 60.0  # a calm run says nothing; a stuck one says for whom it waits


class ActorDied(Exception):
    """An actor's process is gone. For pools, which may replace it."""

    def __init__(self, who: str, reason: str):
        super().__init__(f"{who}: {reason}")
        self.who, self.reason = who, reason


def wait_all(
    refs: Mapping[Any, str], *, what: str, deadline_s: float, lost: type[RayalignError], log_dir: Path | None = None
) -> list[Any]:
    """The values of all refs, in order.

    Args:
        refs: object reference → name of the actor that owes it.
        what: what they were asked for.

    Raises:
        lost: an actor died, or has not answered within the deadline; names it.
        RayalignError: whatever the actor itself raised, as it was.
    """
    pending, started, said = dict(refs), time.monotonic(), SAY_EVERY_S
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=1.0, fetch_local=False)
        for ref in ready:
            fetch(ref, pending.pop(ref), lost=lost, log_dir=log_dir)  # raises at once, whoever else is still at work
        waited = time.monotonic() - started
        if pending and waited > said:
            log.warning("waiting for %s (%s), %.0f s so far", ", ".join(pending.values()), what, waited)
            said += SAY_EVERY_S
        if pending and waited > deadline_s:
            raise late(lost, ", ".join(pending.values()), what, deadline_s, log_dir)
    return [ray.get(ref) for ref in refs]


def fetch(ref: Any, who: str, *, lost: type[RayalignError] | None = None, log_dir: Path | None = None) -> Any:
    """The value of a ref that is ready. A dead actor is ActorDied, or `lost` when that is given."""
    try:
        return ray.get(ref, timeout=60)
    except RayTaskError as error:
        raise root_cause(error) from None
    except (RayActorError, GetTimeoutError, RayError) as error:
        reason = " ".join(str(error).split())[:300]
        if lost is None:
            raise ActorDied(who, reason) from None
        raise lost(
            f"{who} died",
            where=who,
            value=reason,
            remedy=f"see {log_file(log_dir, who)}; `resume=true` goes on from the last checkpoint",
        ) from None


def root_cause(error: RayTaskError) -> BaseException:
    """What the actor raised: our own errors as they are, others with one line of where."""
    cause = error.cause if isinstance(error.cause, BaseException) else error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException) and cause.cause is not cause:
        cause = cause.cause
    return cause


def late(lost: type[RayalignError], who: str, what: str, deadline_s: float, log_dir: Path | None) -> RayalignError:
    return lost(
        f"no answer to {what} within the deadline",
        where=who,
        rule=f"{deadline_s:g} s",
        remedy=f"see {log_file(log_dir, who)}; raise the deadline if it was still at work",
    )


def log_file(log_dir: Path | None, who: str) -> str:
    return str(log_dir / f"{who.split(',')[0]}.log") if log_dir else "the actor's log"

"""Waiting for actors: always with a deadline, always saying for whom, and with the root cause first."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rayalign.errors import ActorError, RayalignError

log = logging.getLogger("rayalign")
SAY_EVERY_S = 60.0  # a calm run says nothing; a stuck one says for whom it waits
GRACE_S = 10.0  # after one rank failed: how long the others have to show that it was their death


class ActorDied(Exception):
    """An actor's process is gone. For pools, which may replace it."""

    def __init__(self, who: str, reason: str):
        super().__init__(f"{who}: {reason}")
        self.who, self.reason = who, reason


class Late(Exception):
    """Actors have not answered within the deadline."""

    def __init__(self, who: str):
        super().__init__(who)
        self.who = who


def answers(refs: Mapping[Any, str], *, what: str, deadline_s: float) -> Iterator[Any]:
    """The refs, each as soon as it is ready.

    Args:
        refs: object reference → name of the actor that owes it.
        what: what they were asked for, said aloud while it takes long.

    Raises:
        Late: naming those that have not answered within the deadline.
    """
    pending, started, said = dict(refs), time.monotonic(), SAY_EVERY_S
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=1.0)
        for ref in ready:
            del pending[ref]
            yield ref
        waited = time.monotonic() - started
        if pending and waited > deadline_s:
            raise Late(", ".join(pending.values()))
        if pending and waited > said:
            log.warning("waiting for %s (%s), %.0f s so far", ", ".join(pending.values()), what, waited)
            said += SAY_EVERY_S


def fetch(ref: Any, who: str, what: str = "") -> Any:
    """The value of a ref that is ready.

    Raises:
        ActorDied: the actor's process is gone.
        RayalignError: what the actor raised: our own errors as they are, others as ActorError.
    """
    try:
        return ray.get(ref, timeout=60)
    except RayTaskError as error:
        cause = root_cause(error)
        if isinstance(cause, RayalignError):
            raise cause from None
        raise ActorError(
            f"{type(cause).__name__}: {' '.join(str(cause).split())}",
            where=f"{who}, {what}" if what else who,
            remedy=f"the traceback is in the run's log/{who}.log",
        ) from cause
    except RayError as error:
        raise ActorDied(who, " ".join(str(error).split())[:300]) from None


def wait_all(
    refs: Mapping[Any, str], *, what: str, deadline_s: float, lost: type[RayalignError], log_dir: Path
) -> list[Any]:
    """The values of all refs, in order; none of these actors can be replaced.

    Raises:
        lost: an actor died, or has not answered within the deadline; names it.
        RayalignError: what an actor itself raised.
    """
    values = {}
    try:
        for ref in answers(refs, what=what, deadline_s=deadline_s):
            values[ref] = fetch(ref, refs[ref], what)
    except ActorDied as death:
        raise died(lost, death, log_dir) from None
    except Late as wait:
        raise late(lost, wait.who, what, deadline_s, log_dir) from None
    except ActorError as error:
        # When a rank dies, a collective call fails on the others first: their error is not the cause.
        death = _death_among({ref: who for ref, who in refs.items() if ref not in values})
        raise error if death is None else died(lost, death, log_dir) from None
    return [values[ref] for ref in refs]


def _death_among(refs: Mapping[Any, str]) -> ActorDied | None:
    limit = time.monotonic() + GRACE_S
    pending = list(refs)
    while pending and len(refs) > 1 and time.monotonic() < limit:
        ready, pending = ray.wait(pending, num_returns=1, timeout=0.5)
        for ref in ready:
            try:
                fetch(ref, refs[ref])
            except ActorDied as death:
                return death
            except RayalignError:
                continue
    return None


def root_cause(error: RayTaskError) -> BaseException:
    """What the actor raised, out of Ray's wrappings."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException) and cause.cause is not cause:
        cause = cause.cause
    return cause


def died(lost: type[RayalignError], death: ActorDied, log_dir: Path) -> RayalignError:
    return lost(
        f"{death.who} died",
        where=death.who,
        value=death.reason,
        remedy=f"see {log_dir / (death.who + '.log')}; resume=true goes on from the last checkpoint",
    )


def late(lost: type[RayalignError], who: str, what: str, deadline_s: float, log_dir: Path) -> RayalignError:
    return lost(
        f"no answer to {what} within the deadline",
        where=who,
        rule=f"{deadline_s:g} s",
        remedy=f"see {log_dir / (who.split(',')[0] + '.log')}; raise the deadline if it was still at work",
    )

"""Pools of actors that satisfy the protocol of one engine, or of one scorer.

A dead member is replaced, given the current weights, and asked again for what it had open. Seeds belong to
requests, so the answers are the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rayalign.errors import EngineLost, RayalignError, ScorerLost, SyncMismatch
from rayalign.protocols import Engine, WeightPush
from rayalign.runtime.actors import own_cores
from rayalign.runtime.transport import resolve_push
from rayalign.runtime.wait import ActorDied, Late, answers, fetch, late, wait_all
from rayalign.types import Completion, Group, Request

log = logging.getLogger("rayalign")
AGREE = 0.05  # nats, mean: engines of a pool hold the same weights, so only kernels may differ
POLL_S = 1.0  # how long a member works before it reports that nothing has finished yet


class EngineHost:
    """An engine in an actor: weights arrive as handles, core numbers count from 0; both are resolved here."""

    def __init__(self, build: Callable[..., Engine], cores: tuple[int, ...], arguments: dict[str, Any]):
        self._engine = build(cores=own_cores(cores), **arguments)

    def load(self, push: WeightPush) -> None:
        self._engine.load(resolve_push(push))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@dataclass
class Member:
    """One actor of a pool.

    Attributes:
        started: ready once its object is built.
        open: what it owes, by id.
        polling: its poll that is under way.
        sent: submissions whose errors nobody has looked at yet.
        heard: when it last finished something, or was given work while it had none.
    """

    name: str
    actor: Any
    started: Any
    open: dict[str, Any] = field(default_factory=dict)
    polling: Any = None
    sent: list[Any] = field(default_factory=list)
    heard: float = 0.0


class ActorPool:
    """What engine pools and scorer pools share: work is dealt to the least busy, results come by polls.

    Args:
        start: index → (actor, reference that is ready once it has started).
        lost: raised when a member is given up.
        deadline_s: seconds without any result from a member that owes one.
        max_replacements: dead members that are replaced in the pool's life.
    """

    def __init__(
        self,
        start: Callable[[int], tuple[Any, Any]],
        names: Sequence[str],
        *,
        lost: type[RayalignError],
        deadline_s: float,
        start_deadline_s: float,
        max_replacements: int,
        log_dir: Path,
    ):
        self._start, self._lost, self._deadline_s = start, lost, deadline_s
        self._start_deadline_s, self._left, self._log_dir = start_deadline_s, max_replacements, log_dir
        self.members = [Member(name, *start(index)) for index, name in enumerate(names)]

    def ready(self) -> None:
        """Wait until all members have started."""
        self._wait({member.started: member.name for member in self.members}, "start", self._start_deadline_s)

    def deal(self, items: Iterable[tuple[str, Any]]) -> None:
        """Give each (id, item) to the member with the fewest open."""
        dealt: dict[int, list[Any]] = {}
        for key, item in items:
            place = min(range(len(self.members)), key=lambda i: len(self.members[i].open))
            member = self.members[place]
            if not member.open:
                member.heard = time.monotonic()
            member.open[key] = item
            dealt.setdefault(place, []).append(item)
        for place, share in dealt.items():
            self.members[place].sent.append(self.members[place].actor.call.remote("submit", share))

    def gather(self, timeout_s: float, key: Callable[[Any], str]) -> list[Any]:
        """What has finished since the last call, from all members. A result that nobody waits for any more
        (it was answered before its member died) is dropped."""
        for member in self.members:
            self._check_submissions(member)
            if member.open and member.polling is None:
                member.polling = member.actor.call.remote("poll", POLL_S)
        polls = {member.polling: member for member in self.members if member.polling is not None}
        if not polls:
            return []
        ready, _ = ray.wait(list(polls), num_returns=1, timeout=timeout_s)
        finished = []
        for ref in ready:
            member, polls[ref].polling = polls[ref], None
            try:
                results = fetch(ref, member.name, "poll")
            except (ActorDied, EngineLost) as death:  # its process, or the engine in it, whose state is unknown
                self._replace(member, death)
                continue
            for result in results:
                if member.open.pop(key(result), None) is not None:
                    finished.append(result)
                    member.heard = time.monotonic()
        self._check_deadlines()
        return finished

    @staticmethod
    def _check_submissions(member: Member) -> None:
        """Raise what a submission raised. A dead member is left to its poll, which replaces it."""
        if member.sent:
            done, member.sent = ray.wait(member.sent, num_returns=len(member.sent), timeout=0)
            for ref in done:
                with suppress(ActorDied):
                    fetch(ref, member.name, "submit")

    def call_all(self, method: str, *args: Any) -> list[Any]:
        """The same call on all members, between requests; the answers in their order. Dead ones are replaced."""
        found: dict[str, Any] = {}
        while len(found) < len(self.members):
            asked = {m.actor.call.remote(method, *args): m for m in self.members if m.name not in found}
            names = {ref: member.name for ref, member in asked.items()}
            try:
                for ref in answers(names, what=method, deadline_s=self._deadline_s):
                    try:
                        found[names[ref]] = fetch(ref, names[ref], method)
                    except (ActorDied, EngineLost) as death:
                        self._replace(asked[ref], death)
            except Late as wait:
                raise late(self._lost, wait.who, method, self._deadline_s, self._log_dir) from None
        return [found[member.name] for member in self.members]

    def _replace(self, member: Member, death: Exception) -> None:
        reason = death.reason if isinstance(death, ActorDied) else str(death)
        with suppress(Exception):  # it may be gone already; what it has reserved has to be free for the next one
            ray.kill(member.actor)
        if self._left <= 0:
            raise self._lost(
                f"{member.name} died, and no replacement is left",
                where=member.name,
                value=reason,
                rule="max_replacements",
                remedy=f"see {self._log_dir / (member.name + '.log')}",
            )
        self._left -= 1
        log.warning("%s died and is being replaced; its open requests are asked again", member.name)
        log.info("%s: %s", member.name, reason)
        member.actor, member.started = self._start(self.members.index(member))
        member.polling, member.sent = None, []
        self._wait({member.started: member.name}, "start", self._start_deadline_s)
        self._prepare(member)
        if member.open:
            member.sent.append(member.actor.call.remote("submit", list(member.open.values())))
        for each in self.members:  # nobody was listened to meanwhile
            each.heard = time.monotonic()

    def _prepare(self, member: Member) -> None:
        """Bring a new member to where the others are."""

    def _wait(self, refs: dict[Any, str], what: str, deadline_s: float) -> None:
        wait_all(refs, what=what, deadline_s=deadline_s, lost=self._lost, log_dir=self._log_dir)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for member in self.members:
            if member.open and now - member.heard > self._deadline_s:
                raise late(self._lost, member.name, f"{len(member.open)} open items", self._deadline_s, self._log_dir)

    def memory_gib(self) -> float:
        return sum(self.call_all("memory_gib"))

    def close(self) -> None:
        for member in self.members:
            ray.kill(member.actor)


class EnginePool(ActorPool):
    """Many engines as one `protocols.Engine`."""

    def __init__(self, start: Callable[[int], tuple[Any, Any]], names: Sequence[str], **settings: Any):
        super().__init__(start, names, lost=EngineLost, **settings)
        self.version = 0
        self._push: WeightPush | None = None

    def submit(self, requests: Sequence[Request]) -> None:
        self.deal((request.id, request) for request in requests)

    def poll(self, timeout_s: float = 1.0) -> list[Completion]:
        return self.gather(timeout_s, key=lambda completion: completion.request_id)

    def abort(self, request_ids: Iterable[str]) -> None:
        ids = set(request_ids)
        for member in self.members:
            mine = ids & member.open.keys()
            if mine:
                for request_id in mine:
                    del member.open[request_id]
                member.sent.append(member.actor.call.remote("abort", sorted(mine)))

    def load(self, push: WeightPush) -> None:
        self._push = push  # first, so that a member that dies while loading is replaced by one with these weights
        self.call_all("load", push)
        self.version = push.version

    def logps(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """The first engine's, once all are seen to agree: the same weights on the same batch."""
        first, *others = self.call_all("logps", sequences)
        for member, answer in zip(self.members[1:], others, strict=True):
            gap = max((float(np.abs(a - b).mean()) for a, b in zip(first, answer, strict=True) if a.size), default=0.0)
            if not gap <= AGREE:
                raise SyncMismatch(
                    f"{member.name} and {self.members[0].name} disagree on the same text",
                    where=member.name,
                    value=f"mean log-prob gap {gap:.3g}",
                    rule=f"at most {AGREE} between engines of one pool",
                    remedy=f"one of them did not load its weights; see {self._log_dir}",
                )
        return first

    def sleep(self) -> None:
        self.call_all("sleep")

    def wake(self) -> None:
        self.call_all("wake")

    def _prepare(self, member: Member) -> None:
        if self._push is not None:
            self._wait({member.actor.call.remote("load", self._push): member.name}, "load", self._deadline_s)


class ScorerPool(ActorPool):
    """Many scorers as one `protocols.Scorer`."""

    def __init__(self, start: Callable[[int], tuple[Any, Any]], names: Sequence[str], **settings: Any):
        super().__init__(start, names, lost=ScorerLost, **settings)

    def submit(self, groups: Sequence[Group]) -> None:
        self.deal((group.id, group) for group in groups)

    def poll(self, timeout_s: float = 1.0) -> list[Group]:
        return self.gather(timeout_s, key=lambda group: group.id)

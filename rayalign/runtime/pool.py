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
from rayalign.runtime.transport import resolve_push
from rayalign.runtime.wait import ActorDied, fetch, late, wait_all
from rayalign.types import Completion, Group, Request

log = logging.getLogger("rayalign")
AGREE = 0.05  # nats, mean: engines of a pool hold the same weights, so only kernels may differ
POLL_S = 1.0  # how long a member works before it reports that nothing has finished yet


class EngineHost:
    """An engine in an actor: weights arrive as handles, and are resolved here."""

    def __init__(self, build: Callable[..., Engine], arguments: dict[str, Any]):
        self._engine = build(**arguments)

    def load(self, push: WeightPush) -> None:
        self._engine.load(resolve_push(push))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@dataclass
class Member:
    """One actor of a pool: what it owes (by id), and its poll that is under way."""

    name: str
    actor: Any
    open: dict[str, Any] = field(default_factory=dict)
    polling: Any = None
    sent: list[Any] = field(default_factory=list)  # submissions whose errors nobody has looked at yet
    heard: float = 0.0  # when it last finished something, or was first given work


class ActorPool:
    """What engine pools and scorer pools share: work is dealt to the least busy, results come by polls."""

    def __init__(
        self,
        start: Callable[[int], Any],
        names: Sequence[str],
        *,
        lost: type[RayalignError],
        deadline_s: float,
        start_deadline_s: float,
        max_replacements: int,
        log_dir: Path,
        on_replace: Callable[[str], None] | None = None,
    ):
        self._start, self._lost, self._deadline_s = start, lost, deadline_s
        self._start_deadline_s, self._left, self._log_dir = start_deadline_s, max_replacements, log_dir
        self._on_replace = on_replace or (lambda name: log.warning("%s died and is being replaced", name))
        self.members = [Member(name, start(index)) for index, name in enumerate(names)]

    def ready(self) -> None:
        """Wait until all members have started."""
        refs = {member.actor.process_id.remote(): member.name for member in self.members}
        wait_all(refs, what="start", deadline_s=self._start_deadline_s, lost=self._lost, log_dir=self._log_dir)

    def deal(self, items: Iterable[tuple[str, Any]]) -> None:
        """Give each (id, item) to the member with the fewest open."""
        dealt: dict[int, list[Any]] = {}
        for key, item in items:
            place = min(range(len(self.members)), key=lambda i: len(self.members[i].open))
            self.members[place].open[key] = item
            dealt.setdefault(place, []).append(item)
        for place, share in dealt.items():
            member = self.members[place]
            member.heard = time.monotonic()
            member.sent.append(member.actor.call.remote("submit", share))

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
                results = fetch(ref, member.name)
            except ActorDied as death:
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
        done, member.sent = ray.wait(member.sent, num_returns=len(member.sent), timeout=0) if member.sent else ([], [])
        for ref in done:
            with suppress(ActorDied):
                fetch(ref, member.name)

    def call_all(self, method: str, *args: Any, deadline_s: float | None = None) -> list[Any]:
        """The same call on all members; for calls between requests. A dead member is replaced first."""
        try:
            return self._call_all(method, *args, deadline_s=deadline_s)
        except ActorDied:
            for member in list(self.members):
                try:
                    fetch(member.actor.process_id.remote(), member.name)
                except ActorDied as death:
                    self._replace(member, death)
            return self._call_all(method, *args, deadline_s=deadline_s)

    def _call_all(self, method: str, *args: Any, deadline_s: float | None) -> list[Any]:
        refs = {member.actor.call.remote(method, *args): member for member in self.members}
        names = {ref: member.name for ref, member in refs.items()}
        pending, started = list(refs), time.monotonic()
        limit = deadline_s or self._deadline_s
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=1.0)
            for ref in ready:
                fetch(ref, names[ref])
            if pending and time.monotonic() - started > limit:
                raise late(self._lost, ", ".join(names[ref] for ref in pending), method, limit, self._log_dir)
        return [fetch(ref, names[ref]) for ref in refs]

    def _replace(self, member: Member, death: ActorDied) -> None:
        if self._left <= 0:
            raise self._lost(
                f"{member.name} died, and no replacement is left",
                where=member.name,
                value=death.reason,
                rule="max_replacements",
                remedy=f"see {self._log_dir / (member.name + '.log')}",
            )
        self._left -= 1
        self._on_replace(member.name)
        member.actor, member.polling, member.sent = self._start(self.members.index(member)), None, []
        refs = {member.actor.process_id.remote(): member.name}
        wait_all(refs, what="start", deadline_s=self._start_deadline_s, lost=self._lost, log_dir=self._log_dir)
        self._prepare(member)
        member.heard = time.monotonic()
        if member.open:
            member.sent.append(member.actor.call.remote("submit", list(member.open.values())))

    def _prepare(self, member: Member) -> None:
        """Bring a new member to where the others are."""

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

    def __init__(self, start: Callable[[int], Any], names: Sequence[str], **settings: Any):
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
                member.actor.call.remote("abort", sorted(mine))

    def load(self, push: WeightPush) -> None:
        self._push = push  # first, so that a member that dies while loading is replaced by one with these weights
        self.call_all("load", push)
        self.version = push.version

    def logps(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """The first engine's, once all are seen to agree: the same weights on the same batch."""
        first, *others = self.call_all("logps", sequences)
        for member, answer in zip(self.members[1:], others, strict=True):
            gap = max((float(np.abs(a - b).mean()) for a, b in zip(first, answer, strict=True) if a.size), default=0.0)
            if gap > AGREE:
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
            refs = {member.actor.call.remote("load", self._push): member.name}
            wait_all(refs, what="load", deadline_s=self._deadline_s, lost=EngineLost, log_dir=self._log_dir)


class ScorerPool(ActorPool):
    """Many scorers as one `protocols.Scorer`."""

    def __init__(self, start: Callable[[int], Any], names: Sequence[str], **settings: Any):
        super().__init__(start, names, lost=ScorerLost, **settings)

    def submit(self, groups: Sequence[Group]) -> None:
        self.deal((group.id, group) for group in groups)

    def poll(self, timeout_s: float = 1.0) -> list[Group]:
        return self.gather(timeout_s, key=lambda group: group.id)

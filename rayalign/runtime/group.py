"""Learner ranks as one learner a role: the same calls, in the same order, on every rank."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rayalign.errors import LearnerLost
from rayalign.learners.merge import merge_annotations, merge_metrics
from rayalign.memory import peak_gib
from rayalign.protocols import Algorithm, UpdatePlan, WeightPush
from rayalign.runtime.actors import start_actor
from rayalign.runtime.placement import Place
from rayalign.runtime.transport import put_chunk, resolve_push
from rayalign.runtime.wait import wait_all
from rayalign.types import AnyColumn, Example, Metrics


class LearnerHost:
    """All roles of one rank in one actor, built in the same order on every rank."""

    def __init__(self, rank: int, world_size: int):
        self._rank, self._world_size, self._roles = rank, world_size, {}

    def address(self) -> tuple[str, int]:
        """Where the ranks can meet: this node, and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def build(
        self, factory: Callable[..., dict[str, Any]], arguments: dict[str, Any], address: tuple[str, int]
    ) -> None:
        self._roles = factory(rank=self._rank, world_size=self._world_size, address=address, **arguments)
        for learner in self._roles.values():
            learner.wrap_chunk = put_chunk

    def run(self, role: str, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._roles[role], method)(*args, **kwargs)

    def take(self, role: str, push: WeightPush, decay: float) -> None:
        """Weights of a role in another group, as handles, into a role of this one."""
        self._roles[role].take(resolve_push(push), decay=decay)

    def memory_gib(self) -> float:
        return peak_gib()


class LearnerGroup:
    """The actors of all ranks. `role(name)` is a `protocols.Learner` on them.

    Args:
        factory: (rank, world_size, address, **arguments) → learners by role, called in each actor.
    """

    def __init__(
        self,
        places: Sequence[Place],
        factory: Callable[..., dict[str, Any]],
        arguments: dict[str, Any],
        *,
        log_dir: Path,
        deadline_s: float,
        start_deadline_s: float,
    ):
        self._names = [place.actor for place in places]
        self._log_dir, self._deadline_s, self._start_deadline_s = log_dir, deadline_s, start_deadline_s
        self._factory, self._arguments = factory, arguments
        started = [
            start_actor(place, log_dir, LearnerHost, rank=rank, world_size=len(places))
            for rank, place in enumerate(places)
        ]
        self.actors = [actor for actor, _ in started]
        self._started = [ready for _, ready in started]
        self._building: list[Any] = []

    def start(self) -> None:
        """Begin to build the roles on all ranks; `ready` waits for it."""
        self._wait(self._started, "start", self._start_deadline_s)
        address = self._wait([self.actors[0].call.remote("address")], "start", self._start_deadline_s)[0]
        self._building = [a.call.remote("build", self._factory, self._arguments, address) for a in self.actors]

    def ready(self) -> None:
        self._wait(self._building, "load the model", self._start_deadline_s)

    def role(self, name: str, others: Mapping[str, LearnerGroup] | None = None) -> RoleOnRanks:
        """
        Args:
            others: groups of actors by the roles in them that this one may follow, other than those of this group.
        """
        return RoleOnRanks(self, name, others or {})

    def run(self, role: str, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """The answers of all ranks, in order. Raises LearnerLost naming a rank that died or is late."""
        refs = [actor.call.remote("run", role, method, *args, **kwargs) for actor in self.actors]
        return self._wait(refs, f"{method} of the {role}", self._deadline_s)

    def take(self, role: str, push: WeightPush, decay: float) -> None:
        """Weights of a role in another group into a role of this one, on all ranks."""
        refs = [actor.call.remote("take", role, push, decay) for actor in self.actors]
        self._wait(refs, f"the weights that the {role} follows", self._deadline_s)

    def memory_gib(self) -> float:
        """Peak memory of all ranks' processes."""
        refs = [actor.call.remote("memory_gib") for actor in self.actors]
        return sum(self._wait(refs, "memory_gib", self._deadline_s))

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _wait(self, refs: Sequence[Any], what: str, deadline_s: float) -> list[Any]:
        owed = dict(zip(refs, self._names, strict=False))
        return wait_all(owed, what=what, deadline_s=deadline_s, lost=LearnerLost, log_dir=self._log_dir)


class RoleOnRanks:
    """One role of a group, as a `protocols.Learner`."""

    def __init__(self, group: LearnerGroup, role: str, others: Mapping[str, LearnerGroup]):
        self._group, self._role, self._others = group, role, others

    def annotate(self, examples: Sequence[Example], columns: Sequence[AnyColumn]) -> list[Example]:
        shards = self._group.run(self._role, "annotate_shard", list(examples), tuple(columns))
        return merge_annotations(examples, shards)

    def update(self, examples: Sequence[Example], algorithm: Algorithm, plan: UpdatePlan) -> Metrics:
        return merge_metrics(self._group.run(self._role, "update_shard", list(examples), algorithm, plan))

    def measure(self, examples: Sequence[Example], algorithm: Algorithm) -> Metrics:
        return merge_metrics(self._group.run(self._role, "measure_shard", list(examples), algorithm))

    def logps(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        return self._group.run(self._role, "logps", list(sequences))[0]

    def push(self, version: int) -> WeightPush:
        return self._group.run(self._role, "push", version)[0]

    def refresh(self, source: str, *, decay: float = 0.0) -> None:
        """From a role in other actors by a push, as it holds its weights: the same numbers arrive as beside it."""
        if source not in self._others:
            self._group.run(self._role, "refresh", source, decay=decay)
            return
        push = self._others[source].run(source, "push", 0, exact=True)[0]
        self._group.take(self._role, push, decay)

    def temper(self, temperature: float) -> None:
        self._group.run(self._role, "temper", temperature)

    def export(self, path: Path) -> None:
        self._group.run(self._role, "export", path.resolve())

    def save(self, path: Path) -> None:
        self._group.run(self._role, "save", path.resolve())

    def restore(self, path: Path) -> None:
        self._group.run(self._role, "restore", path.resolve())

    def memory_gib(self) -> float:
        """Of all ranks' processes, all roles in them included."""
        return self._group.memory_gib()

    def close(self) -> None:
        self._group.close()

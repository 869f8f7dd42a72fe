"""A judge that asks the policy's own engine, with the reference's weights in it while it judges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rayalign.errors import SyncMismatch
from rayalign.protocols import Engine, Learner, Roles, WeightPush
from rayalign.scorers.base import score_groups
from rayalign.scorers.engine_asker import EngineAsking
from rayalign.sync.handshake import push_weights
from rayalign.types import Completion, Group, Request

BORROWED = -1  # the version of the reference's weights in the engine: no completion of a run has it
PROBES = 2  # completions on which both pushes are verified


class CountedEngine:
    """An engine that knows which requests are open: its weights change only when there are none."""

    def __init__(self, engine: Engine):
        self._engine, self._open = engine, set[str]()
        self.spoiled = False  # it holds weights that nobody may sample from, until others are loaded

    @property
    def idle(self) -> bool:
        return not self._open

    @property
    def version(self) -> int:
        return self._engine.version

    def load(self, push: WeightPush) -> None:
        self._engine.load(push)
        self.spoiled = False

    def submit(self, requests: Sequence[Request]) -> None:
        if self.spoiled:
            raise SyncMismatch(
                "the policy's engine holds the weights that it judged with",
                where="scorer.ask: policy",
                rule="sampling only from the learner's weights",
                remedy="push the policy's weights first",
            )
        self._engine.submit(requests)
        self._open |= {request.id for request in requests}

    def poll(self, timeout_s: float = 1.0) -> list[Completion]:
        finished = self._engine.poll(timeout_s)
        self._open -= {completion.request_id for completion in finished}
        return finished

    def abort(self, request_ids: Iterable[str]) -> None:
        ids = list(request_ids)
        self._engine.abort(ids)
        self._open -= set(ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class LentScorer:
    """`protocols.Scorer` by a judge whose engine is the policy's. Groups wait until no completion is being sampled;
    then all of them are judged in one go: one load of the reference, one push of the policy back.

    Without a policy (where answers are labelled, and nothing is trained) the engine holds the model as it is.

    After an error while judging the engine samples no more until weights are loaded: it may hold the reference's.

    Args:
        config: a judge with `ask: policy`.
        max_gap: of both pushes, see `sync.handshake`.
    """

    def __init__(
        self, config: Any, engine: CountedEngine, roles: Roles, tokenizer: Any, *, max_context: int, max_gap: float
    ):
        if roles.policy is not None and roles.reference is None:
            raise ValueError("a judge that borrows the policy's engine needs a reference")
        self._engine, self._roles, self._max_gap = engine, roles, max_gap
        asking = EngineAsking(engine, tokenizer, max_context=max_context, name="the policy", closes=False)
        self._score = config.start_with(asking)
        self._waiting: list[Group] = []

    def submit(self, groups: Sequence[Group]) -> None:
        self._waiting += groups

    def poll(self, timeout_s: float = 1.0) -> list[Group]:
        """Nothing while something is being sampled, then all at once, however long it takes."""
        if not self._waiting or not self._engine.idle:
            return []
        groups, self._waiting = self._waiting, []
        with self._borrowed(groups):
            return score_groups(self._score, groups, who="scorer-0")

    @contextmanager
    def _borrowed(self, groups: Sequence[Group]) -> Iterator[None]:
        policy, reference, version = self._roles.policy, self._roles.reference, self._engine.version
        if policy is None or reference is None:
            yield
            return
        probe = [g.prompt.token_ids + g.completions[0].token_ids for g in groups[:PROBES]]
        try:
            self._push(reference, BORROWED, probe)
            yield
            self._push(policy, version, probe)
        except BaseException:
            self._engine.spoiled = True
            raise

    def _push(self, learner: Learner, version: int, probe: Sequence[tuple[int, ...]]) -> None:
        push_weights(learner, self._engine, version=version, probe=probe, max_gap=self._max_gap)  # type: ignore[arg-type]

    def memory_gib(self) -> float:
        """Of processes that belong to it alone; the engine's are counted with the engine."""
        return self._score.memory_gib() if hasattr(self._score, "memory_gib") else 0.0

    def close(self) -> None:
        self._waiting = []
        if hasattr(self._score, "close"):
            self._score.close()

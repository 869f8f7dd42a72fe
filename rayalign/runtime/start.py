"""From places to running actors: engines, scorers and learner ranks, started side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rayalign.learners.base import LearnerSpec
from rayalign.memory import peak_gib
from rayalign.protocols import Roles
from rayalign.runtime import cluster
from rayalign.runtime.actors import start_actor
from rayalign.runtime.group import LearnerGroup
from rayalign.runtime.placement import Place, place
from rayalign.runtime.pool import EngineHost, EnginePool, ScorerPool
from rayalign.scorers.base import LocalScorer


def start_actors(
    config: Any,
    engine: Any,
    arguments: dict[str, Any],
    specs: list[LearnerSpec],
    log_dir: Path,
    say: Callable[[str], None],
    stack: ExitStack,
) -> tuple[EnginePool, ScorerPool, Roles, bool, Callable[[], float]]:
    """All actors of a run, ready; the stack ends them.

    Returns:
        engine pool, scorer pool, roles, whether engines and learners take turns on GPUs, and what asks all
        of them for their peak memory.
    """
    log_dir = log_dir.resolve()
    if cluster.connect(config.placement):
        stack.callback(cluster.disconnect)
    places = place(
        cluster.nodes(),
        engines=engine.count,
        tensor_parallel=getattr(engine, "tensor_parallel", 1),
        learners=config.learner.ranks,
        scorers=config.scorer.count,
        colocate=config.placement.colocate,
    )
    kinds = {kind: [p for p in places if p.actor.startswith(kind)] for kind in ("engine", "scorer", "learner")}
    say("starting " + ", ".join(f"{len(found)} {kind}{'s' if len(found) > 1 else ''}" for kind, found in kinds.items()))
    limits = {"start_deadline_s": config.placement.start_deadline_s, "log_dir": log_dir}
    learners = LearnerGroup(
        kinds["learner"],
        config.learner.build,
        {"specs": _with_threads(specs, kinds["learner"][0])},
        deadline_s=config.learner.deadline_s,
        **limits,
    )
    stack.callback(learners.close)
    engines = EnginePool(
        lambda i: _start_engine(kinds["engine"][i], log_dir, engine, arguments),
        [p.actor for p in kinds["engine"]],
        deadline_s=engine.deadline_s,
        max_replacements=engine.max_replacements,
        **limits,
    )
    stack.callback(engines.close)
    scorers = ScorerPool(
        lambda i: start_actor(
            kinds["scorer"][i], log_dir, LocalScorer, config=config.scorer, name=kinds["scorer"][i].actor
        ),
        [p.actor for p in kinds["scorer"]],
        deadline_s=config.scorer.deadline_s,
        max_replacements=config.scorer.max_replacements,
        **limits,
    )
    stack.callback(scorers.close)
    learners.start()
    scorers.ready()
    engines.ready()
    learners.ready()
    roles = Roles(*(learners.role(spec.role) for spec in specs))
    turns = config.placement.colocate and config.rollout.depth == 0 and kinds["engine"][0].gpus > 0

    def memory() -> float:
        return peak_gib() + engines.memory_gib() + scorers.memory_gib() + roles.policy.memory_gib()

    return engines, scorers, roles, turns, memory


def _start_engine(where: Place, log_dir: Path, engine: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    named = {**arguments, "name": where.actor}
    return start_actor(where, log_dir, EngineHost, build=engine.build, cores=where.cores, arguments=named)


def _with_threads(specs: list[LearnerSpec], where: Place) -> list[LearnerSpec]:
    """Each rank computes on its share of the node's cores, unless the config says how many."""
    from dataclasses import replace

    threads = where.cores and len(where.cores) or 1
    if specs[0].settings.threads is not None:
        return specs
    return [replace(spec, settings=spec.settings.model_copy(update={"threads": threads})) for spec in specs]

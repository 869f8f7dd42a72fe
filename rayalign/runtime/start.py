"""From places to running actors: engines, scorers and learner ranks, started side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rayalign.learners.settings import LearnerSpec, apart_ranks, by_group
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
) -> tuple[EnginePool | None, ScorerPool | None, Roles, bool, Callable[[], float]]:
    """All actors of a run, ready; the stack ends them.

    Returns:
        engine pool and scorer pool (None where nothing is sampled, or scored by actors), roles, whether engines and
        learners take turns on GPUs, and what asks all of them for their peak memory.
    """
    log_dir = log_dir.resolve()
    if cluster.connect(config.placement):
        stack.callback(cluster.disconnect)
    places = place(
        cluster.nodes(),
        engines=engine.count if config.samples else 0,
        tensor_parallel=getattr(engine, "tensor_parallel", 1),
        learners=config.learner.ranks if specs else 0,
        scorers=config.scorer_actors,
        scorer_gpus=getattr(config.scorer, "gpus", 0),
        colocate=config.placement.colocate,
        apart=apart_ranks(config.learner, specs),
    )
    kinds: dict[str, list[Place]] = {"engine": [], "scorer": [], "learner": []}
    for each in places:
        kinds.setdefault(each.actor.rpartition("-")[0], []).append(each)
    say("starting " + ", ".join(f"{len(some)} {kind}{'s'[: len(some) > 1]}" for kind, some in kinds.items() if some))
    limits = {"start_deadline_s": config.placement.start_deadline_s, "log_dir": log_dir}
    groups = _learners(config, specs, kinds, limits, stack)
    engines = _engines(kinds["engine"], engine, arguments, limits, stack) if config.samples else None
    scorers = _scorers(config, kinds["scorer"], limits, stack) if config.scorer_actors else None
    pools = [pool for pool in (engines, scorers) if pool is not None]
    for group in groups.values():
        group.start()
    for pool in pools:
        pool.ready()
    for group in groups.values():
        group.ready()
    roles = _roles(config, specs, groups)
    takes_turns = config.placement.colocate and config.rollout.depth == 0
    turns = takes_turns and any(place.gpus > 0 for place in kinds["engine"])

    def memory() -> float:
        learning = sum(group.memory_gib() for group in groups.values())
        return peak_gib() + sum(pool.memory_gib() for pool in pools) + learning

    return engines, scorers, roles, turns, memory


def _learners(
    config: Any, specs: list[LearnerSpec], places: dict[str, list[Place]], limits: dict[str, Any], stack: ExitStack
) -> dict[str, LearnerGroup]:
    """Groups of learner actors by name: "learner" with the policy and all roles beside it, and each role apart."""
    groups: dict[str, LearnerGroup] = {}
    for name, inside in by_group(config.learner, specs).items():
        groups[name] = LearnerGroup(
            places[name],
            inside[0].settings.build,
            {"specs": _with_threads(inside, places[name][0])},
            deadline_s=config.learner.deadline_s,
            **limits,
        )
        stack.callback(groups[name].close)
    return groups


def _roles(config: Any, specs: Sequence[LearnerSpec], groups: dict[str, LearnerGroup]) -> Roles:
    """Each knows the groups of the others, whose weights it may have to follow."""
    home = {spec.role: name for name, inside in by_group(config.learner, specs).items() for spec in inside}
    roles = {}
    for role, name in home.items():
        others = {other: groups[there] for other, there in home.items() if there != name}
        roles[role] = groups[name].role(role, others)
    return Roles(**{"policy": None, **roles})


def _engines(
    places: list[Place], engine: Any, arguments: dict[str, Any], limits: dict[str, Any], stack: ExitStack
) -> EnginePool:
    engines = EnginePool(
        lambda i: _start_engine(places[i], limits["log_dir"], engine, arguments),
        [p.actor for p in places],
        deadline_s=engine.deadline_s,
        max_replacements=engine.max_replacements,
        **limits,
    )
    stack.callback(engines.close)
    return engines


def _scorers(config: Any, places: list[Place], limits: dict[str, Any], stack: ExitStack) -> ScorerPool:
    scorers = ScorerPool(
        lambda i: start_actor(places[i], limits["log_dir"], LocalScorer, config=config.scorer, name=places[i].actor),
        [p.actor for p in places],
        deadline_s=config.scorer.deadline_s,
        max_replacements=config.scorer.max_replacements,
        **limits,
    )
    stack.callback(scorers.close)
    return scorers


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

"""Whether a config fits some nodes: places, memory of every role, and how full each GPU and each host gets."""

from __future__ import annotations

from collections.abc import Sequence

from rayalign.build import learner_specs
from rayalign.errors import ConfigError
from rayalign.learners.settings import apart_ranks
from rayalign.plan.batches import count_batches, micros_of_roles
from rayalign.plan.engines import engine_memory
from rayalign.plan.learners import compute_width, learner_memory, push_bytes, shares_gpus
from rayalign.plan.notes import notes_of
from rayalign.plan.records import GIB, Fit, Lengths, Load, Problem, RoleMemory
from rayalign.plan.roles import largest_bytes, planned_roles
from rayalign.plan.scorers import scorer_memory
from rayalign.plan.shapes import Shape
from rayalign.runtime.placement import Node, Place, place
from rayalign.schema import Config

DRIVER = 0.45 * GIB  # the training loop's own process, and
RAY = 0.8 * GIB  # Ray's on a node: measured, as for learners


def evaluate(config: Config, shape: Shape, lengths: Lengths, nodes: Sequence[Node]) -> Fit:
    """Everything that depends on keys that a change could touch. Pure: nothing is read or started."""
    on_gpu = any(node.gpus for node in nodes)
    batches, micro = count_batches(config, lengths)
    problems: list[Problem] = []
    try:
        places = places_for(config, nodes)
    except ConfigError as error:
        places, problems = (), [Problem.of(error)]
    gpu_gib = min((node.gpu_gib for node in nodes if node.gpus), default=0.0)
    memory: tuple[RoleMemory, ...] = ()
    cache, wrong = None, []
    if config.learns:
        micros = micros_of_roles(config, lengths, batches)
        memory = learner_memory(config, shape, micro, on_gpu=on_gpu, micros=micros)
    if config.samples:
        engine, cache, wrong = engine_memory(config, shape, gpu_gib=gpu_gib, on_gpu=on_gpu)
        memory = (engine, *memory)
    scorers, of_scorers = scorer_memory(config, gpu_gib=gpu_gib, on_gpu=on_gpu)
    memory, wrong = (*memory, *scorers), wrong + of_scorers
    if on_gpu and not gpu_gib:
        wrong = [problem for problem in wrong if "no room" not in problem.what]  # nothing to hold it against
    loads = _gpu_loads(config, places, memory) + _host_loads(config, shape, nodes, places, memory)
    problems += wrong + [_overfull(load) for load in loads if not load.fits]
    problems += _loading_problems(config, shape, nodes) if config.learns else []
    notes = notes_of(config, cache, nodes, lengths)
    return Fit(places, batches, micro, memory, cache, loads, tuple(problems), notes)


def places_for(config: Config, nodes: Sequence[Node]) -> tuple[Place, ...]:
    """Where actors go; with placement: local, all in one process on the first node. Raises ConfigError."""
    if config.placement.name == "local":
        node = nodes[0]
        cores = tuple(range(node.cpus))
        return tuple(
            Place(actor, node, float(node.cpus), float(min(node.gpus, 1 if needs else 0)), cores)
            for actor, there, needs in (
                ("engine-0", config.samples, True),
                ("learner-0", config.learns, True),
                ("scorer-0", config.scorer_actors, getattr(config.scorer, "gpus", 0)),
            )
            if there
        )
    return place(
        nodes,
        engines=config.engine.count if config.samples else 0,
        tensor_parallel=getattr(config.engine, "tensor_parallel", 1),
        learners=config.learner.ranks if config.learns else 0,
        scorers=config.scorer_actors,
        scorer_gpus=getattr(config.scorer, "gpus", 0),
        colocate=config.placement.colocate,
        apart=apart_of(config),
    )


def apart_of(config: Config) -> dict[str, int]:
    """Roles in a group of actors of their own → its ranks."""
    if not config.learns or not getattr(config.learner, "roles", {}):
        return {}
    return apart_ranks(config.learner, learner_specs(config, None, policy=None, train=True))


def _kind(actor: str) -> str:
    return actor.rpartition("-")[0]


def _kinds(memory: Sequence[RoleMemory]) -> dict[str, None]:
    """Kinds of actors, in the order of the plan; a role apart is one of its own."""
    return dict.fromkeys(("engine", "learner", *(each.actor for each in memory if each.actor != "scorer"), "scorer"))


def _gpu_loads(config: Config, places: Sequence[Place], memory: Sequence[RoleMemory]) -> tuple[Load, ...]:
    """GPUs that hold the same are one line. Engine and learner that share a GPU are added up: what a learner's
    allocator has reserved in an update it keeps while the engine is awake."""
    needs = {kind: sum(r.device.total for r in memory if r.actor == kind) / GIB for kind in _kinds(memory)}
    shared = shares_gpus(config)
    found: dict[tuple[tuple[str, ...], float], list[str]] = {}
    on_gpu = [each for each in places if each.gpus > 0]
    if shared:
        for node in dict.fromkeys(each.node for each in on_gpu):
            kinds = tuple(_kind(each.actor) for each in on_gpu if each.node == node)
            found.setdefault((kinds, node.gpu_gib), []).append(node.name)
    else:
        for each in on_gpu:
            found.setdefault(((_kind(each.actor),), each.node.gpu_gib), []).append(each.actor)
    return tuple(
        Load(f"each GPU of {_range(names)}", kinds, sum(needs[kind] for kind in kinds), gib, of_gpu=True)
        for (kinds, gib), names in found.items()
    )


def _host_loads(
    config: Config, shape: Shape, nodes: Sequence[Node], places: Sequence[Place], memory: Sequence[RoleMemory]
) -> tuple[Load, ...]:
    """Memory of each node: its actors, the driver on the first, and pushed weights where they leave and arrive."""
    needs = {kind: sum(r.host.total for r in memory if r.actor == kind) / GIB for kind in _kinds(memory)}
    local = config.placement.name == "local"
    whole = push_bytes(config, shape) / 2 / GIB
    push = 2 * whole if config.samples and config.learns else 0.0
    found: dict[tuple[tuple[str, ...], float, float], list[str]] = {}
    actors: dict[str, list[str]] = {}
    for each in places:
        actors.setdefault(each.node.id, []).append(each.actor)
    for number, node in enumerate(nodes):
        kinds = [_kind(actor) for actor in actors.get(node.id, ())]
        first = "learner-0" in actors.get(node.id, ())
        needed = sum(needs[kind] for kind in kinds)
        holds = [f"{kinds.count(kind)} {kind}{'s' if kinds.count(kind) > 1 else ''}" for kind in needs if kind in kinds]
        if local:  # one process: libraries once, one push at a time
            needed, holds = needed - 0.5 * DRIVER / GIB + push / 2, [*holds, *(["a push"] if push else [])]
        else:
            needed += RAY / GIB + (DRIVER / GIB if not number else 0.0)
            holds += ["Ray", *(["driver"] if not number else [])]
            if push and (first or "engine" in kinds):
                needed, holds = needed + push, [*holds, "two pushes"]
        if first:  # an export puts the whole policy together there
            needed += whole
        found.setdefault((tuple(holds), round(needed, 6), node.memory_gib), []).append(node.name)
    return tuple(
        Load(f"memory of {_range(names)}", holds, needed, has) for (holds, needed, has), names in found.items()
    )


def _range(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _overfull(load: Load) -> Problem:
    return Problem(
        "this would not fit",
        load.where,
        f"{load.needed:.1f} GiB for {', '.join(load.holds)}",
        f"at most {load.has:.1f} GiB",
    )


def cannot_load(config: Config, shape: Shape, nodes: Sequence[Node]) -> bool:
    """Whether one whole model in the learner's dtype is more than a GPU has: no number of ranks changes that."""
    return bool(config.learns and _loading_problems(config, shape, nodes))


def _loading_problems(config: Config, shape: Shape, nodes: Sequence[Node]) -> list[Problem]:
    gpu_gib = min((node.gpu_gib for node in nodes if node.gpus), default=0.0)
    whole = largest_bytes(config, planned_roles(config, shape)) / GIB
    if not gpu_gib or whole <= gpu_gib:
        return []
    policys = whole == compute_width(config)[0] * shape.parameters / GIB
    return [
        Problem(
            "a learner rank cannot load this model",
            "key model.path" if policys else "key algorithm.critic.model",
            f"{whole:.1f} GiB of weights, whole on each GPU before ZeRO-3 shares them out",
            f"at most {gpu_gib:.1f} GiB",
            f"GPUs with more than {whole:.0f} GiB: no number of ranks makes this smaller",
        )
    ]

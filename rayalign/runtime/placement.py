"""Which actor goes where: a pure function from a config and a cluster's nodes to places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Literal

from pydantic import Field

from rayalign.errors import ConfigError
from rayalign.record import Record

PLACEMENTS = {
    "local": "rayalign.runtime.placement:LocalPlacement",
    "ray": "rayalign.runtime.placement:RayPlacement",
}


class LocalPlacement(Record):
    """Everything in this process: for unit work and debugging."""

    name: Literal["local"] = "local"


class RayPlacement(Record):
    """Ray actors: engines, scorers and learner ranks, on one machine or many."""

    name: Literal["ray"] = "ray"
    address: str | None = Field(None, description="of a running cluster, or auto; default: one of this machine's own")
    colocate: bool = Field(
        False, description="one engine and one learner rank take turns on a node's only GPU; off: each has its own GPUs"
    )
    object_store_gib: float | None = Field(None, gt=0, description="of this machine's own cluster; default: Ray's")
    start_deadline_s: float = Field(600.0, gt=0, description="longest time for an actor to start")


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        id: Ray's.
        memory_gib: of the host; 0 is not known.
        gpu, gpu_gib: the type of its GPUs, and the memory of one; 0 is not known.
    """

    id: str
    cpus: int
    gpus: int
    name: str = ""
    memory_gib: float = 0.0
    gpu: str = ""
    gpu_gib: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where one actor lives and what it may use.

    Attributes:
        actor: its name, "engine-0", "learner-1" or "scorer-0"; of a role that lives apart, "critic-0".
        cpus, gpus: what Ray reserves; fractions where actors take turns.
        cores: the CPU cores that it computes on.
    """

    actor: str
    node: Node
    cpus: float
    gpus: float
    cores: tuple[int, ...]


def place(
    nodes: Sequence[Node],
    *,
    engines: int,
    tensor_parallel: int,
    learners: int,
    scorers: int,
    colocate: bool,
    scorer_gpus: int = 0,
    apart: Mapping[str, int] | None = None,
) -> tuple[Place, ...]:
    """Places for all actors, the largest needs first, each kind spread over the nodes.

    On GPUs an engine takes `tensor_parallel` of one node and a learner rank takes one; with `colocate` they
    share. On CPU nodes every engine needs that many cores of its own, and so does every learner rank:
    engines and learners take turns on the same cores. A scorer takes `scorer_gpus` of one node where there are
    GPUs, or a part of the shared one; none of them: it computes on its node's cores. There it has a share of
    half of them, as it scores while engines sample; of all where neither engine nor learner is.

    Args:
        apart: roles that live in a group of learner actors of their own → its ranks. They take slots as the policy's
            ranks do, on nodes without other learners where there are such.

    Raises:
        ConfigError: the cluster cannot hold them.
    """
    on_gpu = any(node.gpus for node in nodes)
    if colocate and on_gpu and (tensor_parallel > 1 or any(node.gpus > 1 for node in nodes)):
        raise ConfigError(
            "engines and learners cannot share these GPUs",
            where="key placement.colocate",
            value=f"engine.tensor_parallel={tensor_parallel}, up to {max(n.gpus for n in nodes)} GPUs a node",
            rule="one GPU a node and tensor_parallel=1: Ray places shares of a GPU without saying of which",
            remedy="set placement.colocate=false, so that each has GPUs of its own",
        )
    _check_scorers(nodes, scorers)
    hosts = [node for node in nodes if node.gpus] if on_gpu else list(nodes)
    slots = {node.id: node.gpus if on_gpu else node.cpus for node in hosts}
    unit = "GPUs" if on_gpu else "CPU cores"
    engine_slots = _spread("engine.count", engines, tensor_parallel, hosts, dict(slots), unit)
    shared = colocate or not on_gpu
    taken = Counter({node.id: 0 if shared else tensor_parallel * engine_slots.count(node) for node in hosts})
    groups = {"learner": learners, **(apart or {})}
    learner_slots = _learner_slots(groups, hosts, slots, taken, unit, shared=shared)
    kinds = {"engine": (engine_slots, tensor_parallel), **{name: (some, 1) for name, some in learner_slots.items()}}
    turns = Counter(node.id for some in learner_slots.values() for node in set(some))  # groups of learners there
    places = []
    for kind, (chosen, width) in kinds.items():
        on_nodes, before = Counter(node.id for node in chosen), Counter[str]()
        for index, node in enumerate(chosen):
            on_node, sharing = on_nodes[node.id], 1 if kind == "engine" else turns[node.id]
            cores = _cores(node, before[node.id], on_node)
            before[node.id] += 1
            # Two kinds take turns, and the scorers fit beside them.
            gpus = 0.0 if not on_gpu else width * (0.45 / sharing if shared else 1.0)
            cpus = 0.45 * node.cpus / on_node / sharing
            places.append(Place(f"{kind}-{index}", node, round(cpus, 3), gpus, cores))
    if on_gpu and scorer_gpus:
        left = slots if colocate else {node.id: slots[node.id] - taken[node.id] for node in hosts}
        chosen = _spread("scorer.count", scorers, scorer_gpus, hosts, left, unit)
    else:
        chosen, scorer_gpus = [nodes[index % len(nodes)] for index in range(scorers)], 0
    on_nodes, before, busy = Counter(node.id for node in chosen), Counter[str](), {each.node.id for each in places}
    for index, node in enumerate(chosen):
        first = node.cpus // 2 if node.id in busy else 0
        cores = _cores(node, before[node.id], on_nodes[node.id], first)
        before[node.id] += 1
        cpus, gpus = 0.09 * node.cpus / on_nodes[node.id], scorer_gpus * (0.09 if colocate else 1.0)
        places.append(Place(f"scorer-{index}", node, round(cpus, 3), gpus, cores))
    return tuple(places)


def _learner_slots(
    groups: Mapping[str, int], hosts: Sequence[Node], slots: dict[str, int], taken: Counter, unit: str, *, shared: bool
) -> dict[str, list[Node]]:
    """Where the ranks of each group go: none shares a GPU, unless engines and learners do; then, and on CPUs, groups
    take turns where there are too few nodes for each to have its own. `taken` gets what is not shared."""
    found, before = {}, Counter[str]()
    for name, ranks in groups.items():
        key = "learner.ranks" if name == "learner" else f"learner.roles.{name}.ranks"
        left = {node.id: slots[node.id] - taken[node.id] for node in hosts}
        alone = {name: max(0, count - before[name]) for name, count in left.items()}
        found[name] = _spread(key, ranks, 1, hosts, alone if shared and sum(alone.values()) >= ranks else left, unit)
        for node in found[name]:
            before[node.id] += 1
            taken[node.id] += not shared
    return found


def _check_scorers(nodes: Sequence[Node], scorers: int) -> None:
    """They share a little of each node's cores; below a thousandth of a core that would be nothing."""
    most = len(nodes) * min((90 * max(node.cpus, 1) for node in nodes), default=0)
    if scorers > most:
        raise ConfigError(
            "the cluster cannot hold so many",
            where="key scorer.count",
            value=scorers,
            rule=f"at most {most} here, so that each has a thousandth of a core",
            remedy=f"lower scorer.count to {most}; one for a node is usual" if most else "use a cluster with nodes",
        )


def _spread(key: str, count: int, width: int, hosts: Sequence[Node], free: dict[str, int], unit: str) -> list[Node]:
    """`count` hosts with `width` slots each, always from the node with the most free ones."""
    total, chosen = sum(free.values()), []
    most_free = [(-free[host.id], index) for index, host in enumerate(hosts)]
    heapify(most_free)
    for _ in range(count):
        if not most_free or -most_free[0][0] < width:
            raise ConfigError(
                "the cluster cannot hold so many",
                where=f"key {key}",
                value=f"{count} × {width} {unit}",
                rule=f"{total} {unit} are there for them, {width} of one node for each",
                remedy=f"lower {key} to {len(chosen)}" if chosen else "use a cluster with more of them",
            )
        taken, index = most_free[0]
        heapreplace(most_free, (taken + width, index))
        chosen.append(hosts[index])
    return chosen


def _cores(node: Node, index: int, count: int, begin: int = 0) -> tuple[int, ...]:
    """The index-th of `count` equal slices of a node's cores from `begin` on; at least one core."""
    width = node.cpus - begin
    first, last = begin + index * width // count, begin + (index + 1) * width // count
    return tuple(range(first, max(last, first + 1)))

"""The nearest change under which a plan fits: one key, else two, else more nodes. Each candidate is evaluated by
the functions that make the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

from rayalign.build import check_training
from rayalign.config import parse_config
from rayalign.errors import ConfigError
from rayalign.plan.engines import split_choices
from rayalign.plan.fit import cannot_load, evaluate
from rayalign.plan.learners import shares_gpus
from rayalign.plan.records import Change, Lengths
from rayalign.plan.shapes import Shape
from rayalign.runtime.placement import Node
from rayalign.schema import Config

MOST_NODES = 64
Setting = tuple[str, Any]


def nearest_change(config: Config, shape: Shape, lengths: Lengths, nodes: Sequence[Node]) -> Change | None:
    """None when nothing that is tried here helps."""
    if cannot_load(config, shape, nodes):
        return None
    single = list(candidates(config, shape, nodes))
    for settings in [*((each,) for each in single), *_pairs(single)]:
        if _works(config, shape, lengths, nodes, settings):
            return Change(settings)
    return _more_nodes(config, shape, lengths, nodes, single)


def candidates(config: Config, shape: Shape, nodes: Sequence[Node]) -> Iterator[Setting]:
    """Single keys, in the order in which they would be missed least."""
    learner, engine = config.learner, config.engine
    if not learner.gradient_checkpointing:
        yield "learner.gradient_checkpointing", True
    yield from (("learner.zero_stage", stage) for stage in range(getattr(learner, "zero_stage", 3) + 1, 4))
    if getattr(learner, "offload", "cpu") == "none":
        yield "learner.offload", "cpu"
    yield from (("learner.micro_batch_tokens", n) for n in _halves(learner.micro_batch_tokens, 256))
    yield from (("learner.logprob_chunk", n) for n in _halves(learner.logprob_chunk, 128))
    if hasattr(engine, "tensor_parallel"):
        most = max((node.gpus or node.cpus for node in nodes), default=1)
        yield from (("engine.tensor_parallel", n) for n in split_choices(shape, most) if n != engine.tensor_parallel)
    if hasattr(engine, "gpu_memory") and any(node.gpus for node in nodes):
        shares = (0.9, 0.95, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
        yield from (("engine.gpu_memory", share) for share in shares if share != engine.gpu_memory)
    if hasattr(engine, "kv_cache_gib") and not any(node.gpus for node in nodes):
        sizes = [engine.kv_cache_gib * factor for factor in (2.0, 4.0, 8.0, 0.5, 0.25)]
        yield from (("engine.kv_cache_gib", size) for size in sizes)
    yield from (("engine.max_running", n) for n in _halves(engine.max_running, 1))
    if config.placement.name == "ray":
        yield from (("engine.count", n) for n in _halves(engine.count, 1))
        yield from (("learner.ranks", n) for n in _ranks(config, nodes))
        if config.placement.colocate and any(node.gpus for node in nodes):
            yield "placement.colocate", False


def _ranks(config: Config, nodes: Sequence[Node]) -> list[int]:
    """Fewer, nearest first; then more, where the learner can have more than one."""
    now = config.learner.ranks
    if not hasattr(config.learner, "zero_stage"):
        return []
    slots = sum(node.gpus for node in nodes) or sum(node.cpus for node in nodes)
    more = range(now + 1, min(slots, config.rollout.prompts) + 1)
    return [*range(now - 1, 0, -1), *more]


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _pairs(single: Sequence[Setting]) -> Iterator[tuple[Setting, Setting]]:
    """Pairs of different keys, the least missed first."""
    found = [(a, b) for a, b in combinations(range(len(single)), 2) if single[a][0] != single[b][0]]
    yield from ((single[a], single[b]) for a, b in sorted(found, key=sum))


def _works(
    config: Config, shape: Shape, lengths: Lengths, nodes: Sequence[Node], settings: tuple[Setting, ...]
) -> bool:
    try:
        changed = apply(config, settings)
        if not evaluate(changed, shape, lengths, nodes).fits:
            return False
        check_training(changed)
    except ConfigError:
        return False
    return True


def apply(config: Config, settings: Sequence[Setting]) -> Config:
    """The config with these keys changed, checked. Raises ConfigError."""
    data = config.to_dict()
    for key, value in settings:
        *sections, last = key.split(".")
        section = data
        for name in sections:
            section = section[name]
        section[last] = value
    return parse_config(data)


def _more_nodes(
    config: Config, shape: Shape, lengths: Lengths, nodes: Sequence[Node], single: Sequence[Setting]
) -> Change | None:
    """The smallest number of nodes like the last one with a GPU (or the last one), the present ones first: with
    as many ranks as there is room for, and with the settings that save most when that is not enough."""
    if config.placement.name == "local":
        return None
    like = next((node for node in reversed(nodes) if node.gpus), nodes[-1])
    for count in range(len(nodes), MOST_NODES + 1):
        more = (*nodes, *(replace(like, id=f"more-{n}", name=f"more-{n}") for n in range(len(nodes), count)))
        slots = sum(node.gpus for node in more) or sum(node.cpus for node in more)
        for saving, ranks in product(_savings(config, single), _useful_ranks(config, slots)):
            settings = (*saving, *((("learner.ranks", ranks),) if ranks != config.learner.ranks else ()))
            if _works(config, shape, lengths, more, settings):
                return Change(settings, more if count > len(nodes) else ())
    return None


def _savings(config: Config, single: Sequence[Setting]) -> list[tuple[Setting, ...]]:
    """Settings that save most, from none to all; the share of an engine too, where a learner is on its GPU."""
    most = {("learner.gradient_checkpointing", True), ("learner.zero_stage", 3)}
    some = tuple(each for each in single if each in most)
    offload = tuple(each for each in single if each[0] == "learner.offload")
    found = [(), some, (*some, *offload)]
    if not shares_gpus(config):
        return found
    shares = [((key, value),) for key, value in single if key == "engine.gpu_memory"]
    return [(*saving, *share) for share in [(), *shares] for saving in found]


def _useful_ranks(config: Config, slots: int) -> list[int]:
    """As configured, and as many as the engines leave room for."""
    now = config.learner.ranks
    if not hasattr(config.learner, "zero_stage"):
        return [now]
    engines = 0 if shares_gpus(config) else config.engine.count * getattr(config.engine, "tensor_parallel", 1)
    return sorted({now, max(now, min(slots - engines, config.rollout.prompts))})

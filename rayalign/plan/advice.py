"""The nearest change under which a plan fits: one key, else two, else several or more nodes. Each candidate is
evaluated by the functions that make the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations

from rayalign.checks import check_training
from rayalign.config import parse_config
from rayalign.errors import ConfigError
from rayalign.plan.engines import split_choices
from rayalign.plan.fit import cannot_load, evaluate
from rayalign.plan.learners import has_reference
from rayalign.plan.records import Change, Fit, Lengths
from rayalign.plan.several import Setting, TryOut, several, thin_ranks
from rayalign.plan.shapes import Shape
from rayalign.runtime.placement import Node
from rayalign.schema import Config

NEAR = 16  # numbers of ranks on either side that are tried one by one


def nearest_change(config: Config, shape: Shape, lengths: Lengths, nodes: Sequence[Node]) -> Change | None:
    """None when nothing that is tried here helps. Where the memory of hosts is not known, nothing is offloaded into
    it unless all else fails."""
    if cannot_load(config, shape, nodes):
        return None
    single = list(candidates(config, shape, nodes))
    try_out = partial(_try_out, config, shape, lengths)
    found = None
    if not all(node.memory_gib for node in nodes):
        found = _nearest(config, nodes, [each for each in single if each[0] != "learner.offload"], try_out)
    found = found or _nearest(config, nodes, single, try_out)
    fit = found and try_out(found.settings, found.nodes or nodes)
    return replace(found, loads=fit.loads) if found and fit else None


def _nearest(config: Config, nodes: Sequence[Node], single: Sequence[Setting], try_out: TryOut) -> Change | None:
    few = thin_ranks(config, nodes)
    paired = [each for each in single if each[0] != "learner.ranks" or each[1] in few]
    for settings in [*((each,) for each in single), *_pairs(paired)]:
        if (fit := try_out(settings, nodes)) and fit.fits:
            return Change(settings)
    return several(config, nodes, single, try_out)


def candidates(config: Config, shape: Shape, nodes: Sequence[Node]) -> Iterator[Setting]:
    """Single keys, in the order in which they would be missed least."""
    learner = config.learner
    if not config.samples and has_reference(config):  # refused where it does not fit the algorithm
        yield "algorithm.reference.cached", True
    if not learner.gradient_checkpointing:
        yield "learner.gradient_checkpointing", True
    yield from (("learner.zero_stage", stage) for stage in range(getattr(learner, "zero_stage", 3) + 1, 4))
    if getattr(learner, "offload", "cpu") == "none":
        yield "learner.offload", "cpu"
    yield from (("learner.micro_batch_tokens", n) for n in _halves(learner.micro_batch_tokens, 256))
    yield from (("learner.logprob_chunk", n) for n in _halves(learner.logprob_chunk, 128))
    if config.samples:
        yield from _of_engine(config, shape, nodes)
    if config.placement.name == "ray":
        if config.samples:
            yield from (("engine.count", n) for n in _halves(config.engine.count, 1))
        yield from (("learner.ranks", n) for n in _ranks(config, nodes))
        if config.samples and config.placement.colocate and any(node.gpus for node in nodes):
            yield "placement.colocate", False
    if not config.algorithm.request(config.sampling.sampling()):  # cuts the data
        yield from (("data.max_tokens", n) for n in _halves(config.data.max_tokens, 256))


def _of_engine(config: Config, shape: Shape, nodes: Sequence[Node]) -> Iterator[Setting]:
    engine = config.engine
    if hasattr(engine, "tensor_parallel"):
        most = max((node.gpus or node.cpus for node in nodes), default=1)
        now = engine.tensor_parallel
        near = sorted(split_choices(shape, most), key=lambda n: abs(n - now))
        yield from (("engine.tensor_parallel", n) for n in near if n != now)
    if hasattr(engine, "gpu_memory") and any(node.gpus for node in nodes):
        shares = (0.9, 0.95, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
        yield from (("engine.gpu_memory", share) for share in shares if share != engine.gpu_memory)
    if hasattr(engine, "kv_cache_gib") and not any(node.gpus for node in nodes):
        sizes = [engine.kv_cache_gib * factor for factor in (2.0, 4.0, 8.0, 0.5, 0.25)]
        yield from (("engine.kv_cache_gib", size) for size in sizes)
    yield from (("engine.max_running", n) for n in _halves(engine.max_running, 1))


def _ranks(config: Config, nodes: Sequence[Node]) -> list[int]:
    """Fewer, nearest first; then more, where the learner can have more than one. Far off, only some."""
    now = config.learner.ranks
    if not hasattr(config.learner, "zero_stage"):
        return []
    slots = sum(node.gpus for node in nodes) or sum(node.cpus for node in nodes)
    fewer, more = range(now - 1, 0, -1), range(now + 1, min(slots, config.rollout.prompts) + 1)
    far = [n for n in thin_ranks(config, nodes) if abs(n - now) > NEAR]
    return [*fewer[:NEAR], *more[:NEAR], *far]


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _pairs(single: Sequence[Setting]) -> Iterator[tuple[Setting, Setting]]:
    """Pairs of different keys, the least missed first."""
    found = [(a, b) for a, b in combinations(range(len(single)), 2) if single[a][0] != single[b][0]]
    yield from ((single[a], single[b]) for a, b in sorted(found, key=sum))


def _try_out(
    config: Config, shape: Shape, lengths: Lengths, settings: Sequence[Setting], nodes: Sequence[Node]
) -> Fit | None:
    """None where these settings are no config that could run."""
    try:
        changed = apply(config, settings)
        fit = evaluate(changed, shape, lengths, nodes)
        if fit.fits:
            check_training(changed)
    except ConfigError:
        return None
    return fit


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

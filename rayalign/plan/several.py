"""Several keys at once, and more nodes: what fits on the fewest nodes of the kind that is there.

Some keys only ever save memory: all of them are set to their least, which says whether a number of nodes can be
enough, and then given back one after the other, the most missed first. The others trade one thing for another, and
each choice of them is tried, the nearest first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from rayalign.plan.fit import apart_of
from rayalign.plan.learners import shares_gpus
from rayalign.plan.records import Change, Fit
from rayalign.runtime.placement import Node
from rayalign.schema import Config

MOST_NODES = 64
THRIFT = (  # the most missed first
    "engine.max_running",
    "learner.logprob_chunk",
    "learner.micro_batch_tokens",
    "learner.gradient_checkpointing",
    "algorithm.reference.cached",
)
Setting = tuple[str, Any]
TryOut = Callable[[Sequence[Setting], Sequence[Node]], Fit | None]


def several(config: Config, nodes: Sequence[Node], single: Sequence[Setting], try_out: TryOut) -> Change | None:
    """The settings that fit on the fewest nodes, the present ones first; engine.count stays. None: nothing does.

    Args:
        single: the values that each key may have instead, the least missed first.
        try_out: what settings come to on some nodes.
    """
    options: dict[str, list[Any]] = {}
    for key, value in single:
        options.setdefault(key, []).append(value)
    most = len(nodes) if config.placement.name == "local" else max(MOST_NODES, len(nodes))
    like = next((node for node in reversed(nodes) if node.gpus), nodes[-1])
    more = (*nodes, *(replace(like, id=f"more-{n}", name=f"more-{n}") for n in range(len(nodes), most)))
    found: dict[int, tuple[Setting, ...]] = {}

    def enough(count: int) -> bool:
        settings = _first(config, more[:count], options, try_out)
        if settings is not None:
            found[count] = settings
        return settings is not None

    if not enough(most):
        return None
    counts = range(len(nodes), most + 1)
    count = counts[bisect_left(counts, True, hi=len(counts) - 1, key=enough)]
    settings = _given_back(found[count], more[:count], options, try_out)
    return Change(settings, more[:count] if count > len(nodes) else ())


def _first(
    config: Config, nodes: Sequence[Node], options: dict[str, list[Any]], try_out: TryOut
) -> tuple[Setting, ...] | None:
    """The nearest settings that fit, with all savings."""
    savings = [(key, options[key][-1]) for key in reversed(THRIFT) if key in options]
    for trades in _trades(config, options):
        for ranks in reversed(thin_ranks(config, nodes, dict(trades))):  # the most first
            settings = (*savings, *trades, *((("learner.ranks", ranks),) if ranks != config.learner.ranks else ()))
            fit = try_out(settings, nodes)
            if fit and fit.fits:
                return settings
            if fit and any(load.of_gpu and not load.fits for load in fit.loads):
                break  # fewer ranks would hold more each
    return None


def _trades(config: Config, options: dict[str, list[Any]]) -> Iterator[tuple[Setting, ...]]:
    """Choices of the keys that help in one place and cost in another, the fewest and nearest changes first."""
    shares = options.get("engine.gpu_memory", [])
    tried = {
        "learner.offload": options.get("learner.offload", []),
        "learner.zero_stage": options.get("learner.zero_stage", [])[-1:],
        "engine.tensor_parallel": options.get("engine.tensor_parallel", []),
        "engine.gpu_memory": shares if shares_gpus(config) else [share for share in shares if share > 0.9],
        "engine.kv_cache_gib": options.get("engine.kv_cache_gib", []),
    }
    each = [[(), *((key, value) for value in values)] for key, values in tried.items()]
    places = sorted(product(*(range(len(choices)) for choices in each)), key=sum)
    for place in places:
        yield tuple(choices[at] for choices, at in zip(each, place, strict=True) if at)


def thin_ranks(config: Config, nodes: Sequence[Node], settings: dict[str, Any] | None = None) -> list[int]:
    """As configured, as many as engines leave room for, and that halved and halved again, in rising order."""
    now = config.learner.ranks
    if not hasattr(config.learner, "zero_stage") or config.placement.name == "local":
        return [now]
    gpus = sum(node.gpus for node in nodes)
    parallel = (settings or {}).get("engine.tensor_parallel", getattr(config.engine, "tensor_parallel", 1))
    taken = 0
    if gpus and config.samples and not shares_gpus(config):
        taken = config.engine.count * parallel + config.scorer_actors * getattr(config.scorer, "gpus", 0)
    if gpus and not shares_gpus(config):
        taken += sum(apart_of(config).values())
    room = min((gpus or sum(node.cpus for node in nodes)) - taken, config.rollout.prompts)
    return sorted({now, *(room >> n for n in range(max(room, 0).bit_length()))})


def _given_back(
    settings: tuple[Setting, ...], nodes: Sequence[Node], options: dict[str, list[Any]], try_out: TryOut
) -> tuple[Setting, ...]:
    """Without what is not needed: each key as it was where that fits, and a saving no larger than it has to be."""

    def fits(chosen: dict[str, Any]) -> bool:
        fit = try_out(tuple(chosen.items()), nodes)
        return fit is not None and fit.fits

    chosen = dict(settings)
    for key in sorted(chosen, key=lambda key: THRIFT.index(key) if key in THRIFT else len(THRIFT)):
        rest = {name: value for name, value in chosen.items() if name != key}
        smaller = [rest | {key: value} for value in options[key][:-1]] if key in THRIFT else []
        chosen = next((each for each in (rest, *smaller) if fits(each)), chosen)
    return tuple(chosen.items())

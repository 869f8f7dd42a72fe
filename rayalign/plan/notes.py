"""What fits, and is worth knowing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rayalign.build import has_cached_reference
from rayalign.plan.learners import shares_gpus
from rayalign.plan.opponents import notes_of_opponents
from rayalign.plan.records import EngineCache, Lengths
from rayalign.plan.roles import critic_is_there
from rayalign.plan.scorers import notes_of_scorers
from rayalign.runtime.placement import Node
from rayalign.schema import Config


def notes_of(config: Config, cache: EngineCache | None, nodes: Sequence[Node], lengths: Lengths) -> tuple[str, ...]:
    """A sentence each.

    Args:
        cache: of an engine; None where nothing is sampled.
    """
    return (
        *_of_engine(config, cache, nodes),
        *_of_roles(config),
        *_of_search(config),
        *notes_of_scorers(config),
        *_of_nodes(nodes),
        *_of_data(config, lengths),
        *notes_of_opponents(config, lengths.rows),
    )


def _of_engine(config: Config, cache: EngineCache | None, nodes: Sequence[Node]) -> Iterator[str]:
    wanted = config.engine.max_running
    if cache is not None and config.engine.name == "vllm" and 0 < cache.requests < wanted:
        yield (
            f"an engine has keys and values for {cache.requests} requests of full length; "
            f"of engine.max_running={wanted}, longer ones take turns"
        )
    if shares_gpus(config) and any(node.gpus for node in nodes):
        yield "engine and learner are added up: a learner keeps what it reserved while the engine is awake"


def _of_roles(config: Config) -> Iterator[str]:
    """Which memory is counted once."""
    if not config.learns or getattr(config.algorithm, "critic_algorithm", None) is None:
        return
    if not critic_is_there(config):
        yield f"algorithm.critic.model={config.algorithm.critic.model} is not on this machine: planned as the policy's"
    if not config.learner.is_apart("critic"):
        yield "policy and critic are trained one after the other: activations stand with the one that needs more"


def _of_search(config: Config) -> Iterator[str]:
    """What a search costs an engine."""
    search = config.sampling.sampling().search
    if search is None or not config.algorithm.request(config.sampling.sampling()):
        return
    size = search.beams // search.groups
    groups = f"{search.beams} candidates of a prompt are searched by {search.groups} groups of {size}"
    if config.engine.name != "vllm":
        yield f"{groups}, one prompt after the other: this engine is for tests"
    elif size == 1:
        yield f"{groups}: one pass of the engine, as {search.beams} requests"
    else:
        yield f"{groups}: new requests where beams part, two to four times slower than groups={search.beams}"
    if config.engine.name == "vllm" and search.beams > config.engine.max_running:
        yield f"of a search's {search.beams} requests engine.max_running={config.engine.max_running} run at a time"
    if config.learns:
        yield "evaluations sample ordinarily, at temperature 1"


def _of_nodes(nodes: Sequence[Node]) -> Iterator[str]:
    if unknown := [node for node in nodes if node.gpus and not node.gpu_gib]:
        names = ", ".join(sorted({node.gpu or "GPU" for node in unknown}))
        example = f"nodes={len(unknown)}x{unknown[0].gpus}x80GiB"
        yield f"the memory of these GPUs ({names}) is not known and not checked: say it, as in {example}"
    if not all(node.memory_gib for node in nodes):
        yield "host memory is not known and not checked: add it to the nodes, as 2x8xH100/1800GiB"


def _of_data(config: Config, lengths: Lengths) -> Iterator[str]:
    if config.samples and not lengths.measured:
        yield f"prompt lengths are {lengths.source}"
    rows = lengths.rows
    if rows is not None and not rows.problem:
        yield f"rows: {rows.source}" if rows.measured else f"lengths of rows are {rows.source}"
    if has_cached_reference(config):
        yield "log-probs of the reference are computed once, before the first step, and kept on disk for the next run"

"""What fits, and is worth knowing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rayalign.build import has_cached_reference
from rayalign.plan.learners import shares_gpus
from rayalign.plan.records import EngineCache, Lengths
from rayalign.runtime.placement import Node
from rayalign.schema import Config
from rayalign.scorers.judging import JudgeRules


def notes_of(config: Config, cache: EngineCache | None, nodes: Sequence[Node], lengths: Lengths) -> tuple[str, ...]:
    """A sentence each.

    Args:
        cache: of an engine; None where nothing is sampled.
    """
    return (
        *_of_engine(config, cache, nodes),
        *_of_judge(config),
        *_of_nodes(nodes),
        *_of_data(config, lengths),
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


def _of_judge(config: Config) -> Iterator[str]:
    """How much a judge is asked, and what of it is not planned."""
    if not (config.scored and isinstance(config.scorer, JudgeRules)):
        return
    judge, answers = config.scorer, len(config.algorithm.request(config.sampling.sampling()))
    if answers > 1 or (answers and judge.mode == "direct"):
        asked = config.rollout.prompts * judge.questions(answers)
        thinking = f", each after up to {judge.reasoning} tokens of thinking" if judge.reasoning else ""
        yield f"the judge answers up to {asked:,} questions for one rollout{thinking}"
    if config.lends_engine:
        yield "judging loads the reference into the engines and pushes the policy back: two more pushes a rollout"
    elif config.scorer.gpus == 0:
        yield "what the judge's server needs, and how fast it answers, is not planned"


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

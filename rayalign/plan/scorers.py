"""Memory of a scorer: of its process, of a judge that has an engine of its own, and of reward and preference models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rayalign.errors import ConfigError
from rayalign.plan.engines import BASE_TRANSFORMERS, WIDTH, engine_memory, layer_tensors
from rayalign.plan.learners import GPU_CONTEXT
from rayalign.plan.records import GIB, Bytes, Problem, RoleMemory
from rayalign.plan.shapes import Shape, read_shape
from rayalign.runtime.placement import LocalPlacement
from rayalign.schema import Config
from rayalign.scorers.judging import JudgeRules
from rayalign.scorers.mix import parts_of
from rayalign.scorers.network import NetworkScorer

PROCESS = 0.3 * GIB  # measured, as for learners


def scorer_memory(config: Config, *, gpu_gib: float, on_gpu: bool) -> tuple[tuple[RoleMemory, ...], list[Problem]]:
    """The scorer's process and the models in it, none where the policy's engine is asked; and what is wrong with
    them. What is not at hand is not counted, see `notes_of_scorers`."""
    count = config.scorer_actors
    if not count:
        return (), []
    memory, problems = [RoleMemory("scorer", "scorer", count, Bytes(), Bytes(other=PROCESS))], []
    for key, scorer in parts_of(config.scorer):
        if isinstance(scorer, NetworkScorer):
            shape = _network(scorer)
            memory += [_scoring(scorer, shape, count, on_gpu=on_gpu)] if shape else []
        elif getattr(getattr(scorer, "ask", None), "name", None) == "engine":
            judge, wrong = _judge(config, scorer.ask, f"{key}.ask", gpu_gib=gpu_gib, on_gpu=on_gpu)
            memory += [replace(judge, count=count)] if judge else []
            problems += wrong
    return tuple(memory), problems


def _judge(
    config: Config, ask: Any, key: str, *, gpu_gib: float, on_gpu: bool
) -> tuple[RoleMemory | None, list[Problem]]:
    try:
        shape = read_shape(ask.model, trust_remote_code=ask.trust_remote_code)
    except ConfigError as error:
        return None, [replace(Problem.of(error), where=f"key {key}.model")]
    dtype = {"dtype": shape.dtype if shape.dtype in ("float32", "bfloat16") else "bfloat16"}
    alone = {  # a config in which the judge's engine is the engine; it never sleeps
        "engine": ask.engine,
        "model": config.model.model_copy(update=dtype),
        "placement": LocalPlacement(),
    }
    engine, _, problems = engine_memory(config.model_copy(update=alone), shape, gpu_gib=gpu_gib, on_gpu=on_gpu)
    return replace(engine, role="judge", actor="scorer"), [_of_judge(problem, key) for problem in problems]


def _of_judge(problem: Problem, key: str) -> Problem:
    return replace(
        problem,
        where=problem.where.replace("key engine.", f"key {key}.engine."),
        rule=problem.rule.replace("engine.", f"{key}.engine."),
    )


def _network(scorer: NetworkScorer) -> Shape | None:
    """None where its config.json is not at hand: it may yet be trained, or be on a hub."""
    labels = 1 if scorer.fits(1) else 0
    return _looked_for(scorer.model, labels, scorer.trust_remote_code, Path(scorer.model).expanduser().is_dir())


@lru_cache(maxsize=8)  # a plan asks for each change that it tries
def _looked_for(model: str, labels: int, trust_remote_code: bool, is_there: bool) -> Shape | None:
    try:
        return read_shape(model, network="score", labels=labels, trust_remote_code=trust_remote_code)
    except ConfigError:
        return None


def _scoring(scorer: NetworkScorer, shape: Shape, count: int, *, on_gpu: bool) -> RoleMemory:
    """Its weights, and the inner tensors of one layer for all tokens that are scored at once."""
    width = WIDTH.get(scorer.dtype or shape.dtype, 4)
    weights = float(width * shape.parameters)
    working = layer_tensors(shape, scorer.micro_batch_tokens, width=width)
    if on_gpu and scorer.gpus:  # transformers loads all weights into host memory first
        held = Bytes(weights, activations=working, other=GPU_CONTEXT)
        return RoleMemory(scorer.what, "scorer", count, held, Bytes(other=BASE_TRANSFORMERS + weights))
    host = Bytes(weights, activations=working, other=BASE_TRANSFORMERS)
    return RoleMemory(scorer.what, "scorer", count, Bytes(), host)


def notes_of_scorers(config: Config) -> Iterator[str]:
    """How much judges are asked, and what of the scorers is not planned."""
    if not config.scored:
        return
    for key, scorer in parts_of(config.scorer):
        if isinstance(scorer, JudgeRules):
            yield from _questions(config, scorer)
        elif isinstance(scorer, NetworkScorer) and _network(scorer) is None:
            yield f"{key}.model={scorer.model} is not on this machine: the memory that it takes is not planned"
        elif getattr(scorer, "name", "") == "url":
            yield "what the service at scorer.url needs, and how fast it answers, is not planned"
        elif getattr(scorer, "name", "") == "python":
            yield f"what {scorer.function} needs is not planned"
    if config.lends_engine:
        yield "judging loads the reference into the engines and pushes the policy back: two more pushes a rollout"


def _questions(config: Config, judge: Any) -> Iterator[str]:
    answers = len(config.algorithm.request(config.sampling.sampling()))
    if answers > 1 or (answers and judge.mode == "direct"):
        prompts, what = (config.rollout.prompts, "rollout") if config.learns else (config.algorithm.shard, "shard")
        asked = prompts * judge.questions(answers)
        thinking = f", each after up to {judge.reasoning} tokens of thinking" if judge.reasoning else ""
        yield f"the judge answers up to {asked:,} questions for one {what}{thinking}"
    if getattr(getattr(judge, "ask", None), "name", None) == "server":
        yield "what the judge's server needs, and how fast it answers, is not planned"

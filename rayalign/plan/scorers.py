"""Memory of a scorer: of its process, and of a judge that has an engine of its own."""

from __future__ import annotations

from dataclasses import replace

from rayalign.errors import ConfigError
from rayalign.plan.engines import engine_memory
from rayalign.plan.records import GIB, Bytes, Problem, RoleMemory
from rayalign.plan.shapes import read_shape
from rayalign.runtime.placement import LocalPlacement
from rayalign.schema import Config

PROCESS = 0.3 * GIB  # measured, as for learners


def scorer_memory(config: Config, *, gpu_gib: float, on_gpu: bool) -> tuple[tuple[RoleMemory, ...], list[Problem]]:
    """The scorer's process and its judge, none where the policy's engine is asked; and what is wrong with them."""
    count = config.scorer_actors
    if not count:
        return (), []
    process = RoleMemory("scorer", "scorer", count, Bytes(), Bytes(other=PROCESS))
    ask = getattr(config.scorer, "ask", None)
    if getattr(ask, "name", None) != "engine":
        return (process,), []
    try:
        shape = read_shape(ask.model, trust_remote_code=ask.trust_remote_code)
    except ConfigError as error:
        return (process,), [replace(Problem.of(error), where="key scorer.ask.model")]
    dtype = {"dtype": shape.dtype if shape.dtype in ("float32", "bfloat16") else "bfloat16"}
    alone = {  # a config in which the judge's engine is the engine; it never sleeps
        "engine": ask.engine,
        "model": config.model.model_copy(update=dtype),
        "placement": LocalPlacement(),
    }
    engine, _, problems = engine_memory(config.model_copy(update=alone), shape, gpu_gib=gpu_gib, on_gpu=on_gpu)
    judge = replace(engine, role="judge", actor="scorer", count=count)
    return (process, judge), [_of_judge(problem) for problem in problems]


def _of_judge(problem: Problem) -> Problem:
    return replace(
        problem,
        where=problem.where.replace("key engine.", "key scorer.ask.engine."),
        rule=problem.rule.replace("engine.", "scorer.ask.engine."),
    )

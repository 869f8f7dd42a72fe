"""From prompts to optimiser steps, by the very functions that a run uses for pairs, minibatches and ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rayalign.build import load_tokenizer, prompts_for
from rayalign.data.rows import SUFFIXES, read_rows
from rayalign.errors import DataError, RayalignError
from rayalign.plan.learners import has_reference
from rayalign.plan.records import Batches, Lengths, Micro, Problem, Tokens
from rayalign.schema import Config
from rayalign.sharding import lengths_of, split
from rayalign.types import Completion, Example, Group, Prompt


def prompt_lengths(config: Config) -> Lengths:
    """Of the prompt file, with the model's tokenizer; bounds where one of the two is not at hand. Hub data sets
    are not loaded. What a run could not read is a problem."""
    room = config.engine.max_context - config.sampling.max_tokens
    bound = f"bounds: prompts of up to {room} tokens (engine.max_context − sampling.max_tokens), because"
    if _on_hub(config.data.prompts):
        return Lengths(room, room, None, None, 0, False, f"{bound} a plan loads no data from a hub")
    rows = None
    try:
        rows = len(read_rows(config.data.prompts, split=config.data.split))
        prompts = prompts_for(config, _tokenizer(config))
    except RayalignError as error:
        held_out = None if rows is None else _held_out(rows, config.data.held_out)
        training = None if rows is None or held_out is None else rows - held_out
        problem = Problem.of(error) if isinstance(error, DataError) else None  # else there is no tokenizer
        why = f"{config.data.prompts}: {error.what}" if problem else error.what
        return Lengths(room, room, training, held_out, 0, False, f"{bound} {why}", problem)
    counts = [len(prompt.token_ids) for prompt in (*prompts.training, *prompts.held_out)]
    source = f"measured on {config.data.prompts}"
    mean = sum(counts) / len(counts)
    return Lengths(mean, max(counts), len(prompts.training), len(prompts.held_out), prompts.skipped, True, source)


def data_problems(config: Config, lengths: Lengths) -> tuple[Problem, ...]:
    """Prompts that cannot be read, or that do not fill one rollout: no memory and no number of nodes helps."""
    if lengths.problem:
        return (lengths.problem,)
    if lengths.training is None or lengths.training >= config.rollout.prompts:
        return ()
    return (
        Problem(
            "there are not enough training prompts for one rollout",
            "key rollout.prompts",
            str(config.rollout.prompts),
            f"at most {lengths.training}, the training prompts of {config.data.prompts}",
            f"lower rollout.prompts to {lengths.training}, lower data.held_out, or use more prompts",
        ),
    )


def _on_hub(prompts: str) -> bool:
    """As `data.rows` tells a hub id from a file."""
    path = Path(prompts).expanduser()
    local = path.exists() or path.suffix in SUFFIXES or prompts.startswith((".", "/", "~")) or prompts.count("/") > 1
    return not local


def _tokenizer(config: Config) -> Any:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # a folder without a tokenizer is fine here
    try:
        return load_tokenizer(config)
    finally:
        logging.set_verbosity(before)


def _held_out(rows: int, share: float) -> int:
    """As `data.prompts` splits."""
    count = round(rows * share)
    return min(max(count, 1), rows - 1) if share > 0 and rows > 1 else count


def examples_of_a_prompt(config: Config, lengths: Lengths) -> list[Example]:
    """What the algorithm makes of one prompt when every completion is of full length and all scores differ."""
    sampling = config.sampling.sampling()
    asked = config.algorithm.request(sampling)
    prompt = Prompt(0, "", (0,) * lengths.longest, {})
    completions = tuple(
        Completion(str(k), (0,) * one.max_tokens, (0.0,) * one.max_tokens, "length", 0, "")
        for k, one in enumerate(asked)
    )
    scores = tuple(float(k) for k in range(len(asked)))
    group = Group("0", prompt, completions, ("",) * len(asked), scores)
    return list(config.algorithm.examples([group])[0]) if asked else []


def count_batches(config: Config, lengths: Lengths) -> tuple[Batches, Micro]:
    """The arithmetic of one step and of the run, and the largest micro-batch."""
    training, rollout, ranks = config.train, config.rollout, config.learner.ranks
    samples = len(config.algorithm.request(config.sampling.sampling()))
    made = examples_of_a_prompt(config, lengths)
    examples = rollout.prompts * len(made)
    minibatches = max(1, min(training.minibatches, examples))
    minibatch = math.ceil(examples / minibatches)
    rows = [row for example in made[:1] for row in example.sequences]
    tokens = lengths_of(made[:1])
    plan = split(list(tokens) * minibatch, ranks=ranks, micro_batch_tokens=config.learner.micro_batch_tokens)
    largest = max((len(micro) for rank in plan for micro in rank), default=0)
    longest = max((len(row) for row in rows), default=0)
    steps = training.epochs * minibatches
    rollouts = math.ceil(training.steps / rollout.resample_every)
    pushes, evaluations = _pushes(config, lengths), _evaluations(config, lengths)
    saved = training.steps // config.checkpoint.every if config.checkpoint.every else 0
    last = not config.checkpoint.every or training.steps % config.checkpoint.every != 0
    batches = Batches(
        prompts=rollout.prompts,
        samples=samples,
        completions=rollout.prompts * samples,
        examples=examples,
        rows=len(rows),
        minibatches=minibatches,
        epochs=training.epochs,
        minibatch=minibatch,
        ranks=ranks,
        share=max((sum(map(len, rank)) for rank in plan), default=0),
        micro_batches=len(plan[0]),
        optimizer_steps=steps,
        steps=training.steps,
        optimizer_steps_in_run=steps * training.steps,
        rollouts=rollouts,
        passes=_passes(rollouts, rollout.prompts, lengths.training),
        pushes=pushes,
        evaluations=len(evaluations),
        checkpoints=saved + last,
        evaluation_completions=_evaluated(config, lengths) * config.evaluation.samples,
    )
    in_micro = largest * sum(config.sampling.max_tokens for _ in rows)
    return batches, Micro(largest * len(rows) * longest, longest, in_micro)


def _passes(rollouts: int, prompts: int, training: int | None) -> float | None:
    """Over the training prompts. What does not fill a rollout at an epoch's end is left out of it."""
    return rollouts / (training // prompts) if training and training >= prompts else None


def _evaluated(config: Config, lengths: Lengths) -> int:
    held_out = lengths.held_out if lengths.held_out is not None else config.evaluation.prompts
    return min(config.evaluation.prompts, held_out)


def _evaluations(config: Config, lengths: Lengths) -> set[int]:
    """Steps after which there is one: before, after, and every so often."""
    if not _evaluated(config, lengths):
        return set()
    every, steps = config.evaluation.every, config.train.steps
    return {0, steps} | (set(range(every, steps + 1, every)) if every else set())


def _pushes(config: Config, lengths: Lengths) -> int:
    """One at the start; then before each rollout and each evaluation."""
    every, steps = config.rollout.resample_every, config.train.steps
    return 1 + len(set(range(every, steps + 1, every)) | (_evaluations(config, lengths) - {0}))


def tokens_of_a_step(config: Config, lengths: Lengths, batches: Batches) -> Tokens:
    """At most, of one step that samples: completions of full length, prompts of mean length."""
    longest = config.sampling.max_tokens
    sequences = batches.examples * batches.rows * (lengths.mean + longest)
    return Tokens(
        prompt=batches.prompts * lengths.mean,
        sampled=float(batches.completions * longest),
        trained=sequences * batches.epochs,
        reference=sequences if has_reference(config) else 0.0,
    )

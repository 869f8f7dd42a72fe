"""From prompts to optimiser steps, by the very functions that a run uses for pairs, minibatches and ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from rayalign.build import prompts_for
from rayalign.data.order import held_out_count
from rayalign.data.rows import read_rows
from rayalign.errors import DataError, RayalignError
from rayalign.plan.labels import count_shards
from rayalign.plan.learners import has_reference, uses_exact_kl
from rayalign.plan.opponents import iteration_ends
from rayalign.plan.records import Batches, Lengths, Micro, Problem, Rows, Tokens
from rayalign.plan.rows import on_hub, quiet_tokenizer, row_lengths
from rayalign.schema import Config
from rayalign.sharding import lengths_of, split
from rayalign.types import Completion, Example, Group, Picture, Prompt


def data_lengths(config: Config) -> Lengths:
    """Of all that a run reads: prompts, and rows to learn from."""
    return replace(prompt_lengths(config), rows=row_lengths(config))


def prompt_lengths(config: Config) -> Lengths:
    """Of the prompt file, with the model's tokenizer; bounds where one of the two is not at hand. Hub data sets
    are not loaded. What a run could not read is a problem."""
    if config.data.prompts is None:
        return Lengths(0.0, 0, 0, 0, 0, True, "nothing is sampled")
    room = config.engine.max_context - config.sampling.max_tokens
    gold = config.sampling.max_tokens * getattr(config.algorithm, "takes_gold", False)
    bound = f"bounds: prompts of up to {room} tokens (engine.max_context − sampling.max_tokens), because"
    if on_hub(config.data.prompts):
        return Lengths(room, room, None, None, 0, False, f"{bound} a plan loads no data from a hub", gold=gold)
    rows = None
    try:
        rows = len(read_rows(config.data.prompts, split=config.data.split))
        prompts = prompts_for(config, quiet_tokenizer(config))
    except RayalignError as error:
        held_out = None if rows is None else _held_out(config, rows)
        training = None if rows is None or held_out is None else rows - held_out
        problem = Problem.of(error) if isinstance(error, DataError) else None  # else there is no tokenizer
        why = f"{config.data.prompts}: {error.what}" if problem else error.what
        return Lengths(room, room, training, held_out, 0, False, f"{bound} {why}", problem, gold=gold)
    whole = (*prompts.training, *prompts.held_out)
    counts, gold = [len(prompt.token_ids) for prompt in whole], max(len(prompt.gold_ids) for prompt in whole)
    source = f"measured on {config.data.prompts}"
    mean = sum(counts) / len(counts)
    training, held_out = len(prompts.training), len(prompts.held_out)
    return Lengths(mean, max(counts), training, held_out, prompts.skipped, True, source, gold=gold)


def data_problems(config: Config, lengths: Lengths) -> tuple[Problem, ...]:
    """Prompts or rows that cannot be read, or that do not fill one step: no memory and no number of nodes helps."""
    rows = lengths.rows
    found = tuple(each for each in (lengths.problem, rows and rows.problem) if each)
    if found or not config.learns:
        return found
    if rows is not None:
        return () if rows.training is None or rows.training >= config.rollout.prompts else (_too_few(config, rows),)
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


def _too_few(config: Config, rows: Rows) -> Problem:
    return Problem(
        "there are fewer rows than one step takes",
        "key rollout.prompts",
        str(config.rollout.prompts),
        f"at most {rows.training}, the training rows of data.examples",
        f"lower rollout.prompts to {rows.training}, lower data.held_out, or use more rows",
    )


def _held_out(config: Config, rows: int) -> int:
    """As `data.prompts` splits, and offline all of them."""
    if not config.algorithm.request(config.sampling.sampling()):
        return rows
    return held_out_count(rows, config.data.held_out)


def examples_of_a_prompt(config: Config, lengths: Lengths) -> list[Example]:
    """What the algorithm makes of one prompt, or of one row of data, when every answer is of full length, all of
    them differ, and so do their scores."""
    groups = [_group(config, lengths, index) for index in range(min(2, config.rollout.prompts))]
    made = config.algorithm.examples(groups)[0]  # of two, as some compare a row with the next one
    return list(made[: len(made) // len(groups)])


def _group(config: Config, lengths: Lengths, index: int) -> Group:
    """No token is the same as that of another group or answer. Labels of single answers take turns."""
    sampling, rows = config.sampling.sampling(), lengths.rows
    asked = config.algorithm.request(sampling)
    tokens = [one.max_tokens for one in asked] if rows is None else [answer_tokens(config, lengths)] * len(rows.scores)
    prompt = max(1, longest_row(config, lengths) - max(tokens, default=0))
    images = (Picture(b"", (1, 1)),) if getattr(config.algorithm, "images", False) else ()
    completions = tuple(
        Completion(str(k), (k + 2 + len(tokens) * index,) * length, (), "stop", -1) for k, length in enumerate(tokens)
    )
    scores = tuple(2.0**k for k in range(len(asked)))  # none is the mean of all, which would be neither good nor bad
    if rows is not None:
        choice = len(rows.scores) > 1 and set(rows.scores) == {0.0, 1.0}
        falling = tuple(-float(k) for k in range(len(rows.scores)))
        scores = rows.scores if choice else falling if len(rows.scores) > 1 else (float(index == 0),)
    gold = min(lengths.gold if rows is None else rows.gold, max(0, config.data.max_tokens - prompt))
    return Group(
        str(index),
        Prompt(index, "", (index,) * prompt, {"margin": 0.0}, images, gold_ids=(index,) * gold),
        completions,
        tuple(map(str, range(len(tokens)))),
        scores,
        preferences=None if rows is None else ((0.5,) * len(tokens),) * len(tokens),
        votes=None if rows is None else ((1.0,) * (len(getattr(config.algorithm, "classes", ())) or 2),) * len(tokens),
    )


def longest_row(config: Config, lengths: Lengths) -> int:
    """Tokens of a prompt with its answer, at most."""
    if lengths.rows is None:
        return lengths.longest + config.sampling.max_tokens
    return lengths.rows.longest if config.self_play else min(lengths.rows.longest, config.data.max_tokens)


def answer_tokens(config: Config, lengths: Lengths) -> int:
    """Of the longest answer."""
    if lengths.rows is None:
        return config.sampling.max_tokens
    return max(1, min(lengths.rows.answer, longest_row(config, lengths) - 1))


def count_batches(config: Config, lengths: Lengths) -> tuple[Batches, Micro]:
    """The arithmetic of one step and of the run, and the largest micro-batch."""
    if not config.learns:
        return count_shards(config, lengths)
    training, rollout, ranks = config.train, config.rollout, config.learner.ranks
    asked = len(config.algorithm.request(config.sampling.sampling()))
    samples = asked if lengths.rows is None else len(lengths.rows.scores)
    made = examples_of_a_prompt(config, lengths)
    made = sorted(made, key=lambda example: -len(example.sequences))
    examples = rollout.prompts * len(made)
    minibatches = max(1, min(training.minibatches, examples))
    minibatch = math.ceil(examples / minibatches)
    rows = [row for example in made[:1] for row in example.sequences]
    tokens = lengths_of(made[:1])
    plan = split(
        list(tokens) * minibatch,
        ranks=ranks,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        packed=config.learner.packing,
    )
    largest = max((len(micro) for rank in plan for micro in rank), default=0)
    longest = max((len(row) for row in rows), default=0)
    steps = training.epochs * minibatches
    rollouts = rollout.sets(training.steps) * _at_once(config, lengths) if asked else 0
    pushes, evaluations = _pushes(config, lengths), _evaluations(config, lengths)
    often = config.checkpoint.every
    saved = {training.steps} | iteration_ends(config)
    saved |= set(range(often, training.steps + 1, often)) if often else set()
    batches = Batches(
        prompts=rollout.prompts,
        samples=samples,
        completions=rollout.prompts * asked,
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
        passes=_passes(config, rollouts, lengths),
        pushes=pushes,
        evaluations=len(evaluations),
        checkpoints=len(saved),
        evaluation_completions=_evaluated(config, lengths) * config.evaluation.samples,
        evaluation_rows=_measured_rows(config, lengths),
    )
    in_micro = largest * len(rows) * max((len(row.completion_ids) for row in rows), default=0)
    return batches, _or_texts(Micro(largest * len(rows) * longest, longest, in_micro), config)


def _or_texts(micro: Micro, config: Config) -> Micro:
    """The larger of both, where plain texts are learned beside answers."""
    ptx = getattr(config.algorithm, "ptx", None)
    if ptx is None:
        return micro
    share = math.ceil(ptx.count / config.train.minibatches)
    tokens = max(1, min(share, config.learner.micro_batch_tokens // ptx.tokens)) * ptx.tokens
    return Micro(max(micro.tokens, tokens), max(micro.longest, ptx.tokens), max(micro.positions, tokens))


def micros_of_roles(config: Config, lengths: Lengths, batches: Batches) -> dict[str, Micro]:
    """The largest micro-batch of each role with settings of its own, by which it may be another one."""
    if not getattr(config.learner, "roles", {}):
        return {}
    made = max(examples_of_a_prompt(config, lengths), key=lambda example: len(example.sequences), default=None)
    return {
        role: _largest_micro(made, batches.minibatch, config.learner.of_role(role)) for role in config.learner.roles
    }


def _largest_micro(made: Example | None, count: int, settings: Any) -> Micro:
    rows = made.sequences if made is not None else ()
    plan = split(
        list(lengths_of([made] if made is not None else [])) * count,
        ranks=getattr(settings, "ranks", 1),
        micro_batch_tokens=settings.micro_batch_tokens,
        packed=settings.packing,
    )
    largest = max((len(micro) for rank in plan for micro in rank), default=0)
    longest = max((len(row) for row in rows), default=0)
    answer = max((len(row.completion_ids) for row in rows), default=0)
    return Micro(largest * len(rows) * longest, longest, largest * len(rows) * answer)


def _passes(config: Config, rollouts: int, lengths: Lengths) -> float | None:
    """Over the training prompts; what does not fill a rollout at an epoch's end is left out of it. Over rows of data;
    the next epoch begins where one ends."""
    prompts, training = config.rollout.prompts, lengths.training
    if lengths.rows is not None:
        return config.train.steps * prompts / lengths.rows.training if lengths.rows.training else None
    return rollouts / (training // prompts) if training and training >= prompts else None


def _at_once(config: Config, lengths: Lengths) -> int:
    """Rollouts that are sampled together; prompts that cannot be counted are taken to be enough."""
    steps = config.train.steps
    return config.rollout.set_size(lengths.training or steps * config.rollout.prompts, steps)


def _measured_rows(config: Config, lengths: Lengths) -> int:
    """Held-out rows of one evaluation."""
    if lengths.rows is None:
        return 0
    return min(
        config.evaluation.rows, config.evaluation.rows if lengths.rows.held_out is None else lengths.rows.held_out
    )


def _evaluated(config: Config, lengths: Lengths) -> int:
    """Held-out prompts of one evaluation."""
    known = lengths.rows.held_out if config.self_play and lengths.rows is not None else lengths.held_out
    held_out = known if known is not None else config.evaluation.prompts
    return min(config.evaluation.prompts, held_out)


def _evaluations(config: Config, lengths: Lengths) -> set[int]:
    """Steps after which there is one: before (0), after, and every so often."""
    if not (_evaluated(config, lengths) or _measured_rows(config, lengths)):
        return set()
    every, steps = config.evaluation.every, config.train.steps
    first = {0} if config.evaluation.before else set()
    return first | {steps} | iteration_ends(config) | (set(range(every, steps + 1, every)) if every else set())


def _pushes(config: Config, lengths: Lengths) -> int:
    """One at the start; then before each rollout and each evaluation. None where nothing is sampled."""
    if not config.samples:
        return 0
    every, steps = config.rollout.resample_every, config.train.steps
    again = lengths.rows is None and every != "never"
    rollouts = set(range(every, steps + 1, every)) if again else iteration_ends(config) - {steps}
    return 1 + len(rollouts | (_evaluations(config, lengths) - {0}))


def tokens_of_a_step(config: Config, lengths: Lengths, batches: Batches) -> Tokens:
    """At most, of one step that samples: completions of full length, prompts of mean length; of rows of data, all of
    mean length."""
    longest = config.sampling.max_tokens
    mean = lengths.mean + longest if lengths.rows is None else lengths.rows.mean
    sequences = batches.examples * batches.rows * mean
    algorithm = config.algorithm.planned(batches.optimizer_steps)
    asked = {role for role, _ in algorithm.needs}
    passes = has_reference(config) * (("reference" in asked) + uses_exact_kl(config) * batches.epochs)
    of_critic = ("critic" in asked) + (algorithm.critic_algorithm is not None) * batches.epochs
    ptx = getattr(algorithm, "ptx", None)
    texts = 0 if ptx is None else ptx.count * ptx.tokens
    return Tokens(
        prompt=batches.prompts * lengths.mean if lengths.rows is None else 0.0,
        sampled=float(batches.completions * longest),
        trained=(sequences + texts) * batches.epochs,
        reference=sequences * passes,
        before=sequences * ("policy" in asked),
        critic=sequences * of_critic,
    )

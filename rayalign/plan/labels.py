"""What a labelling comes to: shards instead of steps, and nothing that learns; and what later stages find in it."""

from __future__ import annotations

import math

from rayalign.plan.records import Batches, Lengths, Micro, Rows
from rayalign.schema import Config


def count_shards(config: Config, lengths: Lengths) -> tuple[Batches, Micro]:
    """A step is a shard, of a generation all of it; no examples, no optimiser, no push and no checkpoint."""
    label = config.algorithm
    of = lengths if lengths.rows is None else lengths.rows
    there = of.training
    shard = getattr(label, "shard", there or 1)
    asked = len(label.request(config.sampling.sampling()))  # type: ignore[attr-defined]
    size = shard if there is None else min(shard, there)
    shards = 0 if there is None else math.ceil(there / shard)
    batches = Batches(
        prompts=size,
        samples=asked or len(lengths.rows.scores if lengths.rows else ()),
        completions=size * asked,
        examples=0,
        rows=0,
        minibatches=0,
        epochs=0,
        minibatch=0,
        ranks=0,
        share=0,
        micro_batches=0,
        optimizer_steps=0,
        steps=shards,
        optimizer_steps_in_run=0,
        rollouts=shards if asked else 0,
        passes=None if there is None else 1.0,
        pushes=0,
        evaluations=0,
        checkpoints=0,
        evaluation_completions=0,
    )
    return batches, Micro(0, 0, 0)


def labelled_rows(config: Config, lengths: Lengths, held_out: float) -> Rows:
    """The rows that a labelling will have written, at most, for a stage that learns from them.

    Args:
        config: of the labelling.
        lengths: of what it samples for, or labels.
        held_out: share of them that the later stage keeps for evaluations.
    """
    label, of = config.algorithm, lengths if lengths.rows is None else lengths.rows
    answers = label.samples or len(lengths.rows.scores if lengths.rows else ())  # type: ignore[attr-defined]
    answer = config.sampling.max_tokens + 1 if lengths.rows is None else lengths.rows.answer
    longest = of.longest + (answer if lengths.rows is None else 0)
    pairs = label.write == "pairs" or (label.write is None and _compares(config))  # type: ignore[attr-defined]
    each = answers * (answers - 1) // 2 if pairs else 1
    count = None if of.training is None else of.training * each
    held = None if count is None else round(count * held_out)
    scores = (1.0,) if label.write == "best" else (1.0, 0.0) if pairs else tuple(-float(k) for k in range(answers))  # type: ignore[attr-defined]
    kind = "best answers" if label.write == "best" else "pairs" if pairs else "ranked"  # type: ignore[attr-defined]
    known = f"up to {count:,}" if count is not None else "nobody knows how many"
    return Rows(
        mean=float(longest),
        longest=longest,
        answer=answer,
        scores=scores,
        training=None if count is None or held is None else count - held,
        held_out=held,
        measured=False,
        source=f"bounds: {known} {kind} of full length, as the stage that writes them has not run",
    )


def _compares(config: Config) -> bool:
    """Whether the scorer says of pairs which one is better."""
    return getattr(config.scorer, "gives_preferences", False)

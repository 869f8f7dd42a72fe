"""What self-play adds to a plan: the opponent's answers, how many there are, and when they are sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rayalign.plan.records import GIB, Rows
from rayalign.schema import Config

BYTES = 12  # of one token in generations/: its number and its text, estimated


def with_opponent(config: Config, rows: Rows, prompts: Sequence[int]) -> Rows:
    """Rows of two answers, the data's and the opponent's of full length.

    Args:
        prompts: tokens of the prompts.
    """
    if not config.self_play:
        return rows
    longest = config.sampling.max_tokens
    fitting = [count for count in prompts if count + longest <= config.engine.max_context] or [0]
    mean = sum(fitting) / len(fitting) + longest
    return replace(
        rows,
        mean=(rows.mean + mean) / 2 if rows.measured else max(rows.mean, mean),
        longest=max(rows.longest, max(fitting) + longest),
        answer=max(rows.answer, longest),
        scores=(1.0, 0.0),
    )


def iteration_ends(config: Config) -> set[int]:
    """Training steps after which an iteration is over: there is a checkpoint and an evaluation of themselves. None
    where nobody knows yet how many steps an iteration has."""
    course = config.algorithm
    if not config.self_play or course.total_steps is None:  # type: ignore[attr-defined]
        return set()
    return {course.first_step(t) for t in range(1, course.iterations + 1)}  # type: ignore[attr-defined]


def notes_of_opponents(config: Config, rows: Rows | None) -> Iterator[str]:
    """A sentence each."""
    if not config.self_play:
        return
    course, longest, count = config.algorithm, config.sampling.max_tokens, config.engine.count
    if course.total_steps is None:  # type: ignore[attr-defined]
        yield "how many steps an iteration has is not known: it follows from algorithm.epochs and the number of rows"
    engines = f"{count} engine{'s' if count > 1 else ''}"
    if rows is None or rows.training is None:
        yield f"each iteration begins with an answer of up to {longest} tokens to every training prompt, by {engines}"
        return
    most = rows.training * longest
    disk = BYTES * most * course.iterations / GIB  # type: ignore[attr-defined]
    yield (
        f"each iteration begins with {rows.training:,} answers of up to {longest} tokens by {engines}, at most "
        f"{most / count:,.0f} tokens each; how long that takes depends on how long answers are, and is not known here"
    )
    yield f"generations/ keeps all answers: at most about {disk:.2f} GiB"

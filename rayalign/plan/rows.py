"""Tokens of the rows that an offline algorithm learns from, and what it makes of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayalign.build import examples_for, load_tokenizer
from rayalign.data.columns import read_columns
from rayalign.data.config import SourceConfig
from rayalign.data.examples import ExampleSet
from rayalign.data.order import held_out_count
from rayalign.data.rows import SUFFIXES
from rayalign.data.tables import open_table
from rayalign.errors import ConfigError, DataError, RayalignError
from rayalign.plan.opponents import with_opponent
from rayalign.plan.records import Problem, Rows
from rayalign.schema import Config

MEASURED = 2000  # rows that are tokenised, those that a run takes first
PAIR, ONE = (1.0, 0.0), (1.0,)


def row_lengths(config: Config) -> Rows | None:
    """Of data.examples, with the model's tokenizer; bounds where one of the two is not at hand. Hub data sets are not
    loaded. What a run could not read is a problem. None for an algorithm that samples what it learns from."""
    if config.algorithm.request(config.sampling.sampling()):
        return None
    sources = config.data.examples
    if any(on_hub(source.path) for source in sources):
        return _bounds(config, (), None, "a plan loads no data from a hub")
    tokenizer: Any = None
    try:
        tokenizer = quiet_tokenizer(config)
    except RayalignError as error:
        why = error.what
    try:
        found = None if tokenizer is None else examples_for(config, tokenizer)
        if found is not None:
            return _measured(config, found)
        kinds, count = _unread(config, sources)
        return _bounds(config, kinds, count, why)
    except DataError as error:
        return _bounds(config, (), None, error.what, Problem.of(error))


def _measured(config: Config, examples: ExampleSet) -> Rows:
    """Of the rows that a run begins with."""
    count = min(examples.rows or MEASURED, MEASURED)
    groups = examples.step(0, count)
    tokens = [len(group.prompt.token_ids) + len(c.token_ids) for group in groups for c in group.completions]
    answers = [len(completion.token_ids) for group in groups for completion in group.completions]
    most = max(groups, key=lambda group: len(group.completions))
    part = f", the first {count:,} of them measured" if count != examples.rows else ""
    rows = Rows(
        mean=sum(tokens) / len(tokens),
        longest=max(tokens),
        answer=max(answers),
        scores=most.scores or (0.0,) * len(most.completions),
        training=examples.rows,
        held_out=len(examples.held_out),
        measured=True,
        source=examples.describe() + part,
        gold=max(len(group.prompt.gold_ids) for group in groups),
    )
    return with_opponent(config, rows, [len(group.prompt.token_ids) for group in groups])


def _unread(config: Config, sources: Sequence[SourceConfig]) -> tuple[list[tuple[str, int]], int | None]:
    """Without a tokenizer: for each source the kind of its first row and how many answers that has; and the number
    of rows, whether of use or not. Raises DataError."""
    kinds, count = [], 0
    for source in sources:
        table = open_table(source)
        count += min(len(table), source.limit or len(table))
        row = table.row(0) if len(table) else {}
        reading = read_columns(list(row), source.columns, config.algorithm.rows, source.path)
        several = row.get(reading.columns.get("completions", ""))
        kinds.append((reading.form.kind, len(several) if isinstance(several, list) else 2))
    return kinds, None if any(source.stream for source in sources) else count


def _bounds(
    config: Config, kinds: Sequence[tuple[str, int]], count: int | None, why: str, problem: Problem | None = None
) -> Rows:
    most = config.data.max_tokens
    known = kinds or [(config.algorithm.rows[0], 2)]
    single = all(kind in ("completion", "label", "votes") for kind, _ in known)
    answers = max(number for _, number in known)
    ranked = tuple(-float(rank) for rank in range(answers))
    held = None if count is None else held_out_count(count, config.data.held_out)
    rows = Rows(
        mean=most,
        longest=most,
        answer=most - 1,
        scores=ONE if single else PAIR if answers == 2 else ranked,
        training=None if count is None or held is None else count - held,
        held_out=held,
        measured=False,
        source=f"bounds: up to {most} tokens (data.max_tokens), because {why}",
        problem=problem,
        gold=(most - 1) * getattr(config.algorithm, "takes_gold", False),
    )
    return with_opponent(config, rows, [config.engine.max_context - config.sampling.max_tokens])


def on_hub(name: str) -> bool:
    """As `data.rows` tells a hub id from a file."""
    path = Path(name).expanduser()
    return not (path.exists() or path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1)


def quiet_tokenizer(config: Config) -> Any:
    """The model's tokenizer; a folder without one is fine here. Raises ConfigError."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        found = load_tokenizer(config)
    finally:
        logging.set_verbosity(before)
    if not found("a")["input_ids"]:  # of some architectures transformers makes one without words of config.json alone
        raise ConfigError(
            "no tokenizer could be loaded from there",
            where="key model.path",
            value=config.model.path,
            rule="a folder with the model's tokenizer",
            remedy="copy the tokenizer's files beside config.json",
        )
    return found

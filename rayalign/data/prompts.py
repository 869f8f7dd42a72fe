"""Prompt files → checked, templated, tokenised prompts, split into training and held-out ones."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from rayalign.data.config import DataConfig
from rayalign.data.gold import COLUMN, gold_ids
from rayalign.data.messages import prompt_messages
from rayalign.data.rows import read_rows
from rayalign.data.tokens import Turns
from rayalign.errors import DataError
from rayalign.registry import did_you_mean
from rayalign.types import Prompt


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order, apart for training and for evaluation; `skipped` were too long, and of `cut` ones the
    reference answer was."""

    training: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    skipped: int
    cut: int = 0

    @cached_property
    def fingerprint(self) -> str:
        """Of the prompts' tokens and reference answers, and of which are held out."""
        known = [
            [(p.index, p.token_ids, *filter(None, (p.gold_ids, p.extra.get(COLUMN)))) for p in part]
            for part in (self.training, self.held_out)
        ]
        return hashlib.blake2b(repr(known).encode(), digest_size=16).hexdigest()


def load_prompts(
    config: DataConfig, tokenizer: Any, *, max_prompt_tokens: int, gold: bool = False, max_tokens: int | None = None
) -> PromptSet:
    """Read, check, template and tokenise.

    Args:
        max_prompt_tokens: what the engine's context leaves beside the longest completion.
        gold: whether reference answers, where a row has one, become tokens; see `data.gold`.
        max_tokens: of a prompt with its reference answer, which is cut to it. Default: data.max_tokens.

    Raises:
        DataError: with file, row, value, rule and remedy.
    """
    source = config.prompts
    rows = read_rows(source, split=config.split)
    if not rows:
        raise DataError(
            "there is not one row in this data",
            where=source,
            value="0 rows",
            rule="at least one prompt",
            remedy=f'write rows such as {{"{config.prompt_column}": "…"}}',
        )
    turns = Turns(tokenizer, chat_template=config.chat_template)
    prompts, skipped, cut, room = [], 0, 0, max_tokens or config.max_tokens
    columns = dict.fromkeys(key for row in rows for key in row)
    for index, row in enumerate(rows):
        where = f"{source}, row {index + 1}"
        _check_column(row, config.prompt_column, where)
        messages = prompt_messages(row[config.prompt_column], config.system, where)
        token_ids = turns.prompt(messages, where)
        if len(token_ids) > max_prompt_tokens:
            if config.long_prompts == "refuse":
                raise DataError(
                    "this prompt leaves no room for a completion",
                    where=where,
                    value=f"{len(token_ids)} tokens",
                    rule=f"at most {max_prompt_tokens} (engine.max_context − sampling.max_tokens)",
                    remedy="raise engine.max_context, or set data.long_prompts=skip",
                )
            skipped += 1
            continue
        extra = {**columns, **row}  # a column that only some rows have is there for all
        extra.pop(config.prompt_column, None)
        whole = gold_ids(extra, messages, turns, where) if gold else ()
        answer = whole[: max(room - len(token_ids), 0)]
        cut += answer != whole
        prompts.append(
            Prompt(index, messages[-1]["content"], token_ids, extra, messages=tuple(messages), gold_ids=answer)
        )
    if not prompts:
        raise DataError(
            "every prompt is too long",
            where=source,
            value=f"too long: {skipped} of {len(rows)}",
            rule=f"at most {max_prompt_tokens} tokens (engine.max_context − sampling.max_tokens)",
            remedy="raise engine.max_context or lower sampling.max_tokens",
        )
    return replace(_split(prompts, config.held_out, config.shuffle_seed, skipped), cut=cut)


def _check_column(row: dict[str, Any], column: str, where: str) -> None:
    if column in row:
        return
    names = [str(name) for name in row]
    near = difflib.get_close_matches(column, names)
    remedy = f"set data.prompt_column; {did_you_mean(column, names)}"
    if ".csv" in where and any(";" in name or "\t" in name for name in names):
        remedy = "separate the columns by commas"
    elif ".csv" in where and not near:
        remedy = f"begin the file with a line that names the columns, one of them {column}; or set data.prompt_column"
    raise DataError(
        f"there is no column {column!r}",
        where=where,
        value=f"columns {', '.join(names)}" if names else "no column",
        rule="data.prompt_column names the column with the prompt",
        remedy=remedy,
    )


def _split(prompts: list[Prompt], held_out: float, seed: int, skipped: int) -> PromptSet:
    """A share of all rows, drawn once by the seed, is held out; both parts keep the file's order. Whether another one
    is too long changes nothing: a run with more room does not learn from what this one holds out."""
    total, there = len(prompts) + skipped, {prompt.index for prompt in prompts}
    order = np.random.default_rng(seed).permutation(total).tolist()
    count = len(there.intersection(order[: round(total * held_out)]))
    if held_out > 0 and len(prompts) > 1:
        count = min(max(count, 1), len(prompts) - 1)
    chosen = set([index for index in order if index in there][:count])
    return PromptSet(
        tuple(p for p in prompts if p.index not in chosen), tuple(p for p in prompts if p.index in chosen), skipped
    )

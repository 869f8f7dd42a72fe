"""Prompt files → checked, templated, tokenised prompts, split into training and held-out ones."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from rayalign.data.rows import read_rows
from rayalign.errors import DataError
from rayalign.record import Record
from rayalign.registry import did_you_mean
from rayalign.types import Prompt


class DataConfig(Record):
    """Where the prompts come from."""

    prompts: str = Field(
        description="a .jsonl, .json, .csv or .parquet file, or a hub id", examples=["my_prompts.jsonl"]
    )
    split: str = Field("train", description="of a hub data set")
    prompt_column: str = Field("prompt", description="column with a text, or with chat messages")
    system: str | None = Field(None, description="system message put before every prompt")
    chat_template: bool = Field(True, description="apply the model's chat template (off: continue the text as it is)")
    held_out: float = Field(0.2, ge=0, lt=1, description="share of the prompts kept for evaluation")
    long_prompts: Literal["skip", "refuse"] = Field(
        "skip", description="prompts that leave no room in the context: skip and count them, or refuse the file"
    )
    shuffle_seed: int = Field(0, ge=0, description="of the split into training and held-out prompts")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order, apart for training and for evaluation; `skipped` were too long."""

    training: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    skipped: int


def load_prompts(config: DataConfig, tokenizer: Any, *, max_prompt_tokens: int) -> PromptSet:
    """Read, check, template and tokenise.

    Args:
        max_prompt_tokens: what the engine's context leaves beside the longest completion.

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
    prompts, skipped = [], 0
    for index, row in enumerate(rows):
        where = f"{source}, row {index + 1}"
        _check_column(row, config.prompt_column, where)
        messages = _messages(row[config.prompt_column], config.system, where)
        token_ids = _tokens(tokenizer, messages, config.chat_template, where)
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
        extra = {key: value for key, value in row.items() if key != config.prompt_column}
        prompts.append(Prompt(index, messages[-1]["content"], tuple(token_ids), extra))
    if not prompts:
        raise DataError(
            "every prompt is too long",
            where=source,
            value=f"too long: {skipped} of {len(rows)}",
            rule=f"at most {max_prompt_tokens} tokens (engine.max_context − sampling.max_tokens)",
            remedy="raise engine.max_context or lower sampling.max_tokens",
        )
    return _split(prompts, config.held_out, config.shuffle_seed, skipped)


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


def _messages(value: Any, system: str | None, where: str) -> list[dict[str, str]]:
    """A text, or chat messages, as chat messages that end with the user's."""
    if isinstance(value, str) and value.strip():
        messages = [{"role": "user", "content": value}]
    elif isinstance(value, list) and value and all(map(_is_message, value)):
        messages = [{"role": m["role"], "content": m["content"]} for m in value]
    else:
        raise DataError(
            "this is not a prompt",
            where=where,
            value=json.dumps(value, ensure_ascii=False, default=str) if value is not None else "nothing (null)",
            rule="a text that is not empty, or a list of messages, each with role and content as texts",
            remedy="correct or drop this row"
            if not isinstance(value, list)
            else 'write messages as {"role": "user", "content": "…"}',
        )
    if messages[-1]["role"] != "user":
        raise DataError(
            "these messages do not end with the user's",
            where=where,
            value=f"the last role is {messages[-1]['role']}",
            rule="the model answers the user's last message",
            remedy="drop the messages after it, or give the last one the role user",
        )
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _tokens(tokenizer: Any, messages: list[dict[str, str]], chat_template: bool, where: str) -> list[int]:
    if not chat_template:
        return tokenizer("".join(m["content"] for m in messages))["input_ids"]
    if not tokenizer.chat_template:
        raise DataError(
            "this model's tokenizer has no chat template",
            where=where,
            value="data.chat_template=true",
            rule="a chat template in the model's folder, or data.chat_template=false",
            remedy="set data.chat_template=false to continue the text, or align a model that chats",
        )
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:  # a template is a program: it may refuse roles and their order
        raise DataError(
            "the model's chat template refuses these messages",
            where=where,
            value=f"roles {', '.join(m['role'] for m in messages)}",
            rule=f"what the template takes: {error}",
            remedy="correct the row, or take data.system out when the template knows no system role",
        ) from error


def _split(prompts: list[Prompt], held_out: float, seed: int, skipped: int) -> PromptSet:
    """A share of the prompts, drawn once by the seed, is held out; both parts keep the file's order."""
    count = round(len(prompts) * held_out)
    if held_out > 0 and len(prompts) > 1:
        count = min(max(count, 1), len(prompts) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(prompts))[:count].tolist())
    return PromptSet(
        tuple(p for i, p in enumerate(prompts) if i not in chosen),
        tuple(p for i, p in enumerate(prompts) if i in chosen),
        skipped,
    )

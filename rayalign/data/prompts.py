"""Prompt files → checked, templated, tokenised prompts, split into training and held-out ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from rayalign.errors import DataError
from rayalign.record import Record
from rayalign.registry import did_you_mean
from rayalign.types import Prompt

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
        DataError: with file, row, value and rule.
    """
    source = config.prompts
    rows = read_rows(source, split=config.split)
    if not rows:
        raise DataError("there is not one row in this data", where=source, rule="at least one prompt")
    _check_column(rows, config.prompt_column, source)
    prompts, skipped = [], 0
    for index, row in enumerate(rows):
        messages = _messages(row[config.prompt_column], config.system, f"{source}, row {index + 1}")
        token_ids = _tokens(tokenizer, messages, config.chat_template, source)
        if len(token_ids) > max_prompt_tokens:
            if config.long_prompts == "refuse":
                raise DataError(
                    "this prompt leaves no room for a completion",
                    where=f"{source}, row {index + 1}",
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
            rule=f"at most {max_prompt_tokens} tokens",
            remedy="raise engine.max_context or lower sampling.max_tokens",
        )
    return _split(prompts, config.held_out, config.shuffle_seed, skipped)


def read_rows(source: str, *, split: str = "train") -> list[dict[str, Any]]:
    """All rows of a file or a hub data set, through `datasets`. Raises DataError."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(
            "this is a folder, not a file", where=source, rule=f"a file: {', '.join(BUILDERS)}, or a hub id"
        )
    if path.suffix in BUILDERS:
        return _read_file(path)
    from datasets import load_dataset

    try:
        return load_dataset(source, split=split).to_list()
    except Exception as error:  # datasets raises a different class for every way of not finding something
        raise DataError(
            "this data set could not be loaded",
            where=source,
            value=f"{type(error).__name__}: {error}",
            rule=f"a file ({', '.join(BUILDERS)}) that exists, or a hub id that can be reached",
        ) from error


def _read_file(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), remedy=f"relative paths start at {Path.cwd()}")
    if path.stat().st_size == 0:
        raise DataError("this file is empty", where=str(path), rule="at least one row")
    if path.suffix == ".jsonl":  # checked line by line, since datasets names no line
        return list(_json_lines(path))
    from datasets import load_dataset

    try:
        return load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train", keep_in_memory=True).to_list()
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(
            f"this is not a readable {path.suffix} file", where=str(path), value=f"{type(cause).__name__}: {cause}"
        ) from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    "this line is not UTF-8",
                    where=f"{path}:{number}",
                    value=str(error),
                    remedy="save the file as UTF-8",
                ) from None
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    "this line is not JSON",
                    where=f"{path}:{number}",
                    value=line.strip(),
                    rule=f"one JSON object a line; {error}",
                ) from None
            if not isinstance(row, dict):
                raise DataError(
                    "this line is not a JSON object",
                    where=f"{path}:{number}",
                    value=line.strip(),
                    rule='for instance {"prompt": "…"}',
                )
            yield row


def _check_column(rows: Sequence[dict[str, Any]], column: str, source: str) -> None:
    for index, row in enumerate(rows):
        if column not in row:
            raise DataError(
                f"there is no column {column!r}",
                where=f"{source}, row {index + 1}",
                value=f"columns {', '.join(map(str, row))}",
                rule="data.prompt_column names the column with the prompt",
                remedy=did_you_mean(column, [str(name) for name in row]),
            )


def _messages(value: Any, system: str | None, where: str) -> list[dict[str, str]]:
    """A text, or chat messages, as chat messages that end with the user's."""
    if isinstance(value, str) and value.strip():
        messages = [{"role": "user", "content": value}]
    elif (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    ):
        messages = [{"role": m["role"], "content": m["content"]} for m in value]
    else:
        raise DataError(
            "this is not a prompt",
            where=where,
            value=value,
            rule="a text that is not empty, or a list of {role, content} messages",
        )
    if messages[-1]["role"] != "user":
        raise DataError(
            "these messages do not end with the user's",
            where=where,
            value=f"the last role is {messages[-1]['role']}",
            rule="the model answers the user's last message",
        )
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _tokens(tokenizer: Any, messages: list[dict[str, str]], chat_template: bool, source: str) -> list[int]:
    if not chat_template:
        return tokenizer("".join(m["content"] for m in messages))["input_ids"]
    if not tokenizer.chat_template:
        raise DataError(
            "this model's tokenizer has no chat template",
            where=source,
            remedy="set data.chat_template=false to continue the text",
        )
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


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

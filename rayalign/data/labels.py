"""What a scorer said of answers, as files: shards that hold all of it, and rows that `data.examples` reads."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayalign.data.columns import REASONS, TRUST
from rayalign.data.files import set_aside
from rayalign.data.gold import COLUMN
from rayalign.errors import CheckpointError
from rayalign.types import Group, unscored

Record = Mapping[str, Any]  # of one prompt, see `record_of`
Row = dict[str, Any]


def record_of(group: Group, texts: Sequence[str]) -> Record:
    """All that is known of one prompt: conversation, answers, and what was said of them.

    Args:
        texts: of the answers, as a data set is to have them.
    """
    messages = [dict(message) for message in group.prompt.messages]
    return {
        "prompt_index": group.prompt.index,
        "prompt": messages if len(messages) > 1 else group.prompt.text,
        "completions": list(texts),
        "truncated": [completion.finish_reason == "length" for completion in group.completions],
        "tokens": [len(completion.token_ids) for completion in group.completions],
        "scores": list(group.scores or ()),
        "preferences": group.preferences,
        "inferred": group.inferred,
        "metrics": dict(group.metrics),
        "contested": list(group.contested),
        **{name: found for name, found in ((TRUST, group.trust), ("shares", group.shares)) if found},
        **({"skipped": list(group.skipped)} if any(group.skipped) else {}),
        REASONS: _reasons(group),
        **({COLUMN: gold} if (gold := group.prompt.extra.get(COLUMN)) is not None else {}),
    }


def _reasons(group: Group) -> list[str]:
    """How the answers' texts end. One that was read is whole in the rows, also where its tokens are cut to length."""
    read = group.prompt.extra.get(REASONS, ["stop"] * len(group.completions))
    return [c.finish_reason if c.version >= 0 else read[k] for k, c in enumerate(group.completions)]


def rows_of(record: Record, write: str | None, *, drop_truncated: bool = False) -> tuple[list[Row], Counter[str]]:
    """Rows of one prompt, and how many answers, pairs or prompts gave none, by reason.

    Args:
        write: "ranked", "pairs" or "best"; None: pairs where the scorer compared, else ranked.
    """
    if unscored(record["metrics"]):
        return [], Counter({"prompts that the judge refused": 1})
    preferences, scores = record["preferences"], record["scores"]
    kept, left_out = _kept(record, drop_truncated)
    if write == "best":
        if not kept:
            return [], left_out + Counter({"prompts without an answer": 1})
        best = max(kept, key=lambda index: scores[index])  # the first of equals
        return [_row(record, [best], completion=record["completions"][best], score=scores[best])], left_out
    if write == "pairs" or (write is None and preferences is not None):
        pairs = [_pair(record, i, j) for place, i in enumerate(kept) for j in kept[place + 1 :]]
        rows = [pair for pair in pairs if pair is not None]
        return rows, left_out + Counter({"ties": len(pairs) - len(rows)})
    if len({scores[index] for index in kept}) < 2:
        return [], left_out + Counter({"prompts whose answers are all as good": 1})
    answers = [record["completions"][index] for index in kept]
    return [_row(record, kept, completions=answers, scores=[scores[index] for index in kept])], left_out


def _kept(record: Record, drop_truncated: bool) -> tuple[list[int], Counter[str]]:
    """The answers that a data set can have: not empty, each once."""
    kept: dict[str, int] = {}  # by the text without the space around it
    contested = record.get("contested")
    left_out: Counter[str] = Counter()
    for index, text in enumerate(record["completions"]):
        if not text.strip():
            left_out["empty answers"] += 1
        elif drop_truncated and record["truncated"][index]:
            left_out["truncated answers"] += 1
        elif contested and contested[index]:
            left_out["contested answers"] += 1
        elif text.strip() in kept:
            left_out["answers that are there twice"] += 1
        else:
            kept[text.strip()] = index
    return list(kept.values()), left_out


def _pair(record: Record, i: int, j: int) -> Row | None:
    """The better one first; where answers were compared with the probability that it is, and whether that was worked
    out from other comparisons. i < j. None: a tie."""
    if record["preferences"] is not None:
        prob = record["preferences"][i][j]
        inferred = (i, j) in {tuple(pair) for pair in record.get("inferred", ())}  # shards of before have none
        if prob == 0.5:
            return None
        i, j, prob = (i, j, prob) if prob > 0.5 else (j, i, 1 - prob)
        more = {"probability": prob, "inferred": inferred}
    else:
        if record["scores"][i] == record["scores"][j]:
            return None
        i, j = (i, j) if record["scores"][i] > record["scores"][j] else (j, i)
        more = {}
    return _row(record, [i, j], chosen=record["completions"][i], rejected=record["completions"][j], **more)


def _row(record: Record, answers: Sequence[int], **columns: Any) -> Row:
    """A reference answer goes along, so that what learns from the rows has it; how much is to be learned from each
    answer, where the scorer says so; and what tells that answers were cut."""
    row = {"prompt": record["prompt"], **columns, **({COLUMN: record[COLUMN]} if COLUMN in record else {})}
    if TRUST in record:
        row[TRUST] = [record[TRUST][index] for index in answers]
    reasons = [record[REASONS][index] for index in answers] if REASONS in record else []
    return {**row, REASONS: reasons} if "length" in reasons else row


def write_shard(path: Path, known: str, records: Sequence[Record]) -> None:
    """Whole or not at all: beside its place, then moved there. Raises CheckpointError.

    Args:
        known: fingerprint of what the records were made of.
    """
    head = {"fingerprint": known, "prompts": len(records)}
    write_lines(path, [head, *records])


def read_shard(path: Path, known: str, indices: Sequence[int], say: Callable[[str], None]) -> list[Record] | None:
    """The records of a shard; None where there is none. One that was cut, or is of something else, is set aside.

    Args:
        indices: of its prompts.
        say: is told of it.
    """
    if not path.exists():
        return None
    why = "is damaged"
    try:
        head, *records = (json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1])
        if head["fingerprint"] != known:
            why = "was made of something else"
        elif [record["prompt_index"] for record in records] == list(indices):
            return records
    except (OSError, ValueError, TypeError, KeyError):  # not text, not JSON, or not what was written
        pass
    say(f"{path.name} {why}: it is kept as {set_aside(path).name}, and its prompts are labelled again")
    return None


def write_lines(path: Path, values: Iterable[Any]) -> int:
    """One JSON value a line, in a file that is there whole or not at all. Gives their number.

    Raises:
        CheckpointError: it cannot be written.
    """
    writing, count = path.with_name(f".{path.name}.writing"), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing.open("w", encoding="utf-8", errors="replace") as file:
            for value in values:
                file.write(json.dumps(value, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        writing.replace(path)
    except OSError as error:
        raise CheckpointError(
            "this file could not be written; those before it are untouched",
            where=str(path),
            value=f"{type(error).__name__}: {error}",
            remedy="free disk space, then resume=true",
        ) from error
    finally:
        writing.unlink(missing_ok=True)
    return count

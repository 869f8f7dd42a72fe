"""Reference answers: the column `gold` of prompts, and of rows of answers, for what keeps up their likelihood.

An algorithm that looks at them says so (`takes_gold`); for all others the column is one like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayalign.data.messages import behind_prompt
from rayalign.data.tokens import Turns
from rayalign.errors import DataError

COLUMN = "gold"


def gold_ids(
    columns: Mapping[str, Any], messages: Sequence[dict[str, Any]], turns: Turns, where: str
) -> tuple[int, ...]:
    """A row's reference answer as the answers of a data set become tokens; empty where it has none.

    Args:
        columns: of the row.
        messages: that it answers.

    Raises:
        DataError: it is neither a text nor messages.
    """
    found = columns.get(COLUMN)
    if found is None or (isinstance(found, str) and not found.strip()):
        return ()
    if not isinstance(found, str | list):
        raise DataError(
            "a reference answer is no text",
            where=where,
            value=f"{COLUMN}: {found!r}",
            rule=f"a text in the column {COLUMN}, or nothing where there is no such answer",
            remedy="correct the row, or call the column otherwise if it is something else than an answer",
        )
    return turns.answer(messages, behind_prompt(found, messages, where), where)

"""Texts and chat messages, and where in a conversation the prompt ends and the answer begins."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from rayalign.errors import DataError

Message = dict[str, str]
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # as dialogues are written in plain text
_ROLES = {"Human": "user", "Assistant": "assistant"}


def prompt_messages(value: Any, system: str | None, where: str) -> list[dict[str, str]]:
    """A text, or chat messages, as chat messages that end with the user's."""
    if isinstance(value, str) and value.strip():
        messages = [{"role": "user", "content": value}]
    elif isinstance(value, list) and value and all(map(is_message, value)):
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


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def split_prompt(first: Any, second: Any, where: str, *, chat: bool) -> tuple[Any, str, str]:
    """Two conversations that begin alike → (prompt, answer, answer): messages cut behind the last common one, texts
    with turns (`\\n\\nHuman:`, `\\n\\nAssistant:`) behind the last common turn's mark, other texts behind the last
    common word.

    Args:
        chat: whether a chat template follows, so that a text's turns become messages.
    """
    if isinstance(first, str) and isinstance(second, str):
        if not (_turns(first) or _turns(second)):
            prompt, *answers = _split_words(first, second, where)
            return (prompt, *(answer.lstrip() if chat else answer for answer in answers))  # a template sets its own
        if not chat:
            return _split_texts(first, second, where)
    one, two = _conversation(first, where), _conversation(second, where)
    common = 0
    while common < min(len(one), len(two)) - 1 and one[common] == two[common]:
        common += 1
    if common == 0:
        raise _no_common(first, second, where)
    return one[:common], only_answer(one[common:], where), only_answer(two[common:], where)


def behind_prompt(value: Any, prompt: Sequence[Message], where: str) -> str:
    """An answer as a text, from a text or from messages, which may repeat the prompt."""
    if isinstance(value, str):
        return value
    messages = _conversation(value, where)
    plain = [m for m in prompt if m["role"] != "system"]
    rest = [m for m in messages if m["role"] != "system"]
    return only_answer(rest[len(plain) :] if rest[: len(plain)] == plain else messages, where)


def only_answer(messages: Sequence[Message], where: str) -> str:
    """The text of what is left behind the prompt. Raises DataError unless that is one message of the assistant."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(
            "an answer is not one message of the assistant",
            where=where,
            value=f"behind the prompt: {', '.join(m['role'] for m in messages) or 'nothing'}",
            rule="conversations that are the same up to the last message, which is the assistant's",
            remedy="cut both conversations behind the first answer in which they differ",
        )
    return messages[0]["content"]


def _conversation(value: Any, where: str) -> list[Message]:
    if isinstance(value, list) and value and all(map(is_message, value)):
        return [{"role": m["role"], "content": m["content"]} for m in value]
    if isinstance(value, str):
        marks = _turns(value)
        if marks:
            ends = [mark.start() for mark in marks[1:]] + [len(value)]
            return [
                {"role": _ROLES[mark[1]], "content": value[mark.end() : end].strip()}
                for mark, end in zip(marks, ends, strict=True)
            ]
        raise DataError(
            "an answer without a prompt has no turns",
            where=where,
            value=json.dumps(value, ensure_ascii=False),
            rule="a prompt, or lists of messages, or texts with turns, \\n\\nHuman: and \\n\\nAssistant:",
            remedy="add a prompt to the row, or name its column: columns: {prompt: …}",
        )
    raise DataError(
        "an answer is neither a text nor messages",
        where=where,
        value="nothing (null)" if value is None else json.dumps(value, ensure_ascii=False, default=str),
        rule="a text that is not empty, or a list of messages, each with role and content as texts",
        remedy="correct or drop this row, or set data.on_bad_row=skip",
    )


def _turns(text: str) -> list[re.Match[str]]:
    """The marks of a dialogue's turns; none of a text that does not begin with one."""
    marks = list(_TURN.finditer(text))
    return marks if marks and not text[: marks[0].start()].strip() else []


def _split_words(first: str, second: str, where: str) -> tuple[str, str, str]:
    """An answer begins with the space in front of its first word, as it does where a model continues the prompt."""
    common = len(os.path.commonprefix([first, second]))
    for cut in range(min(common, len(first) - 1, len(second) - 1), 0, -1):
        if first[cut].isspace() and second[cut].isspace() and not first[cut - 1].isspace():
            return first[:cut], first[cut:], second[cut:]
    raise _no_common(first, second, where)


def _split_texts(first: str, second: str, where: str) -> tuple[str, str, str]:
    marks = [
        mark for mark in _TURN.finditer(first) if mark[1] == "Assistant" and second.startswith(first[: mark.end()])
    ]
    if not marks:
        raise _no_common(first, second, where)
    cut = marks[-1].end()
    return first[:cut], first[cut:], second[cut:]


def _no_common(first: Any, second: Any, where: str) -> DataError:
    return DataError(
        "the two answers have no prompt in common",
        where=where,
        value=f"{json.dumps(first, ensure_ascii=False, default=str)[:80]} and "
        f"{json.dumps(second, ensure_ascii=False, default=str)[:80]}",
        rule="a column with the prompt, or answers that begin with the same words or messages",
        remedy="add a prompt to the row, or name its column: columns: {prompt: …}",
    )

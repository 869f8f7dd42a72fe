"""One row of a data set, read by its columns: prompt, answers, and what its annotators said of them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayalign.data.columns import NAMES, REASONS, TRUST, Reading
from rayalign.data.images import Found, flat, images_of, with_marks
from rayalign.data.messages import Message, behind_prompt, prompt_messages, split_prompt
from rayalign.data.votes import ANY, Classes
from rayalign.errors import DataError

Numbers = tuple[float, ...]
KNOWN = frozenset(name for names in NAMES.values() for name in names)
NOTHING = (None, [], "")
LABELS = {"true": 1.0, "false": 0.0, "good": 1.0, "bad": 0.0, "desirable": 1.0, "undesirable": 0.0}


@dataclass(frozen=True)
class Row:
    """What `types.Group` holds, before there are tokens.

    Attributes:
        kind: "completion", "pair", "label", "ranked", "votes", or "answers", which nobody has judged.
        ratings: whole numbers of annotators, which become votes once the lowest and the highest are known.
        images: of the prompt, in the order of `<image>` in its texts.
        cut: for each answer whether it was cut when it was sampled, so that no token ends it; empty: none was.
        trust: for each answer how much is learned from it, from 0 to 1; empty: all count the same.
    """

    kind: str
    prompt: Sequence[Message]
    answers: tuple[str, ...]
    scores: Numbers | None
    preferences: tuple[Numbers, ...] | None = None
    votes: tuple[Numbers, ...] | None = None
    ratings: tuple[int, ...] = ()
    extra: Mapping[str, Any] | None = None
    images: tuple[Found, ...] = ()
    cut: tuple[bool, ...] = ()
    trust: Numbers = ()

    def turned(self, order: Sequence[int]) -> Row:
        """With the annotators' word given to other answers: of a label, to the other class."""
        if self.kind == "label":
            return replace(self, scores=(1.0 - self.scores[0],))
        cut = tuple(self.cut[i] for i in order) if self.cut else ()
        trust = tuple(self.trust[i] for i in order) if self.trust else ()
        return replace(self, answers=tuple(self.answers[i] for i in order), cut=cut, trust=trust)


class Reader:
    """Rows of one data set → `Row`s. Whatever is wrong with one is a DataError whose `what` names the reason alone.

    Args:
        system: a system message to put before every prompt that has none.
        again: reads columns as those of the first row were read.
        first: the columns of the first row.
        chat: whether a chat template follows.
        ties: whether a pair may be one whose halves are equally good, as its probability of ½ says.
        classes: that votes are for.
        folder: where relative paths of images start.
    """

    def __init__(
        self,
        again: Callable[[Sequence[str]], Reading],
        first: Sequence[str],
        *,
        system: str | None,
        chat: bool,
        ties: bool = False,
        classes: Classes = ANY,
        folder: Path = Path(),
    ):
        self.reading = again(first)
        self.kind, self._needs, self._columns = self.reading.form.kind, self.reading.form.needs, self.reading.columns
        self._again, self._first, self._ties = again, tuple(first), ties
        self._classes = classes
        self._system, self._chat, self._folder = system, chat, folder
        self._others: dict[tuple[str, ...], bool] = {}

    def read(self, row: Mapping[str, Any], where: str) -> Row:
        self._check_columns(row, where)
        name, images = self._columns.get("images"), ()
        if name is not None:
            images = images_of(row.get(name), self._folder, where)
        row = {column: flat(value, images=name is not None) for column, value in row.items() if column != name}
        prompt, answers = self._texts(row, where)
        for answer in answers:
            if not answer.strip():
                raise _bad("an answer is empty", answer, "a text in each answer", where)
        if len(answers) > 1 and len(set(answers)) == 1:
            number = "the two answers are" if len(answers) == 2 else "all answers are"
            raise _bad(f"{number} the same", answers[0], "answers that differ", where)
        messages = prompt_messages(prompt, self._system, where)
        if name is not None:
            messages = with_marks(messages, len(images), where)
        used = {self._columns[role] for role in self._columns if role != "margin"}
        extra = {name: value for name, value in row.items() if name not in used}
        if "margin" in self._columns:
            extra["margin"] = _number(self._cell(row, "margin", where), "a margin", where)
        cut = _cut(extra.pop(REASONS, None), len(answers), where)
        trust = _trust(extra.pop(TRUST, None), len(answers), where)
        said = getattr(self, f"_{self.kind}")(row, answers, where)
        return Row(self.kind, messages, tuple(answers), extra=extra, images=images, cut=cut, trust=trust, **said)

    def _check_columns(self, row: Mapping[str, Any], where: str) -> None:
        """What the first row has not, and what would be read otherwise if it had, is not left unread."""
        new = tuple(name for name in row if name in KNOWN and name not in self._first and row[name] not in NOTHING)
        if not new:
            return
        if new not in self._others:
            try:
                self._others[new] = self._again([*self._first, *new]) == self.reading
            except DataError:
                self._others[new] = False
        if not self._others[new]:
            raise _bad(
                f"this row has {', '.join(new)}, and the first one has no such column",
                str(row[new[0]])[:80],
                f"the same columns in each row: {new[0]} in the first one, too",
                where,
                as_it_is=True,
            )

    def _cell(self, row: Mapping[str, Any], role: str, where: str) -> Any:
        name = self._columns[role]
        if name not in row:
            found = f"columns {', '.join(row)}" if row else "no column"
            raise _bad(f"there is no column {name!r}", found, "the same columns in each row", where, as_it_is=True)
        return row[name]

    def _texts(self, row: Mapping[str, Any], where: str) -> tuple[Any, list[str]]:
        """The prompt as it stands there, and the answers."""
        if self._needs == ("messages",):
            messages = self._cell(row, "messages", where)
            if not isinstance(messages, list) or len(messages) < 2:
                raise _bad("this is not a conversation", messages, "messages, the last one the assistant's", where)
            last = _message(messages[-1], where)
            if last["role"] != "assistant":
                raise _bad(
                    "this conversation does not end with the assistant",
                    f"the last role is {last['role']}",
                    "messages up to an answer, which is trained on",
                    where,
                    as_it_is=True,
                )
            return messages[:-1], [last["content"]]
        given = self._columns.get("prompt")
        prompt = row.get(given) if given else None
        if self.kind == "pair":
            first, second = (self._cell(row, role, where) for role in self._needs)
            if prompt is None:
                prompt, *answers = split_prompt(first, second, where, chat=self._chat)
                return prompt, answers
            values = [first, second]
        else:
            prompt = self._cell(row, "prompt", where)
            values = self._cell(row, self._needs[0], where)
            several = self.kind in ("ranked", "answers")
            values = values if several else [values]
            if not isinstance(values, list) or (several and len(values) < 2):
                raise _bad("there are not several answers to compare", values, "a list of two or more answers", where)
        messages = prompt_messages(prompt, None, where)
        return prompt, [behind_prompt(value, messages, where) for value in values]

    def _completion(self, row: Mapping[str, Any], answers: Sequence[str], where: str) -> dict[str, Any]:
        return {"scores": (1.0,)}

    def _answers(self, row: Mapping[str, Any], answers: Sequence[str], where: str) -> dict[str, Any]:
        return {"scores": None}

    def _pair(self, row: Mapping[str, Any], answers: Sequence[str], where: str) -> dict[str, Any]:
        """The better half is the one that most annotators prefer, whatever its column is called."""
        if "votes" in self._columns:
            value = self._cell(row, "votes", where)
            first, second = _counts(value, where, length=2)
            chosen = first / (first + second)
        elif "probability" in self._columns:
            value = chosen = _number(self._cell(row, "probability", where), "a probability", where)
            if not 0 <= chosen <= 1:
                raise _bad("a probability is out of range", chosen, "from 0 to 1, that the chosen one is better", where)
        else:
            return {"scores": (1.0, 0.0)}
        if chosen == 0.5 and not self._ties:
            rule = "one that is better, unless the loss learns from probabilities alone (soft, psi_po)"
            raise _bad("both answers are equally good", value, rule, where)
        scores = (1.0, 0.0) if chosen >= 0.5 else (0.0, 1.0)
        return {"scores": scores, "preferences": ((0.5, chosen), (1 - chosen, 0.5))}

    def _label(self, row: Mapping[str, Any], answers: Sequence[str], where: str) -> dict[str, Any]:
        value = self._cell(row, "label", where)
        label = LABELS.get(value.strip().lower()) if isinstance(value, str) else value
        if isinstance(label, bool | int | float) and label in (0, 1):
            return {"scores": (float(label),)}
        raise _bad("this is no label", value, "true or false, 1 or 0, good or bad, desirable or undesirable", where)

    def _ranked(self, row: Mapping[str, Any], answers: Sequence[str], where: str) -> dict[str, Any]:
        count, role = len(answers), self._needs[1]
        value = self._cell(row, role, where)
        if role == "choice":
            if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(count):
                raise _bad("the choice is none of the answers", value, f"0 to {count - 1}, counted from 0", where)
            return {"scores": tuple(float(i == value) for i in range(count))}
        if role == "votes":
            votes = _counts(value, where, length=count)
            said = {"scores": votes, "preferences": _beaten(votes)}
        elif role == "scores":
            scores = _list(value, "scores", where, length=count)
            said = {"scores": tuple(_number(score, "a score", where) for score in scores)}
        else:
            ranks = _list(value, "ranks", where, length=count)
            said = {"scores": tuple(-_number(rank, "a rank", where) for rank in ranks)}
        if len(set(said["scores"])) == 1:
            raise _bad("all answers are equally good", value, "at least two that differ", where)
        return said

    def _votes(self, row: Mapping[str, Any], answers: Sequence[str], where: str) -> dict[str, Any]:
        role = self._needs[1]
        value = self._cell(row, role, where)
        count = len(self._classes.names)
        if role == "agreement":
            share = _number(value, "a share", where)
            if not 0 <= share <= 1:
                raise _bad("a share is out of range", share, "from 0 to 1: of annotators who agree with it", where)
            if count not in (0, 2):
                rule = f"votes for {count} classes ({self._classes.in_words}); a share is one of two"
                raise _bad("these votes do not match the classes", value, rule, where)
            return {"scores": None, "votes": ((1 - share, share),)}
        if role == "votes":
            votes = _counts(value, where, some=False)  # an answer on which nobody has voted may be one as well
            if count and len(votes) != count:
                rule = f"{count} votes, one for each class: {self._classes.in_words}"
                raise _bad("these votes do not match the classes", value, rule, where)
            return {"scores": None, "votes": (votes,)}
        given = [value] if isinstance(value, str) else _list(value, "ratings", where, one=True)
        ratings = [_number(_rating(each), "a rating", where) for each in given]
        if any(each != round(each) for each in ratings):
            raise _bad("these are no ratings", value, "whole numbers", where)
        if self._classes.ratings is None:
            return {"scores": None, "ratings": tuple(map(int, ratings))}
        if any(self._classes.place_of(int(each)) is None for each in ratings):
            rule = f"ratings in one of {', '.join(f'{low} to {high}' for low, high in self._classes.ratings)}"
            raise _bad("a rating belongs to no class", value, rule, where)
        return {"scores": None, "votes": (self._classes.counted([int(each) for each in ratings]),)}


def prompt_key(row: Row) -> int:
    """64 bits of the prompt, its images included: the same for rows that ask the same."""
    found = hashlib.blake2b(digest_size=8)
    for message in row.prompt:
        found.update(f"{message['role']}\x1f{message['content'].strip()}\x1e".encode(errors="surrogatepass"))
    for image in row.images:
        found.update(image if isinstance(image, bytes) else str(image).encode(errors="surrogateescape"))
    return int.from_bytes(found.digest(), "big")


def counted(ratings: Sequence[int], lowest: int, highest: int) -> Numbers:
    """How many annotators gave each rating from the lowest to the highest."""
    return tuple(float(ratings.count(rating)) for rating in range(lowest, highest + 1))


def _beaten(votes: Numbers) -> tuple[Numbers, ...]:
    """P(i ≻ j) = v_i / (v_i + v_j), ½ where neither has a vote."""
    return tuple(
        tuple(0.5 if i == j or a + b == 0 else a / (a + b) for j, b in enumerate(votes)) for i, a in enumerate(votes)
    )


def _message(value: Any, where: str) -> Message:
    if isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str):
        return {"role": value["role"], "content": value["content"]}
    raise _bad("this is not a message", value, "role and content, both texts", where)


def _number(value: Any, what: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _bad(f"{what} is not a finite number", value, "a number, neither NaN nor infinite", where)
    return float(value)


def _rating(value: Any) -> Any:
    """Some data sets write a rating as a text, "5"."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value.strip()) else value


def _list(value: Any, what: str, where: str, *, length: int | None = None, one: bool = False) -> list[Any]:
    """A list, or with `one` a number that stands for a list of one."""
    if one and isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, list):
        raise _bad(f"the {what} are not a list", value, "a list of numbers", where)
    if length is not None and len(value) != length:
        raise _bad(f"there are not as many {what} as answers", value, f"{length} {what}, one for each answer", where)
    return value


def _counts(value: Any, where: str, *, length: int | None = None, some: bool = True) -> Numbers:
    """Votes, of which there are `some`."""
    votes = tuple(_number(each, "a vote", where) for each in _list(value, "votes", where, length=length))
    if any(vote < 0 for vote in votes) or (some and sum(votes) == 0):
        rule = "counts of at least 0, one vote at least" if some else "counts of at least 0, one for each class"
        raise _bad("these votes cannot be", value, rule, where)
    return votes


def _cut(reasons: Any, count: int, where: str) -> tuple[bool, ...]:
    """Of the column finish_reasons, which a row need not have."""
    if reasons is None:
        return ()
    found = tuple(reason == "length" for reason in _list(reasons, "finish reasons", where, length=count))
    return found if any(found) else ()


def _trust(value: Any, count: int, where: str) -> Numbers:
    """Of the column trust, which a row need not have."""
    if value is None:
        return ()
    found = tuple(_number(each, "trust", where) for each in _list(value, "trust", where, length=count))
    if not all(0 <= each <= 1 for each in found):
        raise _bad("trust is out of range", value, "from 0 to 1: how much is learned from each answer", where)
    return found


def _bad(what: str, value: Any, rule: str, where: str, *, as_it_is: bool = False) -> DataError:
    found = value if as_it_is else json.dumps(value, ensure_ascii=False, default=str)
    found = "nothing (null)" if value is None else found
    return DataError(
        what, where=where, value=found, rule=rule, remedy="correct or drop this row, or set data.on_bad_row=skip"
    )

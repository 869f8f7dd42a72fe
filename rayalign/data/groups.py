"""Read rows → groups of tokens, cut to length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rayalign.data.columns import REASONS, Reading
from rayalign.data.gold import gold_ids
from rayalign.data.images import ImageTurns, opened, size_of
from rayalign.data.readers import Row
from rayalign.data.tokens import Turns
from rayalign.errors import DataError
from rayalign.types import Completion, Group, Prompt

Ids = tuple[int, ...]


class Tokeniser:
    """Rows as groups of at most `max_tokens` a prompt with an answer.

    Args:
        limit: what sets max_tokens, in words.
        processor: gives the model's, for rows with images. Raises ConfigError for a model that sees none.
        images: whether each row has to have one.
        gold: whether reference answers, where a row has one, become tokens; see `data.gold`.
    """

    def __init__(
        self,
        turns: Turns,
        *,
        max_tokens: int,
        limit: str = "data.max_tokens",
        processor: Callable[[], Any] | None = None,
        images: bool = False,
        gold: bool = False,
    ):
        self._gold = gold
        self.turns, self._max, self._limit, self._processor, self._images = turns, max_tokens, limit, processor, images
        self._roles: dict[tuple[str, ...], bool] = {}

    def reading(self, reading: Reading, where: str) -> Tokeniser:
        """For rows with these columns. Raises DataError when images are missing, or there is nothing to see them."""
        if "images" not in reading.columns:
            if self._images:
                raise DataError(
                    "this data has no column with images",
                    where=where,
                    value=f"the columns {', '.join(reading.columns.values())}",
                    rule="an algorithm that compares what is said about images needs one in each row",
                    remedy="say which column it is: columns: {images: …}",
                )
            return self
        if self._processor is None:
            raise DataError(
                "these rows have images, and nothing here sees them",
                where=where,
                value=f"the column {reading.columns['images']}",
                rule="a vision-language model, trained on its log-probs",
                remedy="use such a model, or take the column out of the data",
            )
        turns = ImageTurns(self._processor(), chat_template=self.turns.chat_template)
        return Tokeniser(turns, max_tokens=self._max, limit=self._limit, images=self._images, gold=self._gold)

    def group(self, row: Row, where: str, *, index: int, id: str) -> tuple[Group, bool]:
        """The group, and whether something of the row was cut.

        Raises:
            DataError: the prompt leaves no room for an answer, or the template refuses the row.
        """
        whole_prompt, answers = self._ids(row, where)
        prompt = whole_prompt
        if row.images:  # a prompt cut in an image would be of no use
            cut = [answer[: self._max - len(prompt)] for answer in answers]
        else:
            prompt, cut = fit(prompt, answers, self._max, begin=self.turns.begin)
        lost = len(prompt) < len(whole_prompt) or cut != answers
        reasons = ["length" if each else "stop" for each in row.cut or [False] * len(answers)]
        completions = tuple(
            Completion(f"{id}/{k}", ids, (), reason if ids == whole else "length", -1)
            for k, (ids, whole, reason) in enumerate(zip(cut, answers, reasons, strict=True))
        )
        extra, room = {**(row.extra or {}), **({REASONS: reasons} if row.cut else {})}, self._max - len(prompt)
        gold = gold_ids(extra, row.prompt, self.turns, where)[:room] if self._gold else ()
        group = Group(
            id,
            Prompt(
                index,
                row.prompt[-1]["content"],
                prompt,
                extra,
                tuple(opened(image, where) for image in row.images),
                tuple(row.prompt),
                gold,
            ),
            completions,
            row.answers,
            row.scores,
            row.preferences,
            row.votes,
            trust=row.trust,
        )
        return group, lost

    def is_cut(self, row: Row, where: str) -> bool:
        """Whether something of this row is lost. Texts so short that it cannot be are not tokenised.

        Raises:
            DataError: as `group` does.
        """
        self._check_roles(row, where)
        prompt = sum(len(message["content"].encode()) for message in row.prompt)
        longest = max(len(answer.encode()) for answer in row.answers)
        short = prompt + longest + self.turns.overhead * (len(row.prompt) + 1) <= self._max  # no token is under a byte
        if short and not row.images and not self._images:
            return False
        ids, answers = self._ids(row, where)
        return len(ids) + max(map(len, answers)) > self._max

    def _check_roles(self, row: Row, where: str) -> None:
        """What a template refuses is the order of roles: each order is tried once."""
        roles = tuple(message["role"] for message in row.prompt)
        if self.turns.segments:
            return
        if not self.turns.chat_template:
            self.turns.one_text(row.prompt, where)
        elif roles not in self._roles:
            self.turns.answer(row.prompt, row.answers[0], where)
            self._roles[roles] = True

    def _ids(self, row: Row, where: str) -> tuple[Ids, list[Ids]]:
        if self._images and not row.images:
            raise DataError(
                "a row has no image",
                where=where,
                value="images: 0",
                rule="one image or more in each row, for an algorithm that compares what is said about them",
                remedy="add the image, drop this row, or set data.on_bad_row=skip",
            )
        if isinstance(self.turns, ImageTurns):
            prompt = self.turns.prompt(row.prompt, where, [size_of(image, where) for image in row.images])
        else:
            prompt = self.turns.prompt(row.prompt, where)
        if len(prompt) >= self._max or not prompt:
            more = "raise data.max_tokens" if self._limit == "data.max_tokens" else "use a model with a longer context"
            raise DataError(
                "a prompt fills the context" if prompt else "a prompt has no tokens",
                where=where,
                value=f"{len(prompt)} tokens",
                rule=f"1 to {self._max - 1} tokens, so that an answer has room in {self._limit}={self._max}",
                remedy=f"{more}, shorten or drop the prompt, or set data.on_bad_row=skip",
            )
        answers = [self.turns.answer(row.prompt, answer, where) for answer in row.answers]
        end = self.turns.end
        for place, cut in enumerate(row.cut):
            if cut and end and answers[place][-len(end) :] == end:
                answers[place] = answers[place][: -len(end)]
        return prompt, answers


def fit(prompt: Ids, answers: Sequence[Ids], room: int, *, begin: int | None = None) -> tuple[Ids, list[Ids]]:
    """The end of the prompt and the start of each answer, at most `room` tokens together.

    A prompt gives way to the longest answer down to half of the room, then answers are cut. `begin`, the token
    that begins every sequence, stays in front.
    """
    longest = max(map(len, answers))
    space = max(room - longest, min(len(prompt), room // 2))
    if len(prompt) > space:
        kept: Any = (begin,) if prompt[0] == begin and space > 1 else ()
        prompt = (*kept, *prompt[len(prompt) - space + len(kept) :])
    return prompt, [answer[: room - len(prompt)] for answer in answers]

"""A reward behind a URL: texts go out by POST, numbers come back."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from rayalign.errors import ScoreError
from rayalign.scorers.base import ScorerConfig
from rayalign.scorers.cache import AnswerCache, key_of, open_cache
from rayalign.scorers.connection import Connection
from rayalign.scorers.failing import Tolerance, judged
from rayalign.scorers.remote import Caller, Failed
from rayalign.types import Group, Judgement

log = logging.getLogger("rayalign")
Text = dict[str, Any]  # prompt, completion, and columns


class Url(ScorerConfig, Connection, Tolerance):
    """A service of one's own: POST of a batch of texts, JSON both ways.

    Request: {"prompts": [text, …], "completions": [text, …], "columns": {name: [value, …], …}}, all lists of the
    same length, `columns` those that the config names. Reply: {"scores": [number, …]}, one for each completion in
    their order, higher is better; a list alone will do. A prompt of several
    messages is one text, each behind its role. Status 429 and 5xx are asked again, other errors end the run; so does
    a reply that cannot be used, unless `on_error` says else: its completions are then asked for one by one.
    """

    paper: ClassVar = "Hu et al. 2024, arXiv:2405.11143 (rewards behind a URL)"
    name: Literal["url"] = "url"
    url: str = Field(
        description="where texts are posted to, without a key in it", examples=["http://127.0.0.1:9000/score"]
    )
    columns: tuple[str, ...] = Field(
        (), description="columns of data.prompts that are sent along", examples=[["topic"]]
    )
    max_batch: int = Field(64, ge=1, description="completions of one request")
    cache: str | None = Field(
        None,
        description="file that keeps the scores, for a service that gives the same one for the same text; null: none. "
        "They are those of this url, or, where there is a revision, of that, wherever the service runs",
        examples=["~/.cache/rayalign/my_scores.sqlite"],
    )

    def start(self) -> _Scores:
        return _Scores(self)


class _Scores:
    """The ScoreFunction: groups → scores."""

    def __init__(self, config: Url):
        self._config = config
        self._caller = Caller(config, place="scorer")
        self._cache: AnswerCache | None = open_cache(config.cache)

    def __call__(self, groups: Sequence[Group]) -> list[list[float]] | list[Judgement]:
        texts = [self._text(group, text) for group in groups for text in group.texts]
        keys = [key_of(service=self._config.revision or self._config.url, **text) for text in texts]
        kept = [self._cache.get(key) if self._cache is not None else None for key in keys]
        known: dict[int, float | None] = {place: score for place, score in enumerate(kept) if score is not None}
        missing = [place for place in range(len(texts)) if place not in known]
        size = self._config.max_batch
        batches = [missing[start : start + size] for start in range(0, len(missing), size)]

        def ask(places: Sequence[int]) -> None:
            for place, score in zip(places, self._tolerant([texts[place] for place in places]), strict=True):
                known[place] = score
                if self._cache is not None and score is not None:
                    self._cache.put(keys[place], score)

        self._caller.each(ask, batches)
        numbers = iter(known[place] for place in range(len(texts)))
        if self._config.on_error != "error":
            return judged(groups, list(numbers), self._config.on_error)
        return [[next(numbers) for _ in group.texts] for group in groups]

    def close(self) -> None:
        self._caller.close()
        if self._cache is not None:
            self._cache.close()

    def _text(self, group: Group, completion: str) -> Text:
        extra = group.prompt.extra
        lacking = [name for name in self._config.columns if name not in extra]
        if lacking:
            raise ScoreError(
                f"a prompt has no column {lacking[0]!r}",
                where="key scorer.columns",
                value=f"prompt {group.prompt.index} has {', '.join(map(str, extra)) or 'no column besides the prompt'}",
                rule="columns of data.prompts; where a row has nothing there, the service gets null",
                remedy="add the column to the prompts, or take it out of scorer.columns",
            )
        columns = {name: json.loads(json.dumps(extra[name], default=str)) for name in self._config.columns}
        return {"prompt": group.prompt.conversation, "completion": completion, "columns": columns}

    def _tolerant(self, texts: Sequence[Text]) -> Sequence[float | None]:
        """Scores; None where a text fails alone and failing does not end the run. Raises ScoreError."""
        try:
            return self._scores(texts)
        except Failed as failed:
            error = failed.ends or ScoreError(
                "the service gave no usable scores",
                where=f"key scorer.url, {self._config.url}",
                value=str(failed),
                rule=f'{{"scores": […]}} with a finite number for each of {len(texts)} completions, in their order',
                remedy="look at the service's log; lower scorer.max_batch if it takes fewer at a time",
            )
            if failed.ends is not None or self._config.on_error == "error":
                raise error from failed
            if len(texts) == 1:
                log.warning("%s, for the completion %r", error, texts[0]["completion"][:60])
                return [None]
            return [score for text in texts for score in self._tolerant([text])]

    def _scores(self, texts: Sequence[Text]) -> list[float]:
        """Raises Failed."""
        body = {
            "prompts": [text["prompt"] for text in texts],
            "completions": [text["completion"] for text in texts],
            "columns": {name: [text["columns"][name] for text in texts] for name in self._config.columns},
        }
        return self._caller.post("", body, lambda reply: _numbers(reply, len(texts)))


def _numbers(reply: Any, count: int) -> list[float]:
    """Raises Failed when the reply is not one finite number a completion."""
    scores = reply.get("scores") if isinstance(reply, dict) else reply
    if not isinstance(scores, list):
        keys = ", ".join(map(str, reply)) if isinstance(reply, dict) else type(reply).__name__
        raise Failed(f"a reply without scores: {keys or 'an empty object'}")
    if len(scores) != count:
        raise Failed(f"{len(scores)} scores for {count} completions")
    for place, score in enumerate(scores):
        if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
            raise Failed(f"the score of completion {place} of the request is {json.dumps(score)}")
    return [float(score) for score in scores]

"""A judge's questions put to an engine: one of its own, or the policy's that is lent to it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny

from rayalign.data.tokens import Turns
from rayalign.engines import ENGINES
from rayalign.errors import ConfigError, DataError, ScoreError
from rayalign.memory import peak_gib
from rayalign.protocols import Engine
from rayalign.record import Record
from rayalign.registry import Tagged
from rayalign.scorers.asking import Answer, Question, parted
from rayalign.types import Completion, Request, Sampling

VARIABLES = "variables of the judge's chat template, as {enable_thinking: false}: an answer has to come first"
AnyEngine = Annotated[SerializeAsAny[Record], Tagged("engine", ENGINES, "build", "vllm")]


class EngineAsker(Record):
    """A judge with an engine of its own, inside the scorer's process: `scorer.count` of them make its pool."""

    name: Literal["engine"] = "engine"
    model: str = Field(
        description="the judge: folder of a Hugging Face checkpoint, or a hub id", examples=["/models/my-judge"]
    )
    engine: AnyEngine = Field({"name": "vllm"}, description="what it runs on, as the section engine; count stays 1")
    trust_remote_code: bool = Field(False, description="run code that the checkpoint brings")
    chat_template_kwargs: dict[str, Any] = Field({}, description=VARIABLES)

    @property
    def gpus(self) -> int:
        return int(getattr(self.engine, "tensor_parallel", 1))

    def check(self, answers: Sequence[str], *, model: str, trust_remote_code: bool = False) -> None:
        """Whether the judge's tokenizer is there and the answers are tokens of it. Raises ConfigError.

        Args:
            model: of the policy; a judge of its own needs it not.
        """
        where = "key scorer.ask.engine"
        if self.engine.count > 1:  # type: ignore[attr-defined]
            raise ConfigError(
                "a scorer has one engine",
                where=f"{where}.count",
                value=self.engine.count,  # type: ignore[attr-defined]
                rule="1; scorer.count of them make the judge's pool",
                remedy="set scorer.count instead",
            )
        answer_ids(load_tokenizer(self.model, "key scorer.ask.model", self.trust_remote_code), answers, self.model)

    def start(self) -> EngineAsking:
        tokenizer = load_tokenizer(self.model, "key scorer.ask.model", self.trust_remote_code)
        engine = self.engine.build(  # type: ignore[attr-defined]
            model=str(Path(self.model).expanduser()), name="judge", trust_remote_code=self.trust_remote_code
        )
        return EngineAsking(
            engine,
            tokenizer,
            max_context=self.engine.max_context,  # type: ignore[attr-defined]
            name=self.model,
            variables=self.chat_template_kwargs,
        )


class PolicyAsker(Record):
    """The policy judges itself as it was: its engine with the reference's weights, for the time of the judging.

    They are loaded when no completion is being sampled any more, and the policy's weights are pushed back after,
    both verified as every push is. When the reference follows the policy, so does the judge.
    """

    name: Literal["policy"] = "policy"
    chat_template_kwargs: dict[str, Any] = Field({}, description=VARIABLES)

    @property
    def gpus(self) -> int:
        return 0

    def check(self, answers: Sequence[str], *, model: str, trust_remote_code: bool = False) -> None:
        """Whether the answers are tokens of the policy. Raises ConfigError."""
        answer_ids(load_tokenizer(model, "key model.path", trust_remote_code), answers, model)

    def start(self) -> EngineAsking:
        raise ScoreError(
            "this judge has no engine of its own",
            where="key scorer.ask",
            value="policy",
            rule="scorer: {name: judge, ask: policy} in a training, which lends it the policy's engine",
            remedy="give it one: ask: {name: engine, model: /models/my-judge}",
        )


class EngineAsking:
    """`asking.Asker` by an engine of this package. Greedy thinking; answers are read off the first position.

    Args:
        max_context: of the engine; a question that does not fit is no answer.
        name: of the model, for messages.
        closes: whether the engine ends with this.
        variables: of the chat template.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        max_context: int,
        name: str,
        closes: bool = True,
        variables: Mapping[str, Any] | None = None,
    ):
        self.engine, self._tokenizer, self._max_context, self._name = engine, tokenizer, max_context, name
        self._turns = Turns(tokenizer, chat_template=bool(tokenizer.chat_template), variables=variables or {})
        self._special = special_words(tokenizer)
        self._known: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._calls, self._closes = 0, closes

    def lent(self, variables: Mapping[str, Any]) -> EngineAsking:
        """The same engine, asked with these variables of the chat template, by somebody who does not end it."""
        return EngineAsking(
            self.engine,
            self._tokenizer,
            max_context=self._max_context,
            name=self._name,
            closes=False,
            variables=variables,
        )

    def tokenizes(self, answers: Sequence[str]) -> None:
        """See asking.Asker."""
        try:
            self._known[tuple(answers)] = answer_ids(self._tokenizer, answers, self._name)
        except ConfigError as error:
            raise ScoreError(
                error.what, where=error.where, value=error.value, rule=error.rule, remedy=error.remedy
            ) from None

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """See asking.Asker."""
        self._calls += 1
        for answers in {question.answers for question in questions} - self._known.keys():
            self.tokenizes(answers)
        failed: dict[int, str] = {}
        thoughts = self._think(questions, failed)
        asked = {}
        for place, question in enumerate(questions):
            if place in failed:
                continue
            messages = question.concluded(thoughts[place]) if question.reasoning else question.messages
            sampling = Sampling(1, temperature=0.0, choices=self._known[question.answers])
            self._add(asked, failed, place, messages, sampling)
        answered = self._serve(asked)
        return [
            Answer(question.id, None, thoughts.get(place, ""), failed[place])
            if place in failed
            else Answer(question.id, answered[place].choice_logps, thoughts.get(place, ""))
            for place, question in enumerate(questions)
        ]

    def _think(self, questions: Sequence[Question], failed: dict[int, str]) -> dict[int, str]:
        """What those questions that want it are thought about, by place."""
        asked: dict[int, Request] = {}
        for place, question in enumerate(questions):
            if question.reasoning:
                sampling = Sampling(question.reasoning, temperature=0.0)
                self._add(asked, failed, place, question.messages, sampling)
        found = self._serve(asked)
        decode = self._tokenizer.decode
        return {place: decode(list(c.token_ids), skip_special_tokens=True).strip() for place, c in found.items()}

    def _add(
        self, asked: dict[int, Request], failed: dict[int, str], place: int, messages: Any, sampling: Sampling
    ) -> None:
        """One request, or why there is none."""
        try:
            ids = self._ids(messages)
        except DataError as error:  # the template may refuse roles
            failed[place] = f"{error.what}: {error.rule}"
            return
        if len(ids) + sampling.max_tokens > self._max_context:
            failed[place] = f"{len(ids)} + {sampling.max_tokens} tokens do not fit max_context={self._max_context}"
            return
        asked[place] = Request(f"ask-{self._calls}/{place}", ids, sampling, seed=0)

    def _ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """An answer that spells out a special token must not end its turn and give the verdict itself: such words are
        parted by a space."""
        messages = parted(messages, self._special)
        if self._turns.chat_template:
            return self._turns.prompt(messages, self._name)
        text = "\n\n".join(message["content"] for message in messages) + "\n\n"  # a base model continues it
        return self._turns.prompt([{"role": "user", "content": text}], self._name)

    def _serve(self, asked: dict[int, Request]) -> dict[int, Completion]:
        done: dict[int, Completion] = {}
        self.engine.submit(list(asked.values()))
        try:
            while len(done) < len(asked):
                done |= {int(c.request_id.rpartition("/")[2]): c for c in self.engine.poll()}
        except BaseException:  # an interrupt, say: nothing of ours stays open
            self.engine.abort([request.id for request in asked.values()])
            raise
        return done

    def memory_gib(self) -> float:
        """See asking.Asker: engines count this process as well, which others count already."""
        return max(0.0, self.engine.memory_gib() - peak_gib()) if self._closes else 0.0

    def close(self) -> None:
        if self._closes:
            self.engine.close()


def answer_ids(tokenizer: Any, answers: Sequence[str], model: str) -> tuple[int, ...]:
    """The token of each answer. Raises ConfigError when one is several tokens, or two are the same."""
    found: dict[int, str] = {}
    for answer in answers:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        same = found.get(ids[0]) if len(ids) == 1 else None
        if len(ids) != 1 or same is not None:
            pieces = ", ".join(repr(tokenizer.decode([one])) for one in ids)
            raise ConfigError(
                "two answers are the same token" if same is not None else "an answer is not one token of the judge",
                where=f"the template's answers, and the tokenizer of {model}",
                value=f"{answer!r} and {same!r}" if same is not None else f"{answer!r}, which it reads as {pieces}",
                rule="each answer one token of its own: its probability is read",
                remedy="use single letters or digits in the template's answers",
            )
        found[ids[0]] = answer
    return tuple(found)


def special_words(tokenizer: Any) -> re.Pattern[str]:
    """What finds the first character of each special token in a text, wherever one begins."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    words = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    spelt = sorted(re.escape(word) for word in words if len(word) > 1)
    return re.compile(rf"(?=(?:{'|'.join(spelt)}))(.)" if spelt else r"(?!)()", re.DOTALL)


def load_tokenizer(path: str, where: str, trust_remote_code: bool) -> Any:
    """Of the judge. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(Path(path).expanduser()), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError and KeyError for the same thing
        raise ConfigError(
            "no judge could be loaded from there",
            where=where,
            value=f"{path}; transformers says: {' '.join(str(error).split())[:200]}",
            rule="a folder with a Hugging Face checkpoint and its tokenizer, or a hub id that can be reached",
            remedy="give the folder of a model that chats",
        ) from error

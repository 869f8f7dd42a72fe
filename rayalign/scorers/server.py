"""A judge behind HTTP: any server that speaks OpenAI's chat completions and gives log-probs of its top tokens."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from rayalign.errors import ScoreError
from rayalign.record import Unfit, is_secret
from rayalign.scorers.asking import Answer, Question, parted
from rayalign.scorers.cache import USUAL, AnswerCache, key_of, open_cache
from rayalign.scorers.connection import Connection
from rayalign.scorers.engine_asker import answer_ids, load_tokenizer, special_words
from rayalign.scorers.remote import Caller, Failed

ENOUGH = 64  # answers after which one of a few that never came is none that this model gives
IMPOSSIBLE = -9990.0  # what servers write for a probability of 0, as JSON has no infinity
# How the special tokens of most models are written, before the first character: servers parse them wherever they stand.
USUAL_WORDS = re.compile(
    r"(?=<\|[^|<>\s]{1,64}\|>|<｜[^｜<>\s]{1,64}｜>|</?(?:s|bos|eos|pad|unk|(?:start|end)_of_\w{1,16})>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>)(.)",
)
Token = tuple[str, float]


class ServerAsker(Connection):
    """A server that speaks OpenAI's chat completions, as `vllm serve` does.

    An answer's log-prob is that of the first token of the reply. The server says the most likely ones only: an
    answer that is not among them has probability 0. Tokens that differ in white space around them count as one.
    With a reasoning step there are two requests: one that thinks aloud, one that answers.

    Every reply is kept in a file under everything that it depends on (model, the checkpoint that the server says is
    behind that name, revision, messages, sampling), not the address: asked again, by another actor or a resumed run,
    at another port, it costs nothing. A server that does not say what it loaded needs another `revision` when it
    loads other weights under the same name.

    Chat completions are texts, in which a server finds special tokens wherever they are spelt out: an answer could end
    its turn and give the verdict itself. What looks like one, or with `tokenizer` is one, is parted by a space.
    """

    name: Literal["server"] = "server"
    model: str = Field(description="the model's name, as the server lists it", examples=["my-judge"])
    top_logprobs: int = Field(
        20, ge=2, description="most likely tokens whose log-probs are asked for; most servers give 20 at most"
    )
    reasoning_temperature: float = Field(0.0, ge=0, description="of the thinking before the answer; 0 is greedy")
    extra: dict[str, Any] = Field(
        {},
        description="more keys of a request, as {chat_template_kwargs: {enable_thinking: false}}; null takes one out",
    )
    tokenizer: str | None = Field(
        None,
        description="folder or hub id of the model's tokenizer: its special tokens in answers are parted too, not only "
        "those of usual spelling, and the template's answers are checked",
        examples=["/models/my-judge"],
    )
    cache: str | None = Field(USUAL, description="file that keeps the replies; null: none")

    @model_validator(mode="after")
    def _no_key_in_extra(self) -> ServerAsker:
        if _has_secret(self.extra):
            raise Unfit(
                "there is a key or a password among these",
                key="extra",
                rule="what may be written to config.yaml and to logs",
                remedy="take it out, put it into an environment variable, and name that as key_env",
            )
        return self

    def check(self, answers: Sequence[str], *, model: str, trust_remote_code: bool = False) -> None:
        """Whether the answers are tokens of the model, where its tokenizer is named. Raises ConfigError.

        Args:
            model: of the policy; a judge of its own needs it not.
        """
        if self.tokenizer is not None:
            answer_ids(load_tokenizer(self.tokenizer, "key scorer.ask.tokenizer", False), answers, self.tokenizer)

    def start(self) -> Server:
        return Server(self)


class Server:
    """An asker, see `asking.Asker`."""

    def __init__(self, config: ServerAsker, *, place: str = "scorer.ask"):
        self._config, self._place = config, place
        self._caller = Caller(config, place=place)
        self._words = [USUAL_WORDS]
        if config.tokenizer is not None:
            self._words.append(special_words(load_tokenizer(config.tokenizer, f"key {place}.tokenizer", False)))
        self._cache: AnswerCache | None = open_cache(config.cache)
        self._answered = False
        self._root: str | None = None  # the checkpoint; "" where the server does not say
        self._count, self._seen = 0, set[str]()  # answers, and the tokens that they were among

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in the order of the questions.

        Raises:
            ScoreError: nobody answers; or, as long as there was no answer at all, a server that answers or understands
                none of the questions, or gives no log-probs; or an answer is not one token of its model.
        """
        if self._cache is not None and self._root is None and questions:
            self._root = _root(self._caller.look(f"{self._config.url.rstrip('/')}/models"), self._config.model)
        found = self._caller.each(self._answer, questions)
        self._answered = self._answered or any(answer.error is None for answer, _ in found)
        if questions and not self._answered and all(failed is not None and failed.of_any for _, failed in found):
            raise found[0][1].ends or ScoreError(
                "the server answers none of the questions",
                where=f"key {self._place}.url, {self._config.url}",
                value=found[0][0].error,
                rule="chat completions with logprobs and top_logprobs for the model that is named",
                remedy=f"correct {self._place}.model or extra, lower top_logprobs, or use one that gives log-probs",
            )
        for answers in {question.answers for question in questions}:
            self._check_seen(answers)
        return [answer for answer, _ in found]

    def tokenizes(self, answers: Sequence[str]) -> None:
        """See asking.Asker. Of a server that tokenizes, as vLLM's does; of another, one of few answers that never
        comes back while its beginning does ends the judging after a while."""
        address = self._config.url.rstrip("/").removesuffix("/v1") + "/tokenize"
        for answer in answers:
            body = {"model": self._config.model, "prompt": answer, "add_special_tokens": False}
            found = self._caller.look(address, {**body, "return_token_strs": True})
            pieces = found.get("token_strs") if isinstance(found, dict) else None
            if not isinstance(pieces, list):
                return
            words = [piece for piece in map(str, pieces) if piece.strip(" ▁ĠĊ\n")]  # a space of its own is none
            if len(words) > 1:
                raise self._several(f"{answer!r}, which it reads as {', '.join(map(repr, words))}")

    def _check_seen(self, answers: Sequence[str]) -> None:
        """Raises ScoreError when one that was never given is the beginning of nothing but itself."""
        if self._count < ENOUGH or 2 * len(answers) > self._config.top_logprobs:
            return
        for answer in map(str.strip, answers):
            begun = [token for token in self._seen if token and token != answer and answer.startswith(token)]
            if answer not in self._seen and begun:
                longest = max(begun, key=len)
                raise self._several(f"{answer!r}, never among {self._count} replies, though {longest!r} was")

    def _several(self, value: str) -> ScoreError:
        return ScoreError(
            "an answer is not one token of the judge",
            where=f"the template's answers, and the tokenizer of {self._config.model}",
            value=value,
            rule="each answer one token of its own: its probability is read",
            remedy="use single letters or digits in the template's answers",
        )

    def memory_gib(self) -> float:
        return 0.0

    def close(self) -> None:
        self._caller.close()
        if self._cache is not None:
            self._cache.close()

    def _answer(self, question: Question) -> tuple[Answer, Failed | None]:
        """The answer, and why there is none."""
        thought = ""
        try:
            messages = question.messages
            if question.reasoning:
                thought = self._think(question)
                messages = question.concluded(thought)
            body = {**_sampling(1, 1.0), "logprobs": True, "top_logprobs": self._config.top_logprobs}
            tokens = [(str(token), float(logp)) for token, logp in self._reply(messages, body, _top_tokens)]
        except Failed as failed:
            return Answer(question.id, None, thought, str(failed)), failed
        if not tokens:
            return Answer(question.id, None, thought, "it answered nothing"), None
        self._count += 1
        self._seen.update(token.strip() for token, _ in tokens)
        logps = tuple(_logp(tokens, answer) for answer in question.answers)
        return Answer(question.id, logps, thought, unseen=min(logp for _, logp in tokens)), None

    def _think(self, question: Question) -> str:
        body = _sampling(question.reasoning, self._config.reasoning_temperature)
        if self._config.reasoning_temperature:  # the same thought for the same question, as far as a server goes along
            body["seed"] = int(key_of(messages=question.messages)[:7], 16)
        return self._reply(question.messages, body, _text)

    def _reply(self, messages: Sequence[Mapping[str, str]], sampling: dict[str, Any], read: Any) -> Any:
        """What is known of this request, or else what the server says, kept before it is used. Raises Failed."""
        for words in self._words:
            messages = parted(messages, words)
        body = {"model": self._config.model, "messages": list(messages), **sampling, **self._config.extra}
        body = {key: value for key, value in body.items() if value is not None}
        key = key_of(root=self._root, revision=self._config.revision, body=body)
        found = self._cache.get(key) if self._cache is not None else None
        if found is None:
            found = self._caller.post("/chat/completions", body, read)
            if self._cache is not None and found:  # nothing may be something the next time
                self._cache.put(key, found)
        return found


def _has_secret(value: Any, key: str = "") -> bool:
    if isinstance(value, Mapping):
        return any(_has_secret(each, str(name)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return any(_has_secret(each, key) for each in value)
    return is_secret(key, value)


def _root(models: Any, name: str) -> str:
    """Where the weights of this model came from, as vLLM says among its models; "" where a server does not."""
    listed = models.get("data") if isinstance(models, dict) else None
    of_name = (
        each
        for each in (listed if isinstance(listed, list) else ())
        if isinstance(each, dict) and each.get("id") == name
    )
    return str(next(of_name, {}).get("root") or "")


def _sampling(tokens: int, temperature: float) -> dict[str, Any]:
    # top_p is said because servers have defaults of their own; at temperature 1 log-probs are the model's, also
    # where a server reports those of the distribution that it sampled.
    return {"max_tokens": tokens, "temperature": temperature, "top_p": 1.0, "n": 1, "stream": False}


def _choice(reply: Any) -> Mapping[str, Any]:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise Failed(f"a reply without choices: {json.dumps(reply)}", of_any=True)
    return choices[0]


def _text(reply: Any) -> str:
    """What was said; of servers that put thinking apart, that."""
    message = _choice(reply).get("message")
    message = message if isinstance(message, dict) else {}
    said = (message.get(key) for key in ("content", "reasoning", "reasoning_content"))
    return next((text.strip() for text in said if isinstance(text, str) and text.strip()), "")


def _top_tokens(reply: Any) -> list[Token]:
    """The most likely first tokens with their log-probs, the one that was sampled included; none of an empty reply.

    Raises:
        Failed: there are no log-probs, or some are no numbers.
    """
    logprobs = _choice(reply).get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if content is None:
        raise Failed("a reply without logprobs.content", of_any=True)
    if not content:
        return []
    try:
        first = content[0]
        given = [(str(each["token"]), each["logprob"]) for each in first.get("top_logprobs") or ()]
        if first["token"] not in (token for token, _ in given):
            given.append((str(first["token"]), first["logprob"]))
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise Failed(f"logprobs.content in another form: {json.dumps(content)}", of_any=True) from error
    for token, logp in given:
        number = isinstance(logp, int | float) and not isinstance(logp, bool)
        if not number or math.isnan(logp):
            raise Failed(f"the log-prob of {token!r} is {logp}")
    return [(token, float(logp)) for token, logp in given if logp > IMPOSSIBLE]


def _logp(tokens: Sequence[Token], answer: str) -> float:
    """Of all tokens that say this answer, added up as probabilities; −inf where there is none."""
    found = [logp for token, logp in tokens if token.strip() == answer.strip()]
    if not found:
        return -math.inf
    largest = max(found)
    return largest + math.log(sum(math.exp(logp - largest) for logp in found))

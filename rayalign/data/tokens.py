"""Messages → token ids: the prompt as an engine continues it, and an answer with the token that ends it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from rayalign.errors import DataError

Messages = Sequence[dict[str, Any]]
_MARK = "qqmarkqq"  # an answer that no template changes, to see what a template puts behind an answer


class Turns:
    """One tokenizer, with its chat template or without.

    Args:
        chat_template: off: texts are continued as they are, prompt and answer tokenised apart.
        segments: where there is no chat template to apply, make prompt and answer the two segments of an encoder,
            if the tokenizer knows such pairs: [CLS] prompt [SEP] answer [SEP], say.
        variables: of the template, as enable_thinking, with their values.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: bool,
        variables: Mapping[str, Any] = MappingProxyType({}),
        segments: bool = False,
    ):
        self.tokenizer, self.chat_template, self._variables = tokenizer, chat_template, variables
        self._renderer = tokenizer  # what has the chat template
        self.segments = segments and not (chat_template and tokenizer.chat_template) and _knows_pairs(tokenizer)

    def prompt(self, messages: Messages, where: str) -> tuple[int, ...]:
        """What an engine continues. Raises DataError when there is no template, or when it refuses the messages."""
        if self.segments:
            return tuple(self.tokenizer(_as_one(messages))["input_ids"])
        if self.chat_template:
            return self._ids(self._render(messages, where, add_generation_prompt=True))
        text = self.one_text(messages, where)
        ids = list(self.tokenizer(text)["input_ids"])
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if begin is not None and ids[:2] == [begin, begin]:
            del ids[0]
        if len(ids) > 1 and ids[-1] == end and not text.endswith(self.tokenizer.eos_token):
            del ids[-1]  # a tokenizer that ends every text would end the prompt before its answer
        return tuple(ids)

    @staticmethod
    def one_text(messages: Messages, where: str) -> str:
        """A prompt as it is continued without a chat template. Raises DataError for more than one message."""
        if len(messages) == 1:
            return messages[0]["content"]
        raise DataError(
            "without a chat template a prompt is one text",
            where=where,
            value=f"messages of {', '.join(m['role'] for m in messages)}",
            rule="data.chat_template=false continues a text as it stands, and nothing says where a message ends in it",
            remedy="set data.chat_template=true, write each prompt as one text, or take data.system out",
        )

    def answer(self, messages: Messages, text: str, where: str) -> tuple[int, ...]:
        """An answer to these messages, the token that ends it included."""
        if self.segments:
            context = _as_one(messages)
            whole = self.tokenizer(context, text)["input_ids"]
            return tuple(whole[len(self.tokenizer(context)["input_ids"]) :])
        if not self.chat_template:
            return self._ended(text)
        before = self._render(messages, where, add_generation_prompt=True)
        whole = self._render([*messages, {"role": "assistant", "content": text}], where)
        if whole.startswith(before) and whole.endswith(self._closing) and len(whole) >= len(before + self._closing):
            text = whole[len(before) : len(whole) - len(self._closing)]
        return self._ended(text)

    @cached_property
    def end(self) -> tuple[int, ...]:
        """The tokens that end an answer: up to the first special token that the template puts behind an answer,
        else the end-of-sequence token. Empty when the tokenizer has neither."""
        if self.segments:
            return ()
        eos = self.tokenizer.eos_token_id
        behind = self._ids(self._closing) if self.chat_template else ()
        special = {*self.tokenizer.all_special_ids, *_added_special(self.tokenizer), eos}
        for place, token in enumerate(behind):
            if token in special:
                return behind[: place + 1]
        return (eos,) if eos is not None else ()

    @cached_property
    def _closing(self) -> str:
        question = {"role": "user", "content": "a"}
        rendered = self._render([question, {"role": "assistant", "content": _MARK}], "the model's chat template")
        return rendered.rpartition(_MARK)[2] if _MARK in rendered else ""

    @cached_property
    def overhead(self) -> int:
        """Tokens that the template adds to a conversation of one message: more than it adds to each further one."""
        if self.segments:
            return len(self.tokenizer("a", "a")["input_ids"])
        return len(self.prompt([{"role": "user", "content": "a"}], "the model's chat template")) + len(self.end)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides how a text becomes tokens; the same in every process."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
        if backend is not None:  # settings of the last call, which say nothing about the tokens
            words["truncation"] = words["padding"] = None
        known = [type(tokenizer).__name__, words, tokenizer.special_tokens_map, tokenizer.chat_template]
        ways = [self.chat_template, *(["segments"] if self.segments else [])]
        text = json.dumps([*known, *ways], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def begin(self) -> int | None:
        """The token that begins every sequence."""
        return self.tokenizer.cls_token_id if self.segments else self.tokenizer.bos_token_id

    def _ended(self, text: str) -> tuple[int, ...]:
        """With the end token, once: some data sets write it themselves."""
        ids = self._ids(text)
        return ids if self.end and ids[-len(self.end) :] == self.end else (*ids, *self.end)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Messages, where: str, *, add_generation_prompt: bool = False) -> str:
        if not self._renderer.chat_template:
            raise DataError(
                "this model's tokenizer has no chat template",
                where=where,
                value="data.chat_template=true",
                rule="a chat template in the model's folder, or data.chat_template=false",
                remedy="set data.chat_template=false to continue the text, or align a model that chats",
            )
        try:
            return self._renderer.apply_chat_template(
                [{**message, "content": self._content(message["content"])} for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._variables,
            )
        except Exception as error:  # a template is a program: it may refuse roles and their order
            raise DataError(
                "the model's chat template refuses these messages",
                where=where,
                value=f"roles {', '.join(m['role'] for m in messages)}",
                rule=f"what the template takes: {error}",
                remedy="correct the row, or take data.system out when the template knows no system role",
            ) from error

    def _content(self, text: str) -> Any:
        """A message's text as the template takes it."""
        return [{"type": "text", "text": text}] if self._in_parts else text

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the template drops a text that is no list of parts, as those of models that see may do."""
        try:
            rendered = self._renderer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
        except Exception:  # it may refuse what it is asked: it then says so when it is asked in earnest
            return False
        return _MARK not in rendered


def _knows_pairs(tokenizer: Any) -> bool:
    """Whether a pair of texts becomes the tokens of the first, as it would be alone, and then those of the second."""
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        return False
    one, two = (tokenizer(*texts)["input_ids"] for texts in (("a",), ("a", "a")))
    return len(two) > len(one) and two[: len(one)] == one


def _as_one(messages: Messages) -> str:
    """A conversation as one text: each message behind its role, where there are several."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _added_special(tokenizer: Any) -> set[int]:
    """Special tokens that were added without being named in the tokenizer's map, as ends of turns often are."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {index for index, token in added.items() if token.special}

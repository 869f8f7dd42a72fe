"""Judges for tests: tiny llamas whose answer is known, because nothing in them looks at what they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from rayalign.scorers.asking import Answer, Question
from rayalign.scorers.judge import Judge
from rayalign.types import Completion, Group, Prompt
from tests.tiny_models import EOS_ID, build_tokenizer, tiny_config

ENDS = "<eos>"


def build_steady_judge(path: str | Path, probs: dict[str, float]) -> Path:
    """A checkpoint whose next token has these probabilities after any text (the rest is on the token z), NaN included.

    All embeddings are equal and no layer adds anything, so that the last hidden state is always the same, and the
    head's rows are log-probs along it.
    """
    tokenizer, model = build_tokenizer(), LlamaForCausalLM(tiny_config())
    wanted = {_id(tokenizer, token): prob for token, prob in probs.items()}
    rest = 1 - sum(prob for prob in wanted.values() if prob == prob)
    wanted.setdefault(_id(tokenizer, "z"), rest)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        size = model.config.hidden_size
        head = torch.full((model.config.vocab_size,), -60.0)
        for token, prob in wanted.items():
            head[token] = torch.tensor(prob).log().clamp(min=-60.0) if prob == prob else torch.nan
        model.lm_head.weight.copy_((head / size).unsqueeze(1).expand(-1, size))  # the hidden state is all ones
    model.save_pretrained(str(path))
    tokenizer.save_pretrained(str(path))
    return Path(path)


def _id(tokenizer: Any, token: str) -> int:
    return EOS_ID if token == ENDS else tokenizer(token, add_special_tokens=False)["input_ids"][0]


def judge(model: str | Path, **keys: Any) -> Judge:
    """With an engine of its own, on transformers."""
    engine = {"name": "transformers", "max_context": keys.pop("max_context", 2048)}
    return Judge.model_validate(
        {"name": "judge", "ask": {"name": "engine", "model": str(model), "engine": engine}} | keys
    )


class Says:
    """An asker that gives these log-probs to every question, and keeps what it was asked."""

    def __init__(self, *logps: float, **keys: Any):
        self.asked: list[Question] = []
        self._logps, self._keys = logps, keys

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += questions
        return [Answer(question.id, self._logps, **self._keys) for question in questions]

    def tokenizes(self, answers: Sequence[str]) -> None: ...

    def memory_gib(self) -> float:
        return 0.0

    def close(self) -> None: ...


def group(index: int, *texts: str, prompt: str = "write a review") -> Group:
    """Answers with these texts to one prompt."""
    completions = tuple(Completion(f"{index}/{k}", (5, 6 + k), (-1.0, -1.0), "stop", 0) for k in range(len(texts)))
    return Group(f"g{index}", Prompt(index, prompt, (2, 5, 3)), completions, texts)

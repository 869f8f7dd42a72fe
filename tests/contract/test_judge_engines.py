"""A judge's questions on both engines, against a forward pass of the same model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from rayalign.errors import ScoreError, SyncMismatch
from rayalign.protocols import Engine, Roles
from rayalign.scorers.asking import Asker, Question
from rayalign.scorers.engine_asker import EngineAsking
from rayalign.scorers.judge import Judge
from rayalign.scorers.lent import CountedEngine, LentScorer
from rayalign.sync.flat import pack
from rayalign.types import Request, Sampling
from tests.contract.conftest import MAX_CONTEXT
from tests.judges import group

ANSWERS = ("A", "B", "y")


def question(id: str, text: str, *, reasoning: int = 0) -> Question:
    return Question(id, ({"role": "user", "content": text},), ANSWERS, reasoning, "so:" if reasoning else "")


@pytest.fixture
def asking(engine: Engine, tiny_llama: Path) -> EngineAsking:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return EngineAsking(engine, tokenizer, max_context=MAX_CONTEXT, name="tiny", closes=False)


@torch.no_grad()
def forward_answers(model: PreTrainedModel, tiny_llama: Path, messages: list[dict[str, str]]) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    logits = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1].float()
    return logits.log_softmax(-1)[tokenizer.convert_tokens_to_ids(list(ANSWERS))].numpy()


def test_answers_are_the_models_and_in_the_order_of_the_questions(
    asking: EngineAsking, base_model: PreTrainedModel, tiny_llama: Path
) -> None:
    assert isinstance(asking, Asker)
    questions = [question(f"q{index}", "good film " * (index % 4) + f"no {index}") for index in range(20)]
    found = asking.ask(questions)
    assert [answer.id for answer in found] == [each.id for each in questions]
    for each, answer in zip(questions, found, strict=True):
        expected = forward_answers(base_model, tiny_llama, list(each.messages))
        np.testing.assert_allclose(answer.logps, expected, atol=1e-3)
        assert answer.error is None and answer.reasoning == ""


def test_thinking_comes_first_and_what_does_not_fit_is_an_error_of_its_own(
    asking: EngineAsking, base_model: PreTrainedModel, tiny_llama: Path
) -> None:
    long = question("long", "x" * MAX_CONTEXT)
    longer_thought = question("thought", "x" * (MAX_CONTEXT - 20), reasoning=15)  # fits, but not with its conclusion
    thinks, plain = question("thinks", "good or bad", reasoning=8), question("plain", "good or bad")
    found = {answer.id: answer for answer in asking.ask([long, thinks, longer_thought, plain])}
    assert found["long"].logps is None and f"max_context={MAX_CONTEXT}" in found["long"].error
    assert found["thought"].logps is None and found["thought"].error and found["thought"].reasoning
    assert found["thinks"].reasoning and found["thinks"].logps != found["plain"].logps
    for answer, messages in (
        (found["plain"], plain.messages),
        (found["thinks"], thinks.concluded(found["thinks"].reasoning)),
    ):
        expected = forward_answers(base_model, tiny_llama, list(messages))
        np.testing.assert_allclose(answer.logps, expected, atol=1e-3)
        assert sum(map(math.exp, answer.logps)) < 1
    assert asking.ask([]) == []


def test_answers_of_several_tokens_are_refused(asking: EngineAsking) -> None:
    with pytest.raises(ScoreError, match="not one token of the judge"):
        asking.ask([Question("q", ({"role": "user", "content": "?"},), ("A", "no"))])


def test_a_counted_engine_knows_what_is_open(engine: Engine) -> None:
    counted = CountedEngine(engine)
    assert counted.idle and isinstance(counted, Engine) and counted.version == 0
    counted.submit([Request(f"r{index}", (4, 5, 6), Sampling(3, min_tokens=3), index) for index in range(3)])
    assert not counted.idle
    counted.abort(["r2"])
    done = []
    while len(done) < 2:
        done += counted.poll()
    assert counted.idle and {completion.request_id for completion in done} == {"r0", "r1"}


def test_an_engine_that_failed_while_it_judged_samples_only_after_a_load(
    engine: Engine, tiny_llama: Path, base_model: PreTrainedModel
) -> None:
    counted, request = CountedEngine(engine), Request("r", (4, 5, 6), Sampling(1), 0)
    tokenizer, learner = AutoTokenizer.from_pretrained(tiny_llama), object()  # which cannot be pushed
    config = Judge.model_validate({"ask": "policy", "min_mass": 0.0})
    roles = Roles(policy=learner, reference=learner)  # type: ignore[arg-type]
    scorer = LentScorer(config, counted, roles, tokenizer, max_context=MAX_CONTEXT, max_gap=1.0)
    scorer.submit([group(0, "a", "b")])
    with pytest.raises(AttributeError):
        scorer.poll()
    with pytest.raises(SyncMismatch, match="the weights that it judged with"):
        counted.submit([request])
    counted.load(pack(base_model.named_parameters(), 1))
    counted.submit([request])
    assert counted.poll() or counted.poll()

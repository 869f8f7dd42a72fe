"""The judge over HTTP against a real OpenAI-compatible server, vLLM's own, with a tiny random model."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayalign.api import run_training
from rayalign.config import parse_config
from rayalign.errors import ScoreError
from rayalign.scorers.asking import Question
from rayalign.scorers.base import score_groups
from rayalign.scorers.judge import Judge
from rayalign.scorers.server import ServerAsker
from tests.parts import tiny_config
from tests.ranks import free_port
from tests.scored import group
from tests.tiny_models import VOCAB_SIZE, build_tokenizer

pytest.importorskip("vllm")
KEY = "key-of-the-test-server"
START_S = 600.0  # on a busy machine; it is there in under a minute


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """A server of the tiny model; its address. Ended by its own process group."""
    log, port = tmp_path_factory.mktemp("server") / "log", free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "512", "--max-num-seqs", "8", "--max-logprobs", str(VOCAB_SIZE), "--enforce-eager"]
    environment = {
        **os.environ,
        "VLLM_API_KEY": KEY,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(timeout=30)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture
def settings(url, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_KEY", KEY)
    cache = str(tmp_path / "answers.sqlite")
    return {"url": url, "model": "tiny", "key_env": "TINY_KEY", "timeout_s": 120.0, "cache": cache}


@pytest.fixture
def asker(settings):
    started = ServerAsker(**settings, top_logprobs=VOCAB_SIZE).start()
    yield started
    started.close()


def next_logps(model, messages, most: int = VOCAB_SIZE) -> dict[str, float]:
    """By transformers: text of each next token → its log-prob, those that differ in white space added up."""
    tokenizer = build_tokenizer()
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        logps = AutoModelForCausalLM.from_pretrained(model).eval()(input_ids=ids).logits[0, -1].log_softmax(-1)
    kept = torch.topk(logps, most).indices.tolist()
    found: dict[str, float] = {}
    for token in kept:
        name = tokenizer.decode([token]).strip()
        found[name] = math.log(math.exp(found.get(name, -math.inf)) + logps[token].exp().item())
    return found


def question(text: str, answers: tuple[str, ...], reasoning: int = 0) -> Question:
    return Question(text, ({"role": "user", "content": text},), answers, reasoning, "So which one?")


def test_log_probs_are_the_models_own_and_those_that_are_not_given_back_are_impossible(settings, model):
    asker = ServerAsker(**settings, top_logprobs=20).start()
    for text in ("is it good", "a or b", "write"):
        want = next_logps(model, question(text, ()).messages, most=20)
        answers = tuple(name for name in want if name)[:4]
        (found,) = asker.ask([question(text, (*answers, "no token of it"))])
        assert found.error is None
        assert found.logps[:-1] == pytest.approx([want[answer] for answer in answers], abs=1e-3)
        assert found.logps[-1] == -math.inf and sum(map(math.exp, found.logps)) <= 1 + 1e-6
    asker.close()


def test_many_questions_come_back_in_their_order_and_are_not_asked_twice(asker, settings, model):
    asked = [question(f"film number {index}", ("a", "b")) for index in range(40)]
    found = asker.ask(asked)
    assert [each.id for each in found] == [each.id for each in asked]
    assert len({each.logps for each in found}) > 10 and all(each.error is None for each in found)
    elsewhere = ServerAsker(**settings, top_logprobs=VOCAB_SIZE).start()
    assert elsewhere.ask(asked[:1]) == found[:1] and elsewhere._root == str(model)
    elsewhere._caller.close()  # nobody can be asked any more
    assert elsewhere.ask(asked) == found
    elsewhere.close()


def test_an_answer_of_several_tokens_is_told_before_anything_is_asked(asker, model):
    tokenizer = build_tokenizer()
    asker.tokenizes([name for name in ("a", "b", "1", "2") if len(tokenizer(name)["input_ids"]) == 1])
    several = "what a film this is"
    assert len(tokenizer(several)["input_ids"]) > 1
    with pytest.raises(ScoreError, match="not one token"):
        asker.tokenizes(["a", several])


def test_a_reasoning_step_is_thought_and_then_answered(asker, model):
    (found,) = asker.ask([question("why is it good", ("a", "b"), reasoning=12)])
    assert found.error is None and found.reasoning
    concluded = question("why is it good", (), 12).concluded(found.reasoning)
    want = next_logps(model, concluded)
    assert found.logps == pytest.approx([want["a"], want["b"]], abs=1e-3)


def test_a_question_beyond_the_context_costs_only_its_answer(asker):
    found = asker.ask([question("good", ("a", "b")), question("x" * 600, ("a", "b"))])
    assert found[0].error is None and found[1].logps is None
    assert found[1].error.startswith("status 400") and "512" in found[1].error


@pytest.mark.parametrize(
    ("change", "what", "part"),
    [
        ({"model": "another"}, "the server refuses", "status 404"),
        ({"key_env": None}, "the server refuses", "status 401"),
        ({"top_logprobs": VOCAB_SIZE + 1}, "the server answers none of the questions", "status 400"),
    ],
    ids=["model", "key", "top_logprobs"],
)
def test_what_the_server_does_not_take_ends_it_with_what_it_says(settings, change, what, part):
    started = ServerAsker(**{**settings, **change}).start()
    with pytest.raises(ScoreError) as raised:
        started.ask([question("good", ("a", "b"))])
    started.close()
    assert raised.value.what == what and part in raised.value.value and KEY not in str(raised.value)


def judge(ask, **keys) -> Judge:
    return Judge.model_validate({"name": "judge", "ask": ask, "min_mass": 0.0, "tie_margin": 0.0, **keys})


@pytest.mark.parametrize("keys", [{}, {"mode": "direct"}], ids=["pairwise", "direct"])
def test_the_judge_over_http_is_the_judge_with_an_engine_of_its_own(settings, model, keys):
    groups = [group(0, "a good film", "awful", "I love it"), group(1, "sad", "happy")]
    engine = {"name": "transformers", "max_context": 512}
    asks = (
        {"name": "engine", "model": str(model), "engine": engine},
        {"name": "server", **settings, "top_logprobs": VOCAB_SIZE},
    )
    found = []
    for ask in asks:
        score = judge(ask, **keys).start()
        found.append(score_groups(score, groups, who="scorer-0"))
        score.close()
    for own, over in zip(*found, strict=True):
        assert over.scores == pytest.approx(own.scores, abs=2e-3) and len(set(over.scores)) > 1
        assert over.metrics.keys() == own.metrics.keys() and over.metrics["judge/refused"] == 0.0
        for row, other in zip(over.preferences or (), own.preferences or (), strict=True):
            assert row == pytest.approx(other, abs=2e-3)


def test_a_training_judged_over_http_leaves_the_key_nowhere(settings, tmp_path, model):
    ask = {"name": "server", **settings, "top_logprobs": VOCAB_SIZE}
    scorer = {"name": "judge", "ask": ask, "min_mass": 0.0}
    config = tiny_config(tmp_path, model, scorer=scorer, train__steps=1, rollout__prompts=2, algorithm__samples=2)
    result = run_training(parse_config(config))
    record = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert record["judge/refused"] == 0.0 and 0 <= record["judge/order_dependent"] <= 1
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5 and not [path for path in written if KEY.encode() in path.read_bytes()]
    assert "key_env: TINY_KEY" in (result.run_dir / "config.yaml").read_text()

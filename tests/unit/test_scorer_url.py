"""The scorer `url` against a real HTTP server: batches, retries, and replies that are no scores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from rayalign.api import run_training
from rayalign.checks import check_scorer
from rayalign.config import parse_config
from rayalign.errors import ConfigError, ScoreError
from rayalign.scorers.base import score_groups
from rayalign.scorers.url import Url
from tests.http_service import Reply, serving
from tests.parts import tiny_config
from tests.ranks import free_port
from tests.scored import group

ROOT = Path(__file__).resolve().parents[2]


def lengths(body, before):
    return Reply({"scores": [float(len(text)) for text in body["completions"]]})


def scores(url: str, groups, **settings):
    score = Url(url=url, **{"backoff_s": 0.001, "timeout_s": 30.0, **settings}).start()
    try:
        return [each.scores for each in score_groups(score, groups, who="scorer-0")]
    finally:
        score.close()


GROUPS = [group(0, "a", "bb", "", topic="films"), group(1, "cccc", topic=None)]


def test_texts_go_out_in_batches_and_numbers_come_back_in_order():
    with serving(lengths) as service:
        assert scores(f"{service.url}/score", GROUPS, max_batch=3, concurrency=1) == [(1.0, 2.0, 0.0), (4.0,)]
    assert service.asked == [
        {"path": "/score", "prompts": ["prompt 0"] * 3, "completions": ["a", "bb", ""], "columns": {}},
        {"path": "/score", "prompts": ["prompt 1"], "completions": ["cccc"], "columns": {}},
    ]


def test_columns_that_are_named_go_along_and_a_list_alone_is_a_reply():
    with serving(lambda body, before: Reply([1, 2, 3, 4])) as service:
        assert scores(service.url, GROUPS, columns=("topic",)) == [(1.0, 2.0, 3.0), (4.0,)]
    assert service.asked[0]["columns"] == {"topic": ["films", "films", "films", None]}


def test_a_column_that_is_not_there():
    with serving(lengths) as service, pytest.raises(ScoreError) as raised:
        scores(service.url, GROUPS, columns=("stars",))
    assert raised.value.what == "a prompt has no column 'stars'" and raised.value.value == "prompt 0 has topic"
    assert service.asked == []


def test_no_groups_ask_nothing():
    with serving(lengths) as service:
        assert scores(service.url, []) == [] and service.asked == []


def test_the_key_is_sent(monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "abc")
    with serving(lengths) as service:
        scores(service.url, GROUPS, key_env="REWARD_KEY")
    assert service.headers[0]["Authorization"] == "Bearer abc"


@pytest.mark.parametrize("mixed", [False, True])
def test_a_key_that_is_not_there_is_said_before_anything_is_started(tmp_path, model, monkeypatch, mixed):
    monkeypatch.delenv("REWARD_KEY", raising=False)
    url = {"name": "url", "url": "http://127.0.0.1:9", "key_env": "REWARD_KEY"}
    parts = [{"scorer": {"name": "url", "url": "http://127.0.0.1:8"}, "label": "free"}, {"scorer": url}]
    scorer = {"name": "mix", "scorers": parts} if mixed else url
    with pytest.raises(ConfigError, match="the key for the server is not there") as raised:
        check_scorer(parse_config(tiny_config(tmp_path, model, scorer=scorer)))
    assert raised.value.where == f"key {'scorer.scorers.1.scorer' if mixed else 'scorer'}.key_env"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_scorer(parse_config(tiny_config(tmp_path, model, scorer=scorer)))  # the nodes there may have it


def test_a_busy_service_is_asked_again():
    with serving(lambda body, n: lengths(body, n) if n > 1 else Reply(b"", status=503)) as service:
        assert scores(service.url, GROUPS) == [(1.0, 2.0, 0.0), (4.0,)] and len(service.asked) == 3


def test_scores_are_kept_where_the_config_says_and_only_new_texts_are_sent(tmp_path):
    cache = str(tmp_path / "scores.sqlite")
    with serving(lengths) as service:
        first = scores(service.url, GROUPS, cache=cache)
        assert scores(service.url, [*GROUPS, group(2, "x")], cache=cache) == [*first, (1.0,)]
        assert [each["completions"] for each in service.asked] == [["a", "bb", "", "cccc"], ["x"]]
        scores(service.url, GROUPS, cache=cache, columns=("topic",))  # another question
        assert len(service.asked) == 3


def test_scores_of_a_revision_are_kept_wherever_the_service_runs(tmp_path):
    cache = str(tmp_path / "scores.sqlite")
    with serving(lengths) as first, serving(lengths) as second:
        scores(first.url, GROUPS, cache=cache, revision="1")
        scores(second.url, GROUPS, cache=cache, revision="1")
        assert second.asked == []
        scores(second.url, GROUPS, cache=cache, revision="2")
        scores(second.url, GROUPS, cache=cache)
        assert len(second.asked) == 2


def test_what_was_scored_before_the_service_went_down_is_kept(tmp_path):
    cache = str(tmp_path / "scores.sqlite")

    def answer(body, before):
        return lengths(body, before) if before < 1 else Reply(b"", status=500)

    with serving(answer) as service:
        settings = {"cache": cache, "max_batch": 2, "concurrency": 1, "retries": 0}
        with pytest.raises(ScoreError, match="does not answer"):
            scores(service.url, GROUPS, **settings)
        with pytest.raises(ScoreError):
            scores(service.url, GROUPS, **settings)
        assert [each["completions"] for each in service.asked] == [["a", "bb"], ["", "cccc"], ["", "cccc"]]


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (Reply({"scores": [1.0]}), "1 scores for 4 completions"),
        (Reply({"score": 1.0}), "a reply without scores: score"),
        (Reply(b'{"scores": [1, 2, NaN, 4]}'), "the score of completion 2 of the request is NaN"),
        (Reply({"scores": [1, "2", 3, 4]}), 'the score of completion 1 of the request is "2"'),
        (Reply({"scores": [True, 2, 3, 4]}), "the score of completion 0 of the request is true"),
        (Reply({"error": "at most 2 texts"}, status=413), "status 413: at most 2 texts"),
    ],
    ids=["too-few", "another-key", "nan", "text", "true", "413"],
)
def test_a_reply_that_is_no_scores_ends_the_run(given, value):
    with serving(lambda body, before: given) as service, pytest.raises(ScoreError) as raised:
        scores(service.url, GROUPS)
    error = raised.value
    assert error.what == "the service gave no usable scores" and error.value == value
    assert error.where == f"key scorer.url, {service.url}" and "each of 4 completions" in error.rule


def test_a_service_that_is_down_ends_the_run():
    with pytest.raises(ScoreError, match="does not answer") as raised:
        scores(f"http://127.0.0.1:{free_port()}", GROUPS, retries=1)
    assert "start the server" in raised.value.remedy


def test_an_address_that_is_none():
    with pytest.raises(ValidationError, match="no address of a server"):
        Url(url="my-service:9000/score")


def test_a_run_goes_on_with_the_service_elsewhere_and_with_other_columns_it_does_not(tmp_path, model):
    def config(service, steps, **more):
        scorer = {"name": "url", "url": service.url, "timeout_s": 60.0 + steps, **more.pop("scorer", {})}
        return parse_config(tiny_config(tmp_path, model, scorer=scorer, train__steps=steps) | more)

    with serving(lengths) as first:
        assert run_training(config(first, 1)).step == 1
    with serving(lengths) as second:
        assert run_training(config(second, 2, resume=True)).step == 2
        assert second.url != first.url and len(second.asked) >= 1
        with pytest.raises(ConfigError, match="cannot change when a run is resumed") as raised:
            run_training(config(second, 3, resume=True, scorer={"columns": ["topic"]}))
    assert raised.value.where == "key scorer.columns"


def test_the_service_that_is_shipped(monkeypatch):
    port = free_port()
    command = [sys.executable, str(ROOT / "configs" / "reward_service.py"), str(port)]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = service.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}/score"
        (found,) = scores(address, [group(0, "a great film, I love it", "awful", "")], retries=8, backoff_s=0.2)
    finally:
        service.terminate()
        service.wait(timeout=30)
        service.stdout.close()
    assert found[0] > 0.5 > 0 == found[2] > found[1]

"""The asker `server` against a server that is slow, gone or has no time; and keys, which nobody else is told."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import ValidationError

from rayalign.errors import ConfigError, ScoreError
from rayalign.scorers.remote import _wait_of
from rayalign.scorers.server import ServerAsker
from tests.chat_server import GOOD, questions
from tests.http_service import Reply, serving
from tests.ranks import free_port

KEY = "sk-nobody-may-read-this"


# Retries.


@pytest.mark.parametrize(
    "trouble",
    [
        Reply({"error": {"message": "slow down"}}, status=429),
        Reply({"error": "busy"}, status=503, headers={"Retry-After": "0"}),
        Reply(b"Internal Server Error", status=500),
        Reply(GOOD, sent=30),
        Reply(b'{"choices": [{"message": {"con'),
        Reply(b"", sent=0, headers={"Content-Length": "10"}),
        Reply(GOOD, pause_s=0.05),
    ],
    ids=["429", "503", "500", "half-a-body", "half-a-json", "nothing", "slow"],
)
def test_a_server_in_trouble_is_asked_again(asker, trouble):
    with serving(lambda body, before: trouble if before < 2 else Reply(GOOD)) as service:
        (found,) = asker(service.url, timeout_s=1.5 if trouble.pause_s else 30.0).ask(questions(1))
        assert found.error is None and found.logps is not None
        assert len(service.asked) >= 3  # one more, should this machine be as slow as the server


def test_one_bad_question_is_one_refusal_whatever_the_server_calls_it(asker):
    def answer(body, before):
        bad = body["messages"][0]["content"] == "question 1"
        return Reply({"error": "upstream Connection reset: ConnectTimeout"}, status=500) if bad else Reply(GOOD)

    with serving(answer) as service:
        found = asker(service.url, retries=1, concurrency=1).ask(questions(3))
    assert [each.error is None for each in found] == [True, False, True]


def test_a_server_that_has_no_time_is_asked_when_it_says_and_by_nobody_before(asker):
    def answer(body, before):
        return Reply({"error": "slow down"}, status=429, headers={"Retry-After": "1"}) if before < 1 else Reply(GOOD)

    with serving(answer) as service:
        server, waits = asker(service.url, concurrency=1, retries=0), []
        wait = server._caller._stop.wait
        server._caller._stop.wait = lambda seconds: waits.append(seconds) or wait(seconds)
        assert all(each.error is None for each in server.ask(questions(2))) and len(service.asked) == 3
    assert sum(seconds > 0.9 for seconds in waits) == 1  # by the one that was told; the other came after


def test_a_server_that_asks_for_more_patience_than_there_is_is_not_waited_for(asker):
    busy = Reply({"error": "slow down"}, status=429, headers={"Retry-After": "3600"})
    with serving(lambda body, before: busy) as service, pytest.raises(ScoreError) as raised:
        asker(service.url).ask(questions(2))
    assert "asked again in 3600 s" in raised.value.value and "raise patience_s" in raised.value.remedy


@pytest.mark.parametrize(
    ("header", "seconds"), [("0", 0), ("nan", 0), ("inf", 0), ("-3", 0), ("120", 120), ("soon", 0), (None, 0)]
)
def test_what_a_server_asks_for(header, seconds):
    assert _wait_of(header) == seconds


def test_a_server_that_was_there_and_is_gone_is_waited_for(asker, caplog):
    port = free_port()
    with serving(lambda body, before: Reply(GOOD), port=port) as service:
        server = asker(service.url, retries=0, backoff_s=0.05, concurrency=2)
        server.ask(questions(1))
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(server.ask, questions(4))
        while "waiting for it" not in caplog.text and not asked.done():
            time.sleep(0.01)
        with serving(lambda body, before: Reply(GOOD), port=port):
            assert all(each.error is None for each in asked.result(timeout=30))
    assert service.url in caplog.text


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (
            Reply({"error": {"message": "slow down"}}, status=429),
            ["status 429: slow down (the last of 1 try in 0 s)", "raise patience_s"],
        ),
        (Reply(b"oops", status=500), ["status 500: oops", "look at the server's log"]),
        (Reply(GOOD, sent=30), ["RemoteProtocolError", "look at the server's log"]),
        (Reply(b'{"choices": [{'), ["no JSON, or half of it", "look at the server's log"]),
        (Reply(GOOD, pause_s=0.05), ["0.3 s", "raise timeout_s"]),
    ],
    ids=["429", "500", "half-a-body", "half-a-json", "slow"],
)
def test_a_server_that_stays_in_trouble_ends_it(asker, trouble, says):
    with serving(lambda body, before: trouble) as service, pytest.raises(ScoreError) as raised:
        timeout_s = 0.3 if "0.3 s" in says else 30.0
        asker(service.url, retries=1, patience_s=0, timeout_s=timeout_s).ask(questions(2))
    text = str(raised.value)
    assert text.startswith(f"key scorer.ask.url, {service.url}: the server does not answer")
    assert "(the last of 2 tries in " in text or trouble.status == 429
    assert all(part in text for part in says), text


def test_a_server_that_is_down_ends_it(asker):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ScoreError) as raised:
        asker(url, retries=2).ask(questions(40))
    error = raised.value
    assert error.where == f"key scorer.ask.url, {url}" and "Connect" in error.value
    assert error.remedy == "start the server, or correct the url; what was answered before is kept"


def test_one_question_that_a_server_cannot_answer_costs_only_that_answer(asker):
    def answer(body, before):
        return Reply(b"", status=500) if body["messages"][0]["content"] == "question 2" else Reply(GOOD)

    with serving(answer) as service:
        found = asker(service.url, retries=2, concurrency=2).ask(questions(12))
    assert [each.id for each in found if each.error] == ["q2"]
    assert found[2].logps is None and found[2].error == "status 500: nothing, 3 times"


def test_a_server_that_breaks_down_later_ends_it_and_what_it_had_answered_is_kept(asker):
    with serving(lambda body, before: Reply(GOOD) if before < 5 else Reply(b"", status=500)) as service:
        server = asker(service.url, retries=0, concurrency=1)
        assert all(each.error is None for each in server.ask(questions(3)))
        with pytest.raises(ScoreError, match="does not answer"):
            server.ask(questions(30))
        assert len(service.asked) == 9  # five answers, four failures in a row
        assert all(each.error is None for each in asker(service.url).ask(questions(5)))
        assert len(service.asked) == 9


# Keys.


@pytest.mark.parametrize(
    ("status", "part"), [(401, "that key_env names"), (403, "a key that may"), (404, "correct the url")]
)
def test_a_server_that_refuses_ends_it_at_once_and_never_shows_the_key(asker, monkeypatch, caplog, status, part):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    said = Reply({"error": {"message": f"not with {KEY}"}}, status=status)
    with serving(lambda body, before: said) as service, pytest.raises(ScoreError) as raised, caplog.at_level("DEBUG"):
        asker(service.url, key_env="JUDGE_KEY", concurrency=1).ask(questions(9))
    assert service.headers[0]["Authorization"] == f"Bearer {KEY}" and len(service.asked) == 1
    assert f"status {status}: not with ***" in str(raised.value) and part in raised.value.remedy
    assert KEY not in repr(raised.value) + str(raised.value) + caplog.text


@pytest.mark.parametrize(
    "trouble",
    [
        Reply({"error": f"Incorrect API key provided: {KEY}"}),
        Reply({"error": {"message": "x" * 149 + KEY}}, status=401),
        Reply({"error": {"message": f"not {KEY}"}}, status=500),
        Reply({"choices": [{"logprobs": {"content": [{"token": KEY}]}}]}),
        Reply(b"", status=302, headers={"Location": f"http://elsewhere/v1?k={KEY}"}),
    ],
    ids=["200", "cut", "500", "logprobs", "location"],
)
def test_no_part_of_the_key_is_shown_whatever_a_server_says(asker, monkeypatch, caplog, trouble):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        serving(lambda body, before: trouble) as service,
        pytest.raises(ScoreError) as raised,
        caplog.at_level("DEBUG"),
    ):
        asker(service.url, key_env="JUDGE_KEY", retries=0).ask(questions(1))
    assert KEY[:6] not in repr(raised.value) + str(raised.value) + caplog.text


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk-ключ", "sk-\x07"])
def test_a_key_that_cannot_be_sent_is_not_repeated(asker, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ConfigError, match="cannot be sent") as raised:
        asker("http://127.0.0.1:9", key_env="JUDGE_KEY")
    assert "sk-" not in str(raised.value)


def test_a_refused_request_without_a_key_says_how_one_is_given(asker):
    with serving(lambda body, before: Reply({}, status=401)) as service, pytest.raises(ScoreError) as raised:
        asker(service.url).ask(questions(1))
    assert raised.value.remedy == "put the server's key into an environment variable, and name that as key_env"


def test_the_key_is_in_no_file(asker, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lambda body, before: Reply(GOOD)) as service:
        server = asker(service.url, key_env="JUDGE_KEY")
        server.ask(questions(2))
        server.close()
    assert (tmp_path / "answers.sqlite").stat().st_size
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert KEY not in str(server._config.model_dump()) + repr(server._config)


@pytest.mark.parametrize("value", [None, "", " "])
def test_a_key_that_is_not_there_is_said_before_anything_is_asked(asker, monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ConfigError) as raised:
        asker("http://127.0.0.1:9", key_env="JUDGE_KEY")
    assert raised.value.where == "key scorer.ask.key_env"
    assert "on each node before `ray start`" in raised.value.rule


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": "127.0.0.1:8000"}, "no address of a server"),
        ({"url": "ftp://host/v1"}, "no address of a server"),
        ({"url": "http://host:99999/v1"}, "no address of a server"),
        ({"url": "http://ho st/v1"}, "no address of a server"),
        ({"url": "http://ü..ü/v1"}, "no address of a server"),
        ({"url": "http://host/score?code=4711"}, "or what may be one"),
        ({"extra": {"extra_headers": {"x-api-key": KEY}}}, "a key or a password among these"),
        ({"key_env": "hf_AbCdEf"}, "no name of an environment variable"),
        ({"url": f"http://me:{KEY}@host/v1"}, "a password or a key in it"),
        ({"url": f"http://host/v1?api_key={KEY}"}, "a password or a key in it"),
        ({"key_env": KEY}, "no name of an environment variable"),
    ],
    ids=str,
)
def test_a_config_that_could_not_work_or_would_show_a_key_is_refused(settings, says):
    with pytest.raises(ValidationError, match=says):
        ServerAsker(**{"url": "http://host/v1", "model": "judge", **settings})

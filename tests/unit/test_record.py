"""What every record, and plain data made of them, can do."""

from __future__ import annotations

import pickle

import pytest

from rayalign.record import Unfit, flat, is_secret, redacted


def test_what_is_wrong_with_a_record_crosses_processes_whole():
    found = pickle.loads(pickle.dumps(Unfit("no such module", rule="one", remedy="install it", key="function")))
    assert (str(found), found.rule, found.remedy, found.key) == ("no such module", "one", "install it", "function")


def test_nested_sections_become_dotted_keys():
    assert flat({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_what_opens_doors_is_taken_out():
    config = {
        "scorer": {
            "name": "judge",
            "api_key": "sk-1",
            "key": "k",
            "hf_token": "t",
            "url": "https://bob:pw@host/v1?a=@b",
        },
        "trackers": [{"name": "mlflow", "tracking_uri": "http://bob:hunter2@host:5000", "password": "p"}],
        "data": {"prompt_column": "prompt", "tokenizer": "x", "max_tokens": 5, "keys": ["a"]},
        "token": None,
    }
    assert redacted(config) == {
        "scorer": {
            "name": "judge",
            "api_key": "***",
            "key": "***",
            "hf_token": "***",
            "url": "https://***@host/v1?a=***",
        },
        "trackers": [{"name": "mlflow", "tracking_uri": "http://***@host:5000", "password": "***"}],
        "data": {"prompt_column": "prompt", "tokenizer": "x", "max_tokens": 5, "keys": ["a"]},
        "token": None,
    }


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("http://bob:p@ss@host/x", "http://***@host/x"),
        ("http://bob:a/b@host", "http://***@host"),
        ("https://host/v1?model=a&api_key=sk-1&n=2", "https://host/v1?model=a&api_key=***&n=2"),
        ("https://host/a?x=b@c", "https://host/a?x=b@c"),
        ({"credentials": {"user": "bob", "pin": 1}}, {"credentials": "***"}),
        ({"headers": {"Authorization": "Bearer 1"}}, {"headers": {"Authorization": "***"}}),
        ({"url": "https://host/score?code=4711&x"}, {"url": "https://host/score?code=***&***"}),
        ({"extra_headers": {"x-api-key": "sk-1"}}, {"extra_headers": {"x-api-key": "***"}}),
        ({"password": 1234}, {"password": "***"}),
        ({"monkey": "x", "prompt_tokens": 3, "author": "y"}, {"monkey": "x", "prompt_tokens": 3, "author": "y"}),
    ],
)
def test_secrets_in_odd_places(given, seen):
    assert redacted(given) == seen


def test_what_a_message_does_not_repeat():
    assert all(is_secret(key, "x") for key in ("key", "api_key", "OPENAI_API_KEY", "apikey", "hf_token", "password"))
    assert not any(
        is_secret(key, "X") for key in ("prompt_key", "keys", "chosen_key", "token_ids", "monkey", "key_env")
    )
    assert (
        is_secret("key_env", "sk-4711")
        and is_secret("key_env", "hf_AbCd")
        and not is_secret("key_env", "MY_KEY")
        and not is_secret("key", "")
    )
    assert redacted({"ask": {"key_env": "sk-4711", "other_env": "MY_KEY"}}) == {
        "ask": {"key_env": "***", "other_env": "MY_KEY"}
    }

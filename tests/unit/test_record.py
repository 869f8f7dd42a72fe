"""What every record, and plain data made of them, can do."""

from __future__ import annotations

from rayalign.record import flat, redacted


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
            "url": "https://***@host/v1?a=@b",
        },
        "trackers": [{"name": "mlflow", "tracking_uri": "http://***@host:5000", "password": "***"}],
        "data": {"prompt_column": "prompt", "tokenizer": "x", "max_tokens": 5, "keys": ["a"]},
        "token": None,
    }

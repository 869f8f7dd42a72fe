"""The cache of answers: shared by threads, processes and runs, and harmless when its file is damaged."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rayalign.scorers.cache import AnswerCache, key_of, open_cache

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys
from rayalign.scorers.cache import AnswerCache
cache = AnswerCache(sys.argv[1])
for index in range(40):
    cache.put(f"{sys.argv[2]}-{index}", [index])
    cache.put("shared", index)
print(len(cache), flush=True)
import os
os._exit(9)  # killed: nothing is closed
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "answers.sqlite"


def test_the_key_is_of_all_that_is_asked_and_of_nothing_else():
    asked = {"url": "u", "body": {"model": "m", "messages": [{"role": "user", "content": "é\ud800"}]}}
    assert key_of(**asked) == key_of(body=asked["body"], url="u")
    assert len({key_of(**asked), key_of(**{**asked, "url": "v"}), key_of(**{**asked, "body": {}})}) == 3


def test_what_is_put_is_there_for_the_next_one(path):
    cache = AnswerCache(path)
    assert cache.get("a") is None and len(cache) == 0
    answers = [[["A", -0.5], ["é\ud800", -2.0]], "", "a thought\n", 1.5, {}]
    for index, answer in enumerate(answers):
        cache.put(str(index), answer)
    cache.put("0", answers[0])
    other = AnswerCache(path)  # while the first is open
    assert [other.get(str(index)) for index in range(5)] == answers and len(other) == 5
    cache.close()
    other.close()


def test_threads_write_at_once(path):
    cache = AnswerCache(path)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda index: cache.put(str(index), index), range(100)))
        assert list(threads.map(lambda index: cache.get(str(index)), range(100))) == list(range(100))
    cache.close()


def test_processes_write_at_once_and_a_killed_one_loses_nothing(path):
    path.parent.mkdir()
    started = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    assert [process.wait(timeout=120) for process in started] == [9, 9]
    for process in started:
        process.stdout.close()
    cache = AnswerCache(path)
    assert len(cache) == 81 and cache.get("shared") == 39
    assert [cache.get(f"{name}-{index}") for name in "ab" for index in range(40)] == [[i] for i in range(40)] * 2
    cache.close()


@pytest.mark.parametrize("damage", ["words", "cut", "page"])
def test_a_damaged_file_is_moved_aside_and_a_new_one_begun(path, damage, caplog):
    cache = AnswerCache(path)
    for index in range(500):
        cache.put(str(index), "x" * 50)
    cache.close()
    raw = bytearray(path.read_bytes())
    raw[4096:8192] = b"\xff" * 4096
    path.write_bytes({"words": b"these are no answers" * 300, "cut": bytes(raw[: len(raw) // 2]), "page": raw}[damage])
    again = AnswerCache(path)
    assert again.get("3") is None and "damaged" in caplog.text
    again.put("3", 4)
    assert again.get("3") == 4 and len(again) == 1
    again.close()
    assert len(list(path.parent.glob("answers.sqlite.damaged-*"))) == 1


def test_where_nothing_can_be_written_answers_are_known_until_the_end(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    cache = AnswerCache(tmp_path / "file" / "answers.sqlite")
    cache.put("a", 1)
    assert cache.get("a") == 1 and cache.get("b") is None and len(cache) == 1
    assert "kept in memory only" in caplog.text
    cache.close()


def test_none_is_no_cache():
    assert open_cache(None) is None

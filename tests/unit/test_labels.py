"""Rows of a labelling: every way to write them, what is left out, and shards that are whole or not there."""

from __future__ import annotations

import json
import resource
import signal
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayalign.data.config import DataConfig
from rayalign.data.examples import load_examples
from rayalign.data.labels import read_shard, record_of, rows_of, write_lines, write_shard
from rayalign.errors import CheckpointError, DataError
from rayalign.types import Completion, Group, Prompt
from tests.tiny_models import EOS_ID, build_tokenizer


def record(completions, scores, preferences=None, *, truncated=(), index=0):
    cut = [place in truncated for place in range(len(completions))]
    return {
        "prompt_index": index,
        "prompt": "q",
        "completions": completions,
        "truncated": cut,
        "tokens": [1] * len(completions),
        "scores": scores,
        "preferences": preferences,
        "metrics": {},
    }


ABC = record(["a", "b", "c"], [1.0, 3.0, 1.0])
MATRIX = [[0.5, 0.9, 0.5], [0.1, 0.5, 0.3], [0.5, 0.7, 0.5]]


def test_each_way_to_write_a_prompt():
    assert rows_of(ABC, None)[0] == [{"prompt": "q", "completions": ["a", "b", "c"], "scores": [1.0, 3.0, 1.0]}]
    assert rows_of(ABC, "best")[0] == [{"prompt": "q", "completion": "b", "score": 3.0}]
    pairs, left_out = rows_of(ABC, "pairs")
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("b", "a"), ("b", "c")]
    assert left_out == {"ties": 1} and all("probability" not in row for row in pairs)


def test_a_scorer_that_compares_is_asked_of_each_pair():
    compared = record(["a", "b", "c"], [1.0, 3.0, 1.0], MATRIX)
    pairs, left_out = rows_of(compared, None)
    assert pairs == [
        {"prompt": "q", "chosen": "a", "rejected": "b", "probability": 0.9, "inferred": False},
        {"prompt": "q", "chosen": "c", "rejected": "b", "probability": 0.7, "inferred": False},
    ]
    assert left_out == {"ties": 1}
    read = json.loads(json.dumps({**compared, "inferred": ((1, 2),)}))  # as a shard has it
    assert [row["inferred"] for row in rows_of(read, None)[0]] == [False, True]
    assert rows_of(compared, "ranked")[0][0]["scores"] == [1.0, 3.0, 1.0]


def test_what_makes_no_row_is_counted():
    odd = record(["", "  \n", "a", "b", "a", "long"], [9.0, 9.0, 1.0, 2.0, 3.0, 5.0], truncated=[5])
    rows, left_out = rows_of(odd, "ranked", drop_truncated=True)
    assert rows == [{"prompt": "q", "completions": ["a", "b"], "scores": [1.0, 2.0]}]
    assert left_out == {"empty answers": 2, "truncated answers": 1, "answers that are there twice": 1}
    assert rows_of(odd, "best")[0][0]["completion"] == "long"
    assert rows_of(record(["", ""], [0.0, 0.0]), "best") == ([], {"empty answers": 2, "prompts without an answer": 1})
    alike = rows_of(record(["a", "b"], [1.0, 1.0]), "ranked")
    assert alike == ([], {"prompts whose answers are all as good": 1})


@given(st.lists(st.tuples(st.text(), st.floats(-9, 9)), min_size=1, max_size=6), st.sampled_from(["ranked", "pairs"]))
def test_rows_have_answers_that_differ_and_one_that_is_better(answers, write):
    texts, scores = [text for text, _ in answers], [score for _, score in answers]
    rows, _ = rows_of(record(texts, scores), write)
    for row in rows:
        if write == "ranked":
            assert len(set(row["completions"])) == len(row["completions"]) >= 2 and len(set(row["scores"])) > 1
        else:
            assert row["chosen"].strip() and row["rejected"].strip() and row["chosen"] != row["rejected"]
            assert scores[texts.index(row["chosen"])] > scores[texts.index(row["rejected"])]


def test_a_shard_is_read_as_it_was_written_or_not_at_all(tmp_path):
    path, said = tmp_path / "labels" / "shard-0000.jsonl", []
    records = [record(["\u2028x\n", "é"], [0.1, 0.2], index=4), record(["y", "z"], [1.0, 2.0], index=7)]

    def read(known="known", indices=(4, 7)):
        return read_shard(path, known, indices, said.append)

    assert read() is None and not said
    write_shard(path, "known", records)
    assert read() == records and not said
    whole = path.read_bytes()
    head = whole.partition(b"\n")[0] + b"\n"
    bad = [whole[:cut] for cut in (0, 10, len(whole) // 2, len(whole) - 1)]
    bad += [b"\xff\xfe\n", b"[1]\n[2]\n", head + b"[1]\n", head + b"{}\n"]
    for text in bad:
        path.write_bytes(text)
        assert read() is None and not path.exists()
    for changes in ({"known": "another"}, {"indices": [4]}):
        path.write_bytes(whole)
        assert read(**changes) is None
    kept = [each.read_bytes() for each in path.parent.iterdir()]
    assert sorted(kept) == sorted([*bad, whole, whole]) and len(said) == len(kept)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "labels.jsonl"
    assert write_lines(path, [{"a": 1}]) == 1
    before, (soft, hard) = path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(CheckpointError, match="those before it are untouched"):
            write_lines(path, [{"text": "x" * 5000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_text() == before and [each.name for each in tmp_path.iterdir()] == ["labels.jsonl"]
    assert json.loads(before) == {"a": 1}


@pytest.mark.parametrize("write", ["ranked", "pairs", "best"])
def test_what_was_cut_when_it_was_sampled_has_no_end_token_when_it_is_read(tmp_path, write):
    """The same tokens are learned from as where nothing is written in between; also of rows that are labelled again."""
    tokenizer, kinds = build_tokenizer(), {"ranked": "ranked", "pairs": "pair", "best": "completion"}
    texts = ("great film a good", "fine", "bad")
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    sampled = [ids[0], (*ids[1], EOS_ID), (*ids[2], EOS_ID)]
    completions = tuple(
        Completion(str(k), each, (), "stop" if k else "length", version=3) for k, each in enumerate(sampled)
    )
    messages = ({"role": "user", "content": "film"},)
    group = Group("g", Prompt(0, "film", (1,), messages=messages), completions, texts, (2.0, 1.0, 0.0))
    for name in ("once.jsonl", "again.jsonl"):
        write_lines(tmp_path / name, rows_of(record_of(group, group.texts), write)[0])
        data = DataConfig(examples=str(tmp_path / name), held_out=0.0)
        read = load_examples(data, tokenizer, kinds=(kinds[write],), max_tokens=100, seed=0)
        found = [group for part in read.once(9) for group in part]
        for each in found:
            known = dict(zip(texts, completions, strict=True))
            for text, completion in zip(each.texts, each.completions, strict=True):
                assert (completion.token_ids, completion.finish_reason) == (
                    known[text].token_ids,
                    known[text].finish_reason,
                )
        assert any(completion.finish_reason == "length" for each in found for completion in each.completions)
        assert read.counts["truncated"] == 0
        group = next(each for each in found if each.completions[0].finish_reason == "length")
        group = replace(group, scores=tuple(-float(k) for k in range(len(group.texts))), preferences=None)


def test_finish_reasons_are_one_for_each_answer(tmp_path):
    write_lines(tmp_path / "r.jsonl", [{"prompt": "q", "completion": "a", "finish_reasons": ["length", "stop"]}])
    data = DataConfig(examples=str(tmp_path / "r.jsonl"), held_out=0.0)
    with pytest.raises(DataError, match="not as many finish reasons as answers"):
        load_examples(data, build_tokenizer(), kinds=("completion",), max_tokens=100, seed=0)


@pytest.mark.parametrize("write", ["ranked", "pairs", "best"])
def test_rows_say_how_much_is_learned_from_each_answer(tmp_path, write):
    """As where nothing is written in between."""
    kinds, trust = {"ranked": "ranked", "pairs": "pair", "best": "completion"}, {"a": 0.9, "b": 0.1, "c": 0.5}
    judged = {**ABC, "scores": [2.0, 3.0, 1.0], "trust": [0.9, 0.1, 0.5]}
    write_lines(tmp_path / "r.jsonl", rows_of(judged, write)[0])
    data = DataConfig(examples=str(tmp_path / "r.jsonl"), held_out=0.0)
    read = load_examples(data, build_tokenizer(), kinds=(kinds[write],), max_tokens=100, seed=0)
    found = [group for part in read.once(9) for group in part]
    assert found and all(group.trust == tuple(trust[text] for text in group.texts) for group in found)


@pytest.mark.parametrize(("trust", "what"), [([1.0], "not as many trust"), ([0.5, 1.5], "trust is out of range")])
def test_trust_is_a_share_for_each_answer(tmp_path, trust, what):
    write_lines(tmp_path / "r.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "trust": trust}])
    data = DataConfig(examples=str(tmp_path / "r.jsonl"), held_out=0.0)
    with pytest.raises(DataError, match=what):
        load_examples(data, build_tokenizer(), kinds=("pair",), max_tokens=100, seed=0)


def test_answers_that_differ_in_the_space_around_them_are_one():
    rows, left_out = rows_of(record([" good", "good", "bad"], [1.0, 2.0, 0.0]), "pairs")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(" good", "bad")]
    assert left_out == {"answers that are there twice": 1}

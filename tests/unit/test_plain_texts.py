"""Plain texts that are learned beside a reward: what is read as such, and what is said of anything else."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from rayalign.data.plain import PlainText
from rayalign.errors import DataError

KEY = "key algorithm.ptx.path"


@pytest.fixture
def load(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda path: PlainText(str(path), tokenizer, column="text", tokens=64, count=1, seed=0)


@pytest.fixture
def refused(load):
    def error_of(path):
        with pytest.raises(DataError) as raised:
            load(path)
        assert raised.value.where.startswith(f"{KEY}, "), raised.value.where
        assert "data." not in raised.value.remedy and "data." not in raised.value.rule
        return raised.value

    return error_of


@pytest.mark.parametrize("name", ["nope.txt", "texts/nope.txt", "nope.jsonl", "./nope", "~/no/such/texts", "/a/b.md"])
def test_a_file_that_is_not_there_is_named_with_its_key(refused, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(name)
    assert error.what == "there is no such file"
    assert ".txt" in error.rule and error.remedy == "correct algorithm.ptx.path"


def test_a_near_name_is_offered(refused, tmp_path):
    (tmp_path / "texts.txt").write_text("one two three")
    assert refused(tmp_path / "text.txt").remedy == f"did you mean {tmp_path / 'texts.txt'}?"


def test_what_is_not_utf8_is_named_with_its_line(refused, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"a tea\nand a caf\xe9\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "tea"}\n{"text": "caf\xe9"}\n')
    for name in ("latin.txt", "latin.jsonl"):
        error = refused(tmp_path / name)
        assert (error.what, error.value) == ("this line is not UTF-8", "byte 0xe9")
        assert error.where == f"{KEY}, {tmp_path / name}:2" and "iconv" in error.remedy


def test_other_kinds_of_files(refused, tmp_path):
    (tmp_path / "notes.md").write_text("one two three")
    error = refused(tmp_path / "notes.md")
    assert error.value == ".md" and ".txt" in error.remedy
    (tmp_path / "empty.txt").write_text("")
    assert refused(tmp_path / "empty.txt").what == "this file is empty"
    assert refused(tmp_path).what == "this is a folder, not a file"


def test_rows_without_the_column(refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "one two three"}) + "\n")
    error = refused(tmp_path / "rows.jsonl")
    assert error.where == f"{KEY}, {tmp_path / 'rows.jsonl'}:1" and "algorithm.ptx.column" in error.remedy


def test_a_split_that_is_not_there(refused, tmp_path):
    DatasetDict({"test": Dataset.from_dict({"text": ["one two three"]})}).save_to_disk(tmp_path / "saved")
    error = refused(tmp_path / "saved")
    assert error.what == "there is no such split" and error.remedy == "save the rows of test apart"


def test_texts_are_read(load, tmp_path):
    (tmp_path / "one.txt").write_bytes("\ufeffone two three".encode())  # Windows puts a mark before the first line
    (tmp_path / "plain.txt").write_text("one two three")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "one two three"}) + "\n")
    Dataset.from_dict({"text": ["one two three"]}).save_to_disk(tmp_path / "saved")
    names = ("one.txt", "plain.txt", "rows.jsonl", "saved")
    found = [load(tmp_path / name).of_step(0) for name in names]
    assert found == [found[0]] * 4 and found[0][0].completion_ids

"""Data sets of every kind as groups: the columns, the files, and what the annotators said."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from rayalign.data.config import DataConfig
from rayalign.data.examples import load_examples
from rayalign.errors import DataError
from tests.tiny_models import build_tokenizer
from tests.unit.examples_data import KINDS, PAIRS, load, one, texts, write

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize(
    ("row", "scores"),
    [
        ({"completion": "x"}, (1.0,)),
        ({"response": "x", "source": "web"}, (1.0,)),
        ({"chosen": "x", "rejected": "y"}, (1.0, 0.0)),
        ({"real": "x", "generated": "y"}, (1.0, 0.0)),
        ({"completion": "x", "label": True}, (1.0,)),
        ({"completion": "x", "label": 0}, (0.0,)),
        ({"completion": "x", "label": "Bad"}, (0.0,)),
        ({"completions": ["x", "y", "z"], "ranks": [2, 1, 3]}, (-2.0, -1.0, -3.0)),
        ({"completions": ["x", "y", "z"], "choice": 1}, (0.0, 1.0, 0.0)),
        ({"completions": ["x", "y", "z"], "votes": [5, 0, 0]}, (5.0, 0.0, 0.0)),
        ({"completion": "x", "votes": [3, 1]}, None),
    ],
)
def test_scores(tokenizer, tmp_path, row, scores):
    kinds = ("label",) if "label" in row else KINDS
    rows = [{"prompt": "q"} | row]
    if "label" in row:  # both labels, or there is nothing to tell apart
        rows.append({"prompt": "q", "completion": "z", "label": not one_label(row["label"])})
    loaded = load(tokenizer, str(write(tmp_path / "a.jsonl", rows)), kinds=kinds)
    group = next(group for group in loaded.step(0, len(rows)) if group.prompt.index == 0)
    assert group.scores == scores
    answers = row.get("completions") or [row[key] for key in row if isinstance(row[key], str) and len(row[key]) == 1]
    assert texts(tokenizer, group) == ["<user>q<assistant>", *(f"{answer}<eos>" for answer in answers)]
    assert group.texts == tuple(answers)


def one_label(value) -> bool:
    return value in (True, 1, "good")


def test_votes_and_probabilities_are_preferences(tokenizer, tmp_path):
    pair = {"prompt": "q", "chosen": "x", "rejected": "y"}
    assert one(tokenizer, tmp_path, pair).preferences is None
    assert one(tokenizer, tmp_path, pair | {"votes": [3, 1]}).preferences == ((0.5, 0.75), (0.25, 0.5))
    assert one(tokenizer, tmp_path, pair | {"votes": [3, 1]}).scores == (1.0, 0.0)
    assert one(tokenizer, tmp_path, pair | {"probability": 0.75}).preferences == ((0.5, 0.75), (0.25, 0.5))
    ranked = one(tokenizer, tmp_path, {"prompt": "q", "completions": ["x", "y", "z"], "votes": [3, 0, 0]})
    assert ranked.preferences == ((0.5, 1.0, 1.0), (0.0, 0.5, 0.5), (0.0, 0.5, 0.5))


def test_votes_decide_which_half_is_better(tokenizer, tmp_path):
    pair = {"prompt": "q", "chosen": "x", "rejected": "y"}
    for said in ({"votes": [1, 9]}, {"probability": 0.1}):
        group = one(tokenizer, tmp_path, pair | said)
        assert (group.texts, group.scores) == (("x", "y"), (0.0, 1.0))
        assert group.preferences == ((0.5, 0.1), (0.9, 0.5))


def test_undecided_annotators_are_of_use_to_losses_of_probabilities_alone(tokenizer, tmp_path):
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "votes": [5, 5]}
    config = DataConfig(examples=str(write(tmp_path / "a.jsonl", [row])), held_out=0)
    loaded = load_examples(config, tokenizer, kinds=("pair",), max_tokens=50, seed=0, ties=True)
    (group,) = loaded.step(0, 1)
    assert (group.scores, group.preferences) == ((1.0, 0.0), ((0.5, 0.5), (0.5, 0.5)))


def test_ratings_are_counted_by_the_classes_of_the_whole_set(tokenizer, tmp_path):
    rows = [{"prompt": "q", "completion": "x", "ratings": each} for each in ([5, 4, 5], [2], [2, 3])]
    groups = load(tokenizer, str(write(tmp_path / "a.jsonl", rows))).step(0, 3)
    votes = {group.prompt.index: group.votes for group in groups}
    assert votes == {0: ((0.0, 0.0, 1.0, 2.0),), 1: ((1.0, 0.0, 0.0, 0.0),), 2: ((1.0, 1.0, 0.0, 0.0),)}
    assert one(tokenizer, tmp_path, {"prompt": "q", "completion": "x", "votes": [2, 0, 1]}).votes == ((2.0, 0.0, 1.0),)


def test_other_columns_stay_with_the_prompt(tokenizer, tmp_path):
    row = PAIRS[0] | {"margin": 2, "genre": "opera"}
    assert one(tokenizer, tmp_path, row).prompt.extra == {"margin": 2.0, "genre": "opera"}
    path = str(write(tmp_path / "a.jsonl", [PAIRS[0] | {"gap": 0.5}]))
    named = load(tokenizer, {"path": path, "columns": {"margin": "gap"}}).step(0, 1)[0]
    assert named.prompt.extra["margin"] == 0.5


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TALK, "chosen": "x", "rejected": "y"},
        {"prompt": TALK, "chosen": [said("x")], "rejected": [said("y")]},
        {"prompt": TALK, "chosen": [*TALK, said("x")], "rejected": [*TALK, said("y")]},
        {"chosen": [*TALK, said("x")], "rejected": [*TALK, said("y")]},
        {"real": [*TALK, said("x")], "generated": [*TALK, said("y")]},
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: x",
         "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: y"},
        {"prompt": None, "chosen": [*TALK, said("x")], "rejected": [*TALK, said("y")]},
    ],
)  # fmt: skip
def test_the_prompt_is_the_common_beginning(tokenizer, tmp_path, row):
    group = one(tokenizer, tmp_path, row)
    assert texts(tokenizer, group) == ["<user>a<assistant>b<eos><user>c<assistant>", "x<eos>", "y<eos>"]
    assert group.prompt.text == "c"


def test_a_prompt_that_both_answers_repeat_as_text(tokenizer, tmp_path):
    row = {"prompt": "c", "chosen": [TALK[2], said("x")], "rejected": [TALK[2], said("y")]}
    group = one(tokenizer, tmp_path, row, system="be kind")
    assert texts(tokenizer, group) == ["<user>be kind<user>c<assistant>", "x<eos>", "y<eos>"]


def test_texts_without_a_template_are_cut_at_the_last_common_turn(tokenizer, tmp_path):
    row = {"chosen": "\n\nHuman: a\n\nAssistant: good x", "rejected": "\n\nHuman: a\n\nAssistant: good y"}
    group = one(tokenizer, tmp_path, row, chat_template=False)
    assert texts(tokenizer, group) == ["\n\nHuman: a\n\nAssistant:", " good x<eos>", " good y<eos>"]


@pytest.mark.parametrize(
    ("first", "second", "prompt", "answers"),
    [
        ("Q: 2+2? A: 4", "Q: 2+2? A: 5", "Q: 2+2? A:", (" 4", " 5")),
        ("Q: why?\nA: because", "Q: why?\nA: before", "Q: why?\nA:", (" because", " before")),
        ("say it", "say it again", "say", (" it", " it again")),
        ("a b\n\nc", "a b\n\nd", "a b", ("\n\nc", "\n\nd")),
    ],
)
def test_plain_texts_are_cut_behind_the_last_common_word(tokenizer, tmp_path, first, second, prompt, answers):
    row = {"chosen": first, "rejected": second}
    group = one(tokenizer, tmp_path, row, chat_template=False)
    assert texts(tokenizer, group) == [prompt, *(f"{answer}<eos>" for answer in answers)]
    chat = one(tokenizer, tmp_path, row)
    assert texts(tokenizer, chat) == [f"<user>{prompt}<assistant>", *(f"{a.lstrip()}<eos>" for a in answers)]


def test_texts_in_parts_are_texts(tokenizer, tmp_path):
    def parts(*said):
        return [{"type": "text", "text": each} for each in said]

    row = {"messages": [{"role": "user", "content": parts("a", "b")}, {"role": "assistant", "content": parts("x")}]}
    assert texts(tokenizer, one(tokenizer, tmp_path, row)) == ["<user>ab<assistant>", "x<eos>"]
    row["messages"][0]["content"].append({"type": "image"})
    with pytest.raises(DataError, match="this is not a prompt"):
        one(tokenizer, tmp_path, row)


def test_a_conversation_is_a_prompt_and_its_last_answer(tokenizer, tmp_path):
    group = one(tokenizer, tmp_path, {"messages": [*TALK, said("x")]})
    assert texts(tokenizer, group) == ["<user>a<assistant>b<eos><user>c<assistant>", "x<eos>"]


def test_every_kind_of_file_gives_the_same(tokenizer, tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(PAIRS)
    write(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "a.json").write_text(json.dumps(PAIRS))
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(PAIRS[0]))
        writer.writeheader()
        writer.writerows(PAIRS)

    def ids(source):
        loaded = load(tokenizer, source, held_out=0.2)
        return [group.completions for group in (*loaded.step(0, 8), *loaded.step(2, 8), *loaded.held_out)]

    whole = ids(str(tmp_path / "a.jsonl"))
    for name in ("a.json", "a.csv", "a.parquet", "saved"):
        assert ids(str(tmp_path / name)) == whole, name
        assert ids({"path": str(tmp_path / name)}) == whole
    assert ids([{"path": str(tmp_path / "splits"), "split": "test"}]) == whole
    with pytest.raises(DataError, match="there is no such split") as error:
        ids(str(tmp_path / "splits"))
    assert "set split: test" in str(error.value)


def test_answers_of_a_csv_file_may_be_numbers(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("prompt,best,rejected,margin\n1+1,2,007,0.5\n2+2,4,5,1\n")
    loaded = load(tokenizer, {"path": str(tmp_path / "a.csv"), "columns": {"chosen": "best"}})
    found = sorted((group.prompt.text, *group.texts, group.prompt.extra["margin"]) for group in loaded.step(0, 2))
    assert found == [("1+1", "2", "007", 0.5), ("2+2", "4", "5", 1.0)]


def test_limit_takes_the_first_rows(tokenizer, tmp_path):
    path = str(write(tmp_path / "a.jsonl", PAIRS))
    assert {g.prompt.index for g in load(tokenizer, {"path": path, "limit": 5}).step(0, 5)} == set(range(5))
    assert load(tokenizer, {"path": path, "limit": 500}).rows == 20


def test_rows_of_one_file_may_differ(tokenizer, tmp_path):
    rows = [PAIRS[0], {"prompt": TALK, "chosen": "x", "rejected": "y", "more": {"deep": 1}}]
    assert len(load(tokenizer, str(write(tmp_path / "a.jsonl", rows))).step(0, 2)) == 2


def test_the_fingerprint_is_that_of_rows_and_settings(tokenizer, tmp_path):
    path, other = write(tmp_path / "a.jsonl", PAIRS), write(tmp_path / "b.jsonl", PAIRS)
    changed = write(tmp_path / "c.jsonl", [*PAIRS[:-1], PAIRS[0]])
    first = load(tokenizer, str(path)).fingerprint
    assert load(tokenizer, str(other), seed=5, prompts="p.jsonl").fingerprint == first
    others = [load(tokenizer, str(changed)), load(tokenizer, str(path), max_tokens=60)]
    others += [load(tokenizer, str(path), system="s"), load(tokenizer, {"path": str(path), "limit": 20})]
    assert first not in {each.fingerprint for each in others}
    code = (
        "from tests.unit.examples_data import load; from tests.tiny_models import build_tokenizer;"
        f"print(load(build_tokenizer(), {str(path)!r}).fingerprint)"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert again.stdout.split()[-1] == first


def test_the_description_is_one_line(tokenizer, tmp_path):
    rows = [*PAIRS, {"prompt": "q", "chosen": "x", "rejected": "x"}, {"prompt": "q", "chosen": "", "rejected": "x"}]
    path = str(write(tmp_path / "a.jsonl", rows))
    loaded = load(tokenizer, path, on_bad_row="skip", held_out=0.25)
    assert loaded.describe() == (
        f"15 pairs from {path}, 5 held out, 2 skipped (1 × the two answers are the same, 1 × an answer is empty)"
    )
    assert loaded.rows == loaded.counts["training"] == 15
    assert len(loaded.held_out) == loaded.counts["held_out"] == 5

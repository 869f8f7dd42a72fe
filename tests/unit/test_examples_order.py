"""The rows of a step: a new order each pass, shares by weight, streams, held-out rows, and label noise."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rayalign.data.order import BLOCK, Mixture, Passes, uniform
from rayalign.errors import DataError
from tests.tiny_models import build_tokenizer
from tests.unit.examples_data import PAIRS, load, write

LABELS = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2} for i in range(400)]
MANY = [{"prompt": f"q{i}", "chosen": "x", "rejected": "y"} for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def pairs(tmp_path):
    return str(write(tmp_path / "pairs.jsonl", PAIRS))


def taken(loaded, steps, count):
    return [group.prompt.text for step in steps for group in loaded.step(step, count)]


def test_each_pass_has_every_row_once_in_another_order(tokenizer, pairs):
    loaded = load(tokenizer, pairs)
    first, second = taken(loaded, range(4), 5), taken(loaded, range(4, 8), 5)
    assert sorted(first) == sorted(second) == sorted(row["prompt"] for row in PAIRS)
    assert first != second and first != [row["prompt"] for row in PAIRS]
    assert taken(load(tokenizer, pairs), [6], 5) == second[10:15]
    assert taken(load(tokenizer, pairs, seed=1), range(4), 5) != first
    assert taken(loaded, [0], 50)[:20] == first


def test_groups_of_one_step_have_different_ids(tokenizer, pairs):
    ids = [group.id for group in load(tokenizer, [pairs, pairs]).step(0, 90)]
    assert len(set(ids)) == 90


def test_held_out_rows_are_the_same_at_each_start_and_never_trained_on(tokenizer, pairs):
    loaded = load(tokenizer, pairs, held_out=0.3)
    held = [group.prompt.text for group in loaded.held_out]
    assert len(held) == len(loaded.held_out) == 6 and loaded.rows == 14
    assert held == [group.prompt.text for group in load(tokenizer, pairs, held_out=0.3, seed=9).held_out]
    assert held != [group.prompt.text for group in load(tokenizer, pairs, held_out=0.3, shuffle_seed=9).held_out]
    assert set(held).isdisjoint(taken(loaded, range(10), 14))
    assert [group.prompt.text for group in loaded.held_out[1:3]] == held[1:3]
    assert loaded.held_out[-1].prompt.text == held[-1]
    assert list(load(tokenizer, pairs).held_out) == []


def test_sources_without_weights_are_one_set(tokenizer, tmp_path, pairs):
    small = str(write(tmp_path / "b.jsonl", [row | {"prompt": "b" + row["prompt"]} for row in PAIRS[:4]]))
    loaded = load(tokenizer, [pairs, small])
    assert loaded.rows == 24
    assert len(set(taken(loaded, [0], 24))) == 24
    assert {group.prompt.index for group in loaded.step(0, 24)} == set(range(24))


def test_sources_mix_by_weight_and_each_has_its_own_passes(tokenizer, tmp_path, pairs):
    small = str(write(tmp_path / "b.jsonl", [row | {"prompt": "b" + row["prompt"]} for row in PAIRS[:4]]))
    loaded = load(tokenizer, [{"path": pairs, "weight": 3}, {"path": small, "weight": 1}])
    drawn = Counter(taken(loaded, range(25), 40))
    from_small = {text: count for text, count in drawn.items() if text.startswith("b")}
    assert sum(from_small.values()) == 250 and set(from_small.values()) == {62, 63}
    assert taken(load(tokenizer, [{"path": pairs, "weight": 3}, {"path": small, "weight": 1}]), [7], 40) == taken(
        loaded, [7], 40
    )


def test_mixture_and_passes_by_themselves():
    mixture = Mixture([2.0, 1.0, 1e-9], seed=3)
    slots = [mixture[slot] for slot in range(3 * BLOCK)]
    assert Counter(source for source, _ in slots) == {0: 1998, 1: 999, 2: 3}
    for source in range(3):
        assert [position for each, position in slots if each == source] == list(range(len(
            [1 for each, _ in slots if each == source]
        )))  # fmt: skip
    assert Mixture([2.0, 1.0, 1e-9], seed=3)[2500] == slots[2500]
    passes = Passes(7, seed=[1])
    assert sorted(passes[position][1] for position in range(7, 14)) == list(range(7))
    assert [passes[3], passes[10], passes[3]] == [passes[3], (1, passes[10][1]), passes[3]]


def test_uniform_is_uniform_and_a_function_of_its_index():
    whole = uniform(5, np.arange(100_000))
    assert abs(whole.mean() - 0.5) < 0.005 and abs(whole.std() - 12**-0.5) < 0.005
    assert whole.min() >= 0 and whole.max() < 1
    assert float(uniform(5, 77)) == whole[77] != float(uniform(6, 77))
    assert abs(np.corrcoef(whole, uniform(6, np.arange(100_000)))[0, 1]) < 0.01


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_stream_is_shuffled_resumable_and_endless(tokenizer, tmp_path, suffix):
    from datasets import Dataset

    path = str(tmp_path / f"a.{suffix}")
    Dataset.from_list(MANY).to_json(path) if suffix == "jsonl" else Dataset.from_list(MANY).to_parquet(path)
    settings = {"held_out": 0.1, "shuffle_buffer": 50}
    loaded = load(tokenizer, {"path": path, "stream": True}, **settings)
    assert loaded.rows is None and "a stream of pairs" in loaded.describe()
    held = {group.prompt.text for group in loaded.held_out}
    assert 20 <= len(held) <= 60
    first = taken(loaded, range(4), 50)
    assert len(set(first)) == 200 and held.isdisjoint(first)
    assert first != sorted(first, key=lambda text: int(text[1:]))
    again = load(tokenizer, {"path": path, "stream": True}, **settings)
    assert {group.prompt.text for group in again.held_out} == held
    assert taken(again, [3], 50) == first[150:]
    assert taken(again, [1], 50) == first[50:100]
    whole = len(MANY) - len(held)
    two_passes = Counter(taken(loaded, range(2 * whole), 1))
    assert set(two_passes.values()) == {2} and len(two_passes) == whole


def test_streams_mix_by_weight(tokenizer, tmp_path, pairs):
    many = str(write(tmp_path / "many.jsonl", MANY))
    loaded = load(tokenizer, [{"path": pairs, "weight": 1}, {"path": many, "weight": 1, "stream": True}])
    from_pairs = sum(text.startswith("film") for text in taken(loaded, range(10), 100))
    assert (loaded.rows, from_pairs) == (None, 500)


def scores(loaded, count):
    return {group.prompt.text: (group.texts, group.scores) for group in loaded.step(0, count)}


@pytest.mark.parametrize(("kind", "expected"), [("flip", 0.25), ("uniform", 0.125)])
def test_noise_turns_the_same_labels_each_time(tokenizer, tmp_path, kind, expected):
    path = str(write(tmp_path / "a.jsonl", LABELS))
    clean = scores(load(tokenizer, path, ("label",)), 400)
    noise = {"kind": kind, "prob": 0.25, "seed": 3}
    loaded = load(tokenizer, {"path": path, "label_noise": noise}, ("label",))
    noisy = scores(loaded, 400)
    turned = [text for text in clean if clean[text] != noisy[text]]
    assert loaded.counts["flipped"] == len(turned) and abs(len(turned) / 400 - expected) < 0.06
    assert all(noisy[text][1] == (1 - clean[text][1][0],) for text in turned)
    next_pass = {group.prompt.text: (group.texts, group.scores) for group in loaded.step(1, 400)}
    assert next_pass == noisy
    other = load(tokenizer, {"path": path, "label_noise": noise | {"seed": 4}}, ("label",))
    assert scores(other, 400) != noisy


def test_noise_turns_pairs_round_but_not_held_out_ones(tokenizer, tmp_path, pairs):
    source = {"path": pairs, "label_noise": {"prob": 1}}
    loaded = load(tokenizer, source, held_out=0.2)
    assert loaded.counts["flipped"] == 16 and "16 labels turned" in loaded.describe()
    for group in loaded.step(0, 16):
        assert group.texts[0].startswith("bad") and group.scores == (1.0, 0.0)
    assert all(group.texts[0].startswith("good") for group in loaded.held_out)


@pytest.mark.parametrize(
    ("said", "before", "after"),
    [
        ({"ranks": [1, 2, 3]}, "xyz", ["zyx"]),
        ({"ranks": [2, 1, 3]}, "yxz", ["zxy"]),
        ({"ranks": [3, 1, 2]}, "yzx", ["xzy"]),
        ({"choice": 1}, "y", ["x", "z"]),
        ({"votes": [1, 6, 3]}, "yzx", ["xzy"]),
    ],
)
def test_noise_turns_a_ranking_round_wherever_the_best_stands(tokenizer, tmp_path, said, before, after):
    rows = [{"prompt": f"q{i}", "completions": ["x", "y", "z"], **said} for i in range(30)]
    path = str(write(tmp_path / "r.jsonl", rows))

    def rankings(source):
        found = set()
        for group in load(tokenizer, source).step(0, 30):
            best_first = sorted(range(3), key=lambda i: -group.scores[i])
            found.add("".join(group.texts[i] for i in best_first)[: len(before)])
            if group.preferences is not None:
                assert group.preferences[best_first[0]][best_first[2]] > 0.8
        return found

    assert rankings(path) == {before}
    assert rankings({"path": path, "label_noise": {"prob": 1}}) == set(after)


def test_noise_without_labels_is_refused(tokenizer, tmp_path):
    path = str(write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}]))
    with pytest.raises(DataError, match="no labels here"):
        load(tokenizer, {"path": path, "label_noise": {"prob": 0.5}})

"""What is held out: prompts with all their rows; and what a stream is seen to hold before the start."""

from __future__ import annotations

import numpy as np
import pytest

from rayalign.data.order import held_out_prompts
from rayalign.errors import DataError
from tests.tiny_models import build_tokenizer
from tests.unit.examples_data import PAIRS, load, write

SIX_EACH = [{"prompt": f"film {i}", "chosen": f"good {k}", "rejected": f"bad {k}"} for i in range(20) for k in range(6)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def prompts(groups) -> set[str]:
    return {group.prompt.text for group in groups}


def test_all_rows_of_a_prompt_are_on_one_side(tokenizer, tmp_path):
    path = str(write(tmp_path / "a.jsonl", SIX_EACH))
    loaded = load(tokenizer, path, held_out=0.2)
    assert (len(loaded.held_out), loaded.rows) == (24, 96)
    training = loaded.step(0, 96)
    assert len(prompts(loaded.held_out)) == 4 and len(prompts(training)) == 16
    assert prompts(loaded.held_out).isdisjoint(prompts(training))


def test_a_prompt_of_several_sources_is_on_one_side(tokenizer, tmp_path):
    one = {"path": str(write(tmp_path / "a.jsonl", SIX_EACH)), "weight": 1}
    two = {"path": str(write(tmp_path / "b.jsonl", PAIRS)), "weight": 1}
    many = [{"prompt": f"film {i % 25}", "chosen": "x", "rejected": f"y {i}"} for i in range(1500)]
    stream = {"path": str(write(tmp_path / "c.jsonl", many)), "weight": 1, "stream": True}
    for sources in ([one, two], [one, stream], [stream]):
        loaded = load(tokenizer, sources, held_out=0.3)
        training = [group for step in range(4) for group in loaded.step(step, 1000)]
        assert prompts(loaded.held_out) and prompts(loaded.held_out).isdisjoint(prompts(training))
        assert len(prompts(loaded.held_out)) + len(prompts(training)) == (25 if stream in sources else 20)


def test_the_same_question_about_other_images_is_another_prompt(tokenizer, tmp_path):
    from rayalign.data.readers import Row, prompt_key

    asked = Row("pair", [{"role": "user", "content": "what is it? "}], ("x", "y"), (1.0, 0.0), images=(b"one",))
    keys = {prompt_key(Row("pair", asked.prompt, ("a", "b"), None, images=(image,))) for image in (b"one", b"two")}
    assert len(keys) == 2 and prompt_key(asked) in keys


@pytest.mark.parametrize(
    ("sizes", "share", "rows"),
    [([6] * 20, 0.2, 24), ([1] * 10, 0.25, 2), ([1] * 3, 0.01, 1), ([9, 1], 0.3, 1), ([9, 9], 0.1, 9), ([5], 0.5, 0),
     ([1, 1], 0.99, 1), ([3, 3], 0.0, 0)],
)  # fmt: skip
def test_a_share_of_the_rows_in_whole_prompts(sizes, share, rows):
    keys = np.repeat(np.arange(len(sizes), dtype=np.uint64) * np.uint64(2**60 + 3), sizes)
    held = held_out_prompts(keys, share, seed=3)
    assert np.isin(keys, held).sum() == rows
    assert np.array_equal(held_out_prompts(keys[::-1], share, seed=3), held)


def test_the_first_held_out_rows_are_of_all_sources_and_places(tokenizer, tmp_path):
    sources = []
    for name in "ab":
        rows = [{"prompt": f"{name} {i}", "chosen": "x", "rejected": "y"} for i in range(100)]
        sources.append(str(write(tmp_path / f"{name}.jsonl", rows)))
    loaded = load(tokenizer, sources, held_out=0.5)
    first = loaded.held_out[:30]
    assert {group.prompt.text[0] for group in first} == {"a", "b"}
    places = [group.prompt.index for group in first]
    assert places != sorted(places) and max(places) > 150
    assert load(tokenizer, sources, held_out=0.5, seed=4).held_out[:30] == first


def test_a_weighted_source_of_which_nothing_is_left(tokenizer, tmp_path):
    several = {"path": str(write(tmp_path / "a.jsonl", PAIRS[:2])), "weight": 1}
    for seed in range(40):
        single = {"path": str(write(tmp_path / "b.jsonl", [PAIRS[5]])), "weight": 1}
        try:
            assert len(load(tokenizer, [several, single], held_out=0.6, shuffle_seed=seed).step(0, 8)) == 8
        except DataError as error:
            assert error.what == "no row is left to learn from" and "all rows held out: 1" in str(error)
            return
    raise AssertionError("the single row was never held out")


def test_what_is_cut_or_turned_in_a_stream_is_counted_once(tokenizer, tmp_path):
    rows = [*PAIRS, {"prompt": "p", "chosen": "long " * 40, "rejected": "r"}, {"prompt": "a" * 47, "chosen": "c",
            "rejected": "d"}]  # fmt: skip
    source = {"path": str(write(tmp_path / "a.jsonl", rows)), "stream": True, "label_noise": {"prob": 1}}
    loaded = load(tokenizer, source, max_tokens=50)
    assert loaded.counts["truncated"] == 0
    for step in range(3):
        loaded.step(step, 22)
        assert (loaded.counts["truncated"], loaded.counts["flipped"]) == (2, 22)
    assert "2 cut to 50 tokens, 22 labels turned" in loaded.describe()


def test_a_stream_with_labels_that_are_all_equal(tokenizer, tmp_path):
    good = [{"prompt": f"q{i}", "completion": "x", "label": 1} for i in range(1500)]
    both = str(write(tmp_path / "a.jsonl", [*good, {"prompt": "q", "completion": "x", "label": 0}]))
    for buffer in (10, 1000):
        with pytest.raises(DataError, match="all labels are equal") as error:
            load(tokenizer, {"path": both, "stream": True}, shuffle_buffer=buffer)
        assert "the stream's first 1,000 answers is good" in str(error.value)
    assert load(tokenizer, {"path": both, "stream": True}, shuffle_buffer=2000).rows is None  # mixes all of it
    bad = str(write(tmp_path / "b.jsonl", [row | {"label": 0} for row in good[:3]]))
    sources = [{"path": path, "stream": True, "weight": 1} for path in (both, bad)]
    assert len(load(tokenizer, sources, shuffle_buffer=10).step(0, 20)) == 20


def test_the_rows_of_a_short_stream_are_known(tokenizer, tmp_path):
    path = str(write(tmp_path / "a.jsonl", PAIRS))
    loaded = load(tokenizer, {"path": path, "stream": True}, held_out=0.2)
    assert loaded.rows is None and loaded.known_rows == 20 - len(loaded.held_out)
    longer = str(write(tmp_path / "b.jsonl", [row | {"prompt": f"{i}"} for i, row in enumerate(PAIRS * 51)]))
    assert load(tokenizer, {"path": longer, "stream": True}).known_rows is None
    assert load(tokenizer, path).known_rows == 20

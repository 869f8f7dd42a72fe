"""Reference answers, the column `gold`: of prompts and of rows, as tokens where they are wanted, and carried along."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rayalign.build import load_tokenizer, longest_context, prompts_for
from rayalign.config import parse_config
from rayalign.data.config import DataConfig
from rayalign.data.examples import load_examples
from rayalign.data.labels import record_of, rows_of
from rayalign.data.prompts import load_prompts
from rayalign.errors import DataError
from rayalign.types import Completion, Group, Prompt
from tests.tiny_models import EOS_ID, build_tiny_llama, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ranked(gold):
    return [
        {"prompt": f"film {i}", "completions": ["bad", "great film"], "scores": [0.0, 1.0], **more}
        for i, more in enumerate(gold)
    ]


def prompts_of(tokenizer, path, *, gold=True, **settings):
    config = DataConfig(prompts=path, held_out=0.0, **settings)
    return load_prompts(config, tokenizer, max_prompt_tokens=50, gold=gold).training


def rows_from(tokenizer, path, *, gold=True, **settings):
    config = DataConfig(examples=path, held_out=0.0, **settings)
    return load_examples(config, tokenizer, kinds=("ranked",), max_tokens=config.max_tokens, seed=0, gold=gold)


MIXED = [{"gold": "a fine film"}, {"gold": None}, {"gold": " "}, {"gold": [{"role": "assistant", "content": "fine"}]}]


def test_of_prompts_and_of_rows(tokenizer, tmp_path):
    answers = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("a fine film", "fine")]
    wanted = [(*answers[0], EOS_ID), (), (), (*answers[1], EOS_ID)]
    path = write(tmp_path / "prompts.jsonl", [{"prompt": f"film {i}", **more} for i, more in enumerate(MIXED)])
    assert [prompt.gold_ids for prompt in prompts_of(tokenizer, path)] == wanted
    path = write(tmp_path / "ranked.jsonl", ranked(MIXED))
    groups = sorted(rows_from(tokenizer, path).step(0, 4), key=lambda group: group.prompt.index)
    assert [group.prompt.gold_ids for group in groups] == wanted
    assert groups[0].prompt.extra["gold"] == "a fine film"


def test_what_asks_for_none_sees_a_column_like_any_other(tokenizer, tmp_path):
    """It may be anything then, and the fingerprints are what they were."""
    rows = [{"prompt": "film", "gold": 3}]
    (prompt,) = prompts_of(tokenizer, write(tmp_path / "p.jsonl", rows), gold=False)
    assert prompt.gold_ids == () and prompt.extra == {"gold": 3}
    assert rows_from(tokenizer, write(tmp_path / "r.jsonl", ranked([{"gold": 3}])), gold=False).step(0, 1)


def test_what_is_no_text_is_refused_or_skipped_with_its_row(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "film", "gold": 3}])
    with pytest.raises(DataError) as error:
        prompts_of(tokenizer, path)
    assert error.value.where == f"{path}, row 1" and "gold: 3" in error.value.value
    path = write(tmp_path / "r.jsonl", ranked([{"gold": "fine"}, {"gold": 3}]))
    with pytest.raises(DataError, match="a reference answer is no text"):
        rows_from(tokenizer, path).step(0, 2)


def test_a_long_one_is_cut(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "film", "gold": "good " * 50}])
    (prompt,) = prompts_of(tokenizer, path, max_tokens=20)
    assert len(prompt.token_ids) + len(prompt.gold_ids) == 20


def test_it_is_cut_to_the_context_of_the_model_too_and_counted(tmp_path):
    """GPT-2 has no position beyond its context: a row that is longer would end the run, or worse."""
    path = write(tmp_path / "p.jsonl", [{"prompt": "film", "gold": "good " * 900}, {"prompt": "film", "gold": "good"}])
    model = str(build_tiny_llama(tmp_path / "model"))
    config = parse_config(
        {
            "model": {"path": model},
            "engine": {"name": "transformers", "max_context": 64},
            "data": {"prompts": path, "held_out": 0.0, "max_tokens": 10_000},
            "algorithm": {"name": "dpm_calibration", "samples": 2},
            "sampling": {"max_tokens": 8},
            "scorer": {"name": "ratings"},
        }
    )
    found = prompts_for(config, load_tokenizer(config))
    longest = max(len(prompt.token_ids) + len(prompt.gold_ids) for prompt in found.training)
    assert (longest, found.cut) == (longest_context(config), 1)


def test_other_reference_answers_are_other_data(tokenizer, tmp_path):
    prints = []
    for text in ("fine", "great", None):
        path = write(tmp_path / "p.jsonl", [{"prompt": "film", "gold": text}])
        config = DataConfig(prompts=path, held_out=0.0)
        prints.append(load_prompts(config, tokenizer, max_prompt_tokens=50, gold=True).fingerprint)
    plain = load_prompts(DataConfig(prompts=path, held_out=0.0), tokenizer, max_prompt_tokens=50).fingerprint
    assert len(set(prints)) == 3 and prints[2] == plain


@pytest.mark.parametrize("write_as", ["ranked", "pairs", "best"])
def test_labelled_rows_carry_it(write_as):
    completions = tuple(Completion(str(k), (k,), (), "stop", 0) for k in range(2))
    group = Group("g", Prompt(0, "p", (1,), {"gold": "fine", "more": 1}), completions, ("a", "b"), (0.0, 1.0))
    rows, _ = rows_of(record_of(group, group.texts), write_as)
    assert rows and all(row["gold"] == "fine" and "more" not in row for row in rows)
    without = replace(group, prompt=replace(group.prompt, extra={}))
    rows, _ = rows_of(record_of(without, group.texts), write_as)
    assert rows and all("gold" not in row for row in rows)

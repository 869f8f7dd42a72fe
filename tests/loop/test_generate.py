"""Completions of a file of prompts, and searches in the loop: training, labelling, evaluation."""

from __future__ import annotations

import json
import math

import pytest

from rayalign.api import run_training
from rayalign.config import load_config
from rayalign.errors import ConfigError
from rayalign.generate import Asking, run_generation
from rayalign.label import run_labelling
from rayalign.types import Completion, Prompt, Sampling
from tests.loop.conftest import records
from tests.loop.test_label import lines

SEARCH = {"name": "diverse_beam", "beams": 4, "groups": 2, "penalty": 1.0, "max_tokens": 8}


@pytest.fixture
def generate(make):
    return lambda **changes: run_generation(make(**{"algorithm": {"name": "generate"}, "scorer": None, **changes}))


def test_candidates_of_every_prompt_in_the_order_of_the_file(generate) -> None:
    found = generate(sampling=SEARCH)
    written = lines(found.file)
    assert [line["prompt_index"] for line in written] == list(range(20)) and not found.stopped
    assert (
        found.file == found.run_dir / "completions.jsonl" and written[3]["prompt"] == "write one sentence about film 3"
    )
    for line in written:
        candidates = line["completions"]
        assert [each["score"] for each in candidates] == sorted((each["score"] for each in candidates), reverse=True)
        assert sorted(each["group"] for each in candidates) == [0, 0, 1, 1]
        assert (
            line["distinct"]
            == len({each["text"] for each in candidates})
            == 4 - sum("same_as" in c for c in candidates)
        )
        for each in candidates:
            assert 1 <= len(each["token_ids"]) == len(each["logps"]) <= 8
            assert each["sum_logp"] == pytest.approx(math.fsum(each["logps"]))
            assert each["mean_logp"] == pytest.approx(each["sum_logp"] / len(each["logps"]))
            assert each["score"] <= each["mean_logp"] + 1e-5  # the penalty only takes away
    summary = json.loads((found.run_dir / "generate.json").read_text())
    assert (summary["prompts"], summary["completions"]) == (20, 80)
    assert summary["metrics"]["candidates/distinct"] + summary["metrics"]["candidates/same"] == 4
    assert load_config(found.run_dir / "config.yaml").sampling.beams == 4


def test_samples_are_written_too_and_seeds_decide_them(generate, tmp_path) -> None:
    algorithm = {"name": "generate", "samples": 3}
    first = generate(algorithm=algorithm)
    few = {"name": "transformers", "max_context": 64, "max_running": 1}  # two are open at a time
    again = generate(algorithm=algorithm, engine=few, run_dir=str(tmp_path / "again"))
    other = generate(algorithm=algorithm, seed=1, run_dir=str(tmp_path / "other"))
    drawn = [[[c["token_ids"] for c in e["completions"]] for e in lines(g.file)] for g in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(line["completions"]) == 3 and "group" not in line["completions"][0] for line in lines(first.file))


def test_the_config_of_a_training_generates_as_it_would_sample(make) -> None:
    found = run_generation(make(), model=make().model.path)
    assert {len(line["completions"]) for line in lines(found.file)} == {4} and found.prompts == 20


@pytest.mark.parametrize(("last", "ended", "given_up"), [(9, [2, 3, 1, 0], []), (2, [2, 3], [0, 1])])
def test_what_ends_early_does_not_wait_for_what_comes_before_it(last, ended, given_up) -> None:
    """Of prompts whose first one is completed last, a stop loses those alone that have no completion yet."""

    class Backwards:
        def __init__(self):
            self.open, self.given_up = [], []

        def submit(self, requests):
            self.open += requests

        def poll(self):
            return (Completion(self.open.pop().id, (1,), (0.0,), "stop", 0),)

        def abort(self, ids):
            self.given_up += ids

    prompts = [Prompt(place, f"p{place}", (1,)) for place in range(4)]
    engine, found = Backwards(), []
    asking = Asking(engine, [Sampling(max_tokens=1)], seed=0)
    for prompt, _ in asking.all(prompts, at_once=3, progress=lambda *_: None, stop=lambda: len(found) >= last):
        found.append(prompt.index)
    assert (found, sorted(engine.given_up)) == (ended, [f"generate/{place}/0" for place in given_up])


def test_what_cannot_be_generated_is_refused(make, generate) -> None:
    with pytest.raises(ConfigError, match="not gone on with"):
        generate(resume=True)
    with pytest.raises(ConfigError, match="no prompts"):
        make(algorithm={"name": "generate"}, scorer=None, data={"examples": "rows.jsonl"})


def test_a_policy_learns_from_candidates_and_is_evaluated_on_samples(make) -> None:
    """Each rollout has the K candidates of each prompt; evaluations sample, and KL is reported of those alone."""
    changes = {"evaluation": {"prompts": 3, "samples": 2}, "train__steps": 2, "rollout__prompts": 3}
    result = run_training(make(sampling=SEARCH, **changes))
    told = records(result.run_dir)
    samples = records(result.run_dir, "samples")
    assert len(samples) == 2 * 3 * 4
    for record in told:
        assert record["candidates/distinct"] + record["candidates/same"] == 4
        assert "kl/k1" not in record and record["reward/mean"] >= 0
    assert all("kl/k1" in evaluation.metrics for evaluation in result.evaluations.values())
    assert all(len(evaluation.samples) == 6 for evaluation in result.evaluations.values())


def test_candidates_are_labelled(make) -> None:
    found = run_labelling(make(sampling=SEARCH, algorithm={"name": "label", "samples": 4}))
    rows = lines(found.file)
    assert rows and all(2 <= len(row["completions"]) <= 4 for row in rows)
    assert found.metrics["candidates/distinct"] > 1

"""A long run makes a report that stays small, and loses no spike."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rayalign.report import figures, samples
from rayalign.report.data import load_runs, spread
from rayalign.report.summary import number
from rayalign.report.thinning import bucket_means, jsonable, thinned


def test_thinning_keeps_extremes_and_ends():
    values = np.sin(np.arange(10_000) / 50)
    values[[0, 4321, 7654, 9999]] = 0.5, 99.0, -99.0, 0.25
    values[100:200] = np.nan
    kept = thinned(values)
    assert len(kept) <= 2000 and set(kept) >= {0, 4321, 7654, 9999}
    assert np.array_equal(kept, np.unique(kept))
    assert np.array_equal(thinned(values[:2000]), np.arange(2000))
    assert len(thinned(np.full(5000, np.nan))) <= 2000


def test_bucket_means_are_unbiased():
    values = np.random.default_rng(0).exponential(size=10_000)
    steps, means = bucket_means(np.arange(10_000.0), values)
    assert len(steps) == len(means) == 1000
    assert means.mean() == pytest.approx(values.mean()) and steps.mean() == pytest.approx(4999.5)
    values[:10] = np.nan
    assert np.isnan(bucket_means(values)[0][0]) and np.isfinite(bucket_means(values)[0][1:]).all()


def test_numbers():
    assert jsonable(np.array([1.0, 0.123456789, np.nan, np.inf])) == [1, 0.123457, None, None]
    shown = [number(v) for v in (0.0, 1e-5, 0.25, -3.14159, 33.25, 8.0, 12345.6, float("nan"))]
    assert shown == ["0", "1.0e-05", "0.250", "−3.142", "33.2", "8", "12,346", "not finite"]
    assert spread(list(range(100)), 3) == [0, 50, 99] and spread([1, 2], 5) == [1, 2]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """3,000 steps, four samples of 5,000 characters each at every tenth; prompt 0 comes most often."""
    folder = tmp_path_factory.mktemp("runs") / "long"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "samples.jsonl").open("w") as written:
        for step in range(1, 3001):
            record = {"step": step, "loss": 1 / step, "reward/mean": step / 3000, "kl/k1": 0.1, "time/step_s": 2.0}
            metrics.write(json.dumps(record | {"time/update_s": 1.0}) + "\n")
            for index in range(4 if step % 10 == 0 else 0):
                prompt = 0 if index == 0 else step + index
                sample = {"step": step, "version": step - 1, "prompt": f"prompt {prompt}", "score": index}
                written.write(json.dumps({**sample, "completion": "word " * 1000, "tokens": 9}) + "\n")
    sampled = [{"prompt": f"held out {i}", "completion": f"c {i}", "score": i / 9} for i in range(40)]
    with (folder / "evaluations.jsonl").open("w") as written:
        for step in range(0, 3001, 100):
            some = [{**s, "score": s["score"] if step else 0.0} for s in sampled]
            written.write(json.dumps({"step": step, "metrics": {"reward": 0.5}, "samples": some}) + "\n")
    return load_runs([folder])


def test_curves_are_bounded(long_run):
    for panel in [*figures.learning(long_run), *figures.machine(long_run)]:
        assert all(len(trace["x"]) <= 2000 for trace in panel.figure["data"])
        assert len(json.dumps(panel.figure)) < 150_000


def test_samples_are_bounded_and_evenly_chosen(long_run):
    stories = samples.trained_on(long_run)
    assert stories[0].prompt.shown == "prompt 0" and len(stories) == samples.PROMPTS
    moments = stories[0].moments[0]
    assert [m.step for m in moments] == [10, 760, 1510, 2250, 3000] and moments[1].version == 759
    text = moments[0].completions[0].text
    assert len(text.shown) == samples.CHARACTERS and text.more == 5000 - samples.CHARACTERS


def test_held_out_prompts_from_the_greatest_rise_to_the_least(long_run):
    stories = samples.held_out(long_run)
    assert len(stories) == samples.PROMPTS
    assert (stories[0].prompt.shown, stories[-1].prompt.shown) == ("held out 39", "held out 0")
    moments = stories[0].moments[0]
    assert [m.step for m in moments] == [0, 800, 1500, 2200, 3000]
    assert [m.label for m in moments] == ["before", "during", "during", "during", "after"]


def test_held_out_prompts_are_chosen_by_all_their_completions(tmp_path):
    def scores(step: int, index: int) -> list[float]:
        """The first four rise with the prompt's index, all eight together fall with it."""
        return [step * index] * 4 + [-2.0 * step * index] * 4

    with (tmp_path / "evaluations.jsonl").open("w") as written:
        for step in (0, 1):
            some = [{"prompt": f"p{i}", "completion": "c", "score": s} for i in range(3) for s in scores(step, i)]
            written.write(json.dumps({"step": step, "metrics": {}, "samples": some}) + "\n")
    (tmp_path / "config.yaml").touch()
    stories = samples.held_out(load_runs([tmp_path]))
    assert [story.prompt.shown for story in stories] == ["p0", "p1", "p2"]
    assert [story.moments[0][-1].mean for story in stories] == [0, -0.5, -1]

"""Two runs compared: the same prompts and seeds, by a rule and by a judge; and all that may be asked in vain."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from rayalign.cli import app
from rayalign.compare import run_comparison
from rayalign.compare.sides import find_side
from rayalign.errors import ConfigError, RayalignError
from tests.loop.conftest import records
from tests.parts import tiny_config, write_prompts
from tests.tiny_models import build_tiny_llama

LONG = {"train__steps": 12, "rollout__prompts": 8, "optimizer__lr": 2e-3, "checkpoint__every": 6, "checkpoint__keep": 9}
EVALUATION = {"evaluation__prompts": 4, "evaluation__samples": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model):
    """Folder of a run that learned to like high tokens, with checkpoints 6 and 12."""
    from rayalign.api import run_training
    from rayalign.config import parse_config

    folder = tmp_path_factory.mktemp("runs")
    return run_training(parse_config(tiny_config(folder, model, **LONG, **EVALUATION))).run_dir


def test_a_trained_model_beats_the_one_that_it_began_with(runs, model, tmp_path, capsys):
    found = run_comparison(runs, model, out=tmp_path / "out")
    shown = capsys.readouterr().out
    rows = found.verdicts.rows()
    assert rows["a"]["win"][0] > 0.6 and rows["a"]["quality"][0] > rows["b"]["quality"][0]
    assert found.verdicts.lead.shape == (4, 4)
    assert f"A: {runs}" in shown and "win, %" in shown and "sign test over prompts" in shown
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["table"]["a"]["win"] == pytest.approx(rows["a"]["win"])
    assert record["a"]["model"].endswith("step-12") and len(record["pairs"]) == 16
    assert {pair["verdict"] for pair in record["pairs"]} <= {"a", "tie", "b"}


def test_the_answers_are_those_of_the_runs_own_evaluation(runs, model, tmp_path):
    """The same prompts, the same seeds: a comparison costs no other samples than an evaluation would."""
    found = run_comparison(runs, model, out=tmp_path / "out")
    evaluations = {record["step"]: record["samples"] for record in records(runs, "evaluations")}
    for side, step in ((0, 12), (1, 0)):
        texts = [sample["completion"] for sample in evaluations[step]]
        assert [pair.texts[side] for pair in found.pairs] == texts
        assert [pair.scores[side] for pair in found.pairs] == [sample["score"] for sample in evaluations[step]]


def test_turned_round_it_is_the_same_comparison(runs, tmp_path):
    step = runs / "checkpoints" / "step-6"
    one = run_comparison(runs, step, out=tmp_path / "one").verdicts
    other = run_comparison(step, runs, out=tmp_path / "other").verdicts
    assert (one.outcome() == -other.outcome()).all()
    assert one.rows()["a"] == other.rows()["b"]
    assert one.sign_test()["p"] == other.sign_test()["p"]


@pytest.mark.parametrize("asked", ["engine", "policy"])
def test_a_judge_compares_in_both_orders(runs, model, tmp_path, asked):
    """A tiny random model: which answer it prefers means nothing, that it is asked twice a pair does."""
    template = {
        "mode": "pairwise",
        "prompt": "{first} or {second}",
        "ask": "1 or 2",
        "answers": {"1": 1, "2": 0},
    }
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(template))
    ask = {"name": "policy"}
    if asked == "engine":
        ask = {"name": "engine", "model": str(model), "engine": {"name": "transformers", "max_context": 256}}
    scorer = {"name": "judge", "template": str(tmp_path / "template.yaml"), "ask": ask, "min_mass": 0.0}
    found = run_comparison(
        runs, model, overrides=[f"scorer={json.dumps(scorer)}", "engine.max_context=256"], out=tmp_path / "out"
    )
    assert all(pair.preferences is not None for pair in found.pairs)
    assert 0 <= found.verdicts.metrics["judge/order_dependent"] <= 1
    record = json.loads(found.file.read_text())
    assert record["pairs"][0]["probability_a"] == pytest.approx(found.pairs[0].preferences[0][1])
    assert record["scorer"]["name"] == "judge"


def test_what_the_judge_is_does_not_depend_on_who_lends_it_an_engine(runs, model, tmp_path):
    """`ask: policy` is the model that the run began with, as an engine of its own with that model would be."""
    (tmp_path / "template.yaml").write_text(
        yaml.safe_dump(
            {"mode": "pairwise", "prompt": "{first} or {second}", "ask": "1 or 2", "answers": {"1": 1, "2": 0}}
        )
    )
    seen = []
    for ask in (
        {"name": "policy"},
        {"name": "engine", "model": str(model), "engine": {"name": "transformers", "max_context": 256}},
    ):
        scorer = {"name": "judge", "template": str(tmp_path / "template.yaml"), "ask": ask, "min_mass": 0.0}
        found = run_comparison(
            runs,
            runs / "checkpoints" / "step-6",
            overrides=[f"scorer={json.dumps(scorer)}", "engine.max_context=256"],
            out=tmp_path / ask["name"],
        )
        seen.append([pair.preferences[0][1] for pair in found.pairs])
    assert seen[0] == pytest.approx(seen[1], abs=1e-4)


def test_a_config_of_ones_own_says_what_is_asked(runs, model, tmp_path):
    prompts = write_prompts(tmp_path / "others.jsonl", 30)
    said = tiny_config(tmp_path, model, **EVALUATION, scorer={"name": "rules", "rule": "brevity"})
    said["data"] = {"prompts": str(prompts), "held_out": 0.5}
    (tmp_path / "said.yaml").write_text(yaml.safe_dump(said))
    one = ["evaluation.samples=1"]
    found = run_comparison(runs, model, config=tmp_path / "said.yaml", overrides=one, out=tmp_path / "out")
    assert found.verdicts.lead.shape == (4, 1)
    assert all(score <= 0 for pair in found.pairs for score in pair.scores)


def test_two_runs_are_compared_on_prompts_that_both_held_out(runs, model, make, tmp_path):
    from rayalign.api import run_training

    other = run_training(make(train__steps=1, **EVALUATION, optimizer__lr=1e-9)).run_dir
    found = run_comparison(runs, other, out=tmp_path / "out")
    assert found.b.model.endswith("step-1")


def test_the_command_prints_the_table(runs, model, tmp_path):
    shown = CliRunner().invoke(
        app, ["compare", str(runs), str(model), "evaluation.samples=1", "-o", str(tmp_path / "o")]
    )
    assert shown.exit_code == 0, shown.output
    assert "4 held-out prompts × 1, scorer tests.parts:Tokens" in shown.output
    assert (tmp_path / "o" / "comparison.json").is_file()


def failing(tmp_path, a, b, **more) -> RayalignError:
    with pytest.raises(RayalignError) as caught:
        run_comparison(a, b, out=tmp_path / "out", **more)
    assert not (tmp_path / "out" / "comparison.json").exists()
    error = caught.value
    assert error.what and error.where and error.rule and error.remedy
    return error


def test_the_same_model_twice_is_refused(runs, tmp_path):
    error = failing(tmp_path, runs, runs / "checkpoints" / "step-12")
    assert (error.where, error.what) == ("RUN_B", "this is the same model twice")


def test_other_held_out_prompts_are_refused(runs, make, tmp_path):
    from rayalign.api import run_training

    other = run_training(make(train__steps=1, data__shuffle_seed=1, evaluation__prompts=8)).run_dir
    error = failing(tmp_path, runs, other)
    assert error.what == "the two runs hold out different prompts" and "--config" in error.remedy
    assert "in common, of 4 of" in error.value


def test_a_run_that_was_evaluated_on_fewer_of_the_same_prompts_can_be_compared(runs, make, tmp_path):
    from rayalign.api import run_training

    other = run_training(make(train__steps=1, evaluation__prompts=2)).run_dir
    assert run_comparison(runs, other, out=tmp_path / "out").verdicts.lead.shape == (4, 4)


def test_folders_that_hold_nothing_are_refused(runs, model, tmp_path):
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    assert failing(tmp_path, empty, model).what == "this is neither a run nor a checkpoint"
    (empty / "config.yaml").write_text((runs / "config.yaml").read_text())
    error = failing(tmp_path, model, empty)
    assert (error.what, error.where) == ("this run has no checkpoint", "RUN_B")
    assert failing(tmp_path, tmp_path / "nothing", model).what == "there is no such folder"
    torn = empty / "checkpoints" / "step-3"
    torn.mkdir()
    assert failing(tmp_path, empty, model).what == "this run's newest checkpoint holds no model"


def test_a_reward_model_writes_no_answers(runs, model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    for folder in (tmp_path / "reward", tmp_path / "run" / "checkpoints" / "step-4"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    (tmp_path / "run" / "config.yaml").write_text((runs / "config.yaml").read_text())
    for given in ("reward", "run"):
        assert failing(tmp_path, tmp_path / given, model).what == "this model gives scores and writes no answers"


def test_a_run_in_stages_is_pointed_into(runs, model, tmp_path):
    stage = tmp_path / "staged" / "stages" / "dpo"
    stage.mkdir(parents=True)
    for folder in (stage, stage.parent.parent):
        (folder / "config.yaml").write_text((runs / "config.yaml").read_text())
    assert str(stage) in failing(tmp_path, stage.parent.parent, model).remedy


def test_models_alone_need_a_config_and_a_config_a_scorer_and_prompts(runs, model, tmp_path):
    other = build_tiny_llama(tmp_path / "other", seed=3)
    assert "--config" in failing(tmp_path, other, model).remedy
    said = tiny_config(tmp_path, model, **EVALUATION)
    said["algorithm"] = {"name": "preference"}
    said["data"] = {"examples": str(tmp_path / "pairs.jsonl"), "held_out": 0.5}
    rows = [{"prompt": f"review {n}", "chosen": "good", "rejected": "bad"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said.pop("scorer")
    (tmp_path / "said.yaml").write_text(yaml.safe_dump(said))
    error = failing(tmp_path, other, model, config=tmp_path / "said.yaml")
    assert (error.what, error.where) == ("nothing says which answer is better", "key scorer")
    scorer = 'scorer={"name": "rules", "rule": "brevity"}'
    error = failing(tmp_path, other, model, config=tmp_path / "said.yaml", overrides=[scorer, "evaluation.prompts=0"])
    assert error.what == "nothing is held out"
    found = run_comparison(other, model, config=tmp_path / "said.yaml", overrides=[scorer], out=tmp_path / "rows")
    assert found.verdicts.lead.shape == (4, 4)  # the prompts of held-out rows


def test_nothing_is_overwritten_and_no_tie_is_negative(runs, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.json").write_text("{}")
    with pytest.raises(ConfigError, match="there is a comparison in this folder"):
        run_comparison(runs, model, out=tmp_path / "out")
    assert (tmp_path / "out" / "comparison.json").read_text() == "{}"
    for tie in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="cannot be that close"):
            run_comparison(runs, model, tie=tie, out=tmp_path / "new")


def test_what_looks_like_a_hub_id_is_taken_for_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_side("someone/some-model", "RUN_A").model == "someone/some-model"
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match="no such folder"):
        find_side("runs/typo", "RUN_A")

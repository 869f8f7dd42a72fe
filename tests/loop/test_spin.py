"""Self-play runs: the opponent is the previous iterate, and answers once an iteration."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rayalign.api import run_evaluation, run_training
from rayalign.checkpoint import load_state
from rayalign.config import parse_job
from rayalign.engines.transformers import TransformersEngineConfig
from rayalign.errors import ConfigError, DataError, TrainingStopped
from rayalign.rounds import run_rounds
from rayalign.scorers.base import ScorerConfig
from rayalign.types import Judgement
from tests.loop.conftest import records, timeless
from tests.loop.spin_parts import ITERATIONS, STEPS, generated, self_play, sft_rows, write
from tests.parts import PowerCut


@pytest.fixture
def config(tmp_path, model):
    return self_play(tmp_path, model)


def test_the_data_is_learned_from_play_with_oneself(config):
    result = run_training(config(optimizer__lr=5e-3, algorithm__steps=10, algorithm__iterations=3))
    steps = records(result.run_dir)
    assert result.step == 30 and [r["step"] for r in steps] == list(range(1, 31))
    assert sorted(result.evaluations) == [0, 10, 20, 30]  # at each iteration's end, whatever evaluation.every is
    before, after = (result.evaluations[step].metrics for step in (0, 30))
    assert after["held_out/nll"] < before["held_out/nll"]
    assert abs(after["gap"]) < abs(before["gap"])  # the data become as likely as what it writes itself
    assert before["win_rate"] == 0.5 == before["win_rate/ties"] / 2 and after["win_rate/ties"] < 1.0
    assert after["win_rate/low"] <= after["win_rate"] <= after["win_rate/high"]
    assert "kl/k1" not in after  # the reference is the policy by then
    for t in range(3):
        first = steps[10 * t]
        assert first["generation/answers"] == 15.0 and first["time/rollout_s"] > 0
        assert "generation/answers" not in steps[10 * t + 1]
        assert first["spin/gap"] == pytest.approx(0.0, abs=1e-6) and first["loss"] == pytest.approx(np.log(2))
        assert steps[10 * t + 9]["spin/gap"] > 1.0
    assert (result.run_dir / "report.html").is_file()


def test_the_opponent_is_the_previous_iterate(config, tmp_path):
    """Its answers are those of the checkpoint at the iteration's beginning, and the reference's log-probs are too."""
    settings = config(checkpoint__keep=9)
    run_dir = run_training(settings).run_dir
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-3", "step-6", "step-9"]
    paths = {0: settings.model.path, 1: run_dir / "checkpoints/step-3", 2: run_dir / "checkpoints/step-6"}
    from rayalign.build import examples_for, learner_specs, load_tokenizer
    from rayalign.opponents import settled
    from rayalign.protocols import Roles
    from rayalign.rollouts import sample_seed
    from rayalign.types import Request

    tokenizer = load_tokenizer(settings)
    rows = examples_for(settings, tokenizer)
    for t, path in paths.items():
        engine = TransformersEngineConfig(name="transformers", max_context=64, dtype="float32").build(
            model=str(path), name="again", cores=None, seed=0, trust_remote_code=False
        )
        wanted = [rows.row(n) for n in range(15)]
        sampling = settings.sampling.sampling()
        sampling = type(sampling)(**{**sampling.__dict__, "stop_token_ids": rows.end})
        engine.submit(
            [
                Request(str(n), g.prompt.token_ids, sampling, sample_seed(0, f"generation-{t}", g.prompt.index, 0))
                for n, g in enumerate(wanted)
            ]
        )
        done = {}
        while len(done) < 15:
            done |= {int(c.request_id): c.token_ids for c in engine.poll()}
        engine.close()
        assert {n: tuple(a["token_ids"]) for n, a in generated(run_dir, t).items()} == done
    specs = learner_specs(settled(settings, rows.rows), tokenizer, policy=None, train=True)
    for step in (3, 6, 9):  # as each iteration begins, the two are one
        learners = settings.learner.build(specs, rank=0, world_size=1, address=("127.0.0.1", 0))
        roles = Roles(learners["policy"], learners["reference"])
        load_state(run_dir / f"checkpoints/step-{step}", roles)
        probe = [g.prompt.token_ids + g.completions[0].token_ids for g in wanted[:3]]
        for a, b in zip(roles.policy.logps(probe), roles.reference.logps(probe), strict=True):
            assert np.array_equal(a, b)
        for learner in list(learners.values()):
            learner.close()


def test_iterations_differ_and_previous_samples_are_mixed_in(config):
    run_dir = run_training(config()).run_dir
    answers = [{n: a["token_ids"] for n, a in generated(run_dir, t).items()} for t in range(ITERATIONS)]
    assert answers[0] != answers[1] != answers[2]
    shares = [record["spin/previous"] for record in records(run_dir)]
    assert shares[:3] == [0.0] * 3 and 0.2 < np.mean(shares[3:]) < 0.8
    assert [record["spin/iteration"] for record in records(run_dir)] == [0.0] * 3 + [1.0] * 3 + [2.0] * 3


def test_without_mixing_each_pass_takes_every_pair_of_the_iteration_once(config, tmp_path):
    run_dir = run_training(config(algorithm__mix_previous=False)).run_dir
    assert all(record["spin/previous"] == 0.0 for record in records(run_dir))


def test_with_adapters_the_reference_is_an_adapter_that_is_replaced(config, tmp_path):
    changes = {"model__lora": {"rank": 4, "alpha": 8}, "optimizer__lr": 1e-2, "algorithm__iterations": 2}
    whole = run_training(config(**changes, run_dir=str(tmp_path / "whole"))).run_dir
    steps = records(whole)
    for first in (steps[0], steps[STEPS]):
        assert first["spin/gap"] == pytest.approx(0.0, abs=1e-5)
    assert steps[STEPS - 1]["spin/gap"] > 0.1
    changes["run_dir"] = str(tmp_path / "killed")
    with pytest.raises(PowerCut):
        run_training(config(**changes, trackers=[{"name": "tests.parts:Stop", "step": STEPS + 2}]))
    resumed = run_training(config(**changes, resume=True)).run_dir
    assert [timeless(r) for r in records(resumed)] == [timeless(r) for r in records(whole)]


def test_a_win_rate_that_nobody_can_know_is_refused_or_named(config, capsys):
    judge = {"name": "judge", "ask": {"name": "policy"}, "template": "positive"}
    for changes, expected in (
        ({"evaluation__before": False}, "before the first step"),
        ({"scorer": judge}, "the judge would be the policy itself"),
    ):
        with pytest.raises(ConfigError, match=expected):
            config(**changes)
    changes = {"algorithm__iterations": 1}
    first = run_training(config(**changes))
    (first.run_dir / "generations/start.jsonl").write_text("{}")
    again = run_training(config(algorithm__iterations=2, resume=True))
    assert "win_rate" in first.evaluations[3].metrics and "win_rate" not in again.evaluations[6].metrics
    assert "no win rate: start.jsonl holds other answers" in " ".join(capsys.readouterr().err.split())


def test_lambda_and_the_learning_rate_change_by_iteration(config):
    changes = {"algorithm__lam": [1.0, 1.0, 5.0], "algorithm__lr_scale": [1.0, 0.1], "optimizer__warmup_steps": 2}
    steps = records(run_training(config(**changes)).run_dir)
    assert [r["lr"] for r in steps] == pytest.approx([1e-3, 2e-3, 2e-3, *[1e-4, 2e-4, 2e-4] * 2])
    for r in steps:
        lam = 5.0 if r["spin/iteration"] == 2.0 else 1.0
        assert r["rewards/margins"] == pytest.approx(lam * r["spin/gap"], rel=1e-4, abs=1e-6)


def test_epochs_become_steps_once_the_rows_are_known(config):
    result = run_training(config(algorithm__steps=None, algorithm__epochs=1, algorithm__iterations=2))
    assert result.step == 3 + 6  # 15 rows, then 30 pairs with the previous ones, 5 a step
    assert "steps: \n  - 3\n  - 6" in re.sub(r"steps:\n", "steps: \n", (result.run_dir / "config.yaml").read_text())


def test_a_run_without_a_scorer_is_measured_by_likelihood(config):
    result = run_training(config(scorer=None))
    assert {"held_out/nll", "gap", "gap_per_token"} <= result.evaluations[9].metrics.keys()
    assert "win_rate" not in result.evaluations[9].metrics and result.evaluations[9].samples == ()


def test_a_checkpoint_is_evaluated(config, tmp_path, monkeypatch):
    settings = config()
    result = run_training(settings)
    monkeypatch.chdir(tmp_path)
    found = run_evaluation(settings, model=str(result.run_dir / "checkpoints/step-9"))
    last = result.evaluations[9]
    assert found.metrics["held_out/nll"] == pytest.approx(last.metrics["held_out/nll"], abs=1e-5)
    assert [s.completion for s in found.samples] == [s.completion for s in last.samples]


def test_empty_answers_of_the_data(config, tmp_path, capsys):
    rows = sft_rows()
    rows[3]["completion"] = rows[7]["completion"] = " "
    with pytest.raises(DataError, match="an answer is empty") as error:
        run_training(config(rows))
    assert error.value.where.endswith("sft.jsonl:4")
    result = run_training(config(rows, data__on_bad_row="skip"))
    assert records(result.run_dir)[0]["generation/answers"] == 14.0
    assert "2 skipped (2 × an answer is empty)" in " ".join(capsys.readouterr().err.split())


def test_prompts_that_leave_no_room(config, tmp_path):
    rows = sft_rows()
    rows[2]["prompt"] = "a film " * 40
    settings = {"data__max_tokens": 200, "data__held_out": 0.0}
    result = run_training(config(rows, **settings))
    first = records(result.run_dir)[0]
    assert (first["generation/answers"], first["generation/left_out"]) == (19.0, 1.0)
    assert sum(r.get("pairs/without_opponent", 0.0) for r in records(result.run_dir)) > 0
    with pytest.raises(DataError, match="leaves no room") as error:
        run_training(config(rows, **settings, data__long_prompts="refuse", run_dir=str(tmp_path / "refused")))
    assert error.value.where == "data.examples, row 3"
    long = [{**row, "prompt": row["prompt"] + " a film" * 40} for row in rows]
    with pytest.raises(TrainingStopped, match="no prompt was answered"):
        run_training(config(long, **settings, run_dir=str(tmp_path / "long")))


REFUSED = {
    "prompts": ({"data__prompts": "prompts.jsonl"}, "prompts from the rows"),
    "steps and epochs": ({"algorithm__epochs": 2}, "both a number of steps and of passes"),
    "other steps": ({"train__steps": 5}, "a run ends where its iterations end"),
    "too many": ({"algorithm__lam": [1.0] * 4}, "4 values for 3 iterations"),
    "depth": ({"rollout__depth": 1}, "no samples that could be old"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(config, case):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize("key", ["stream", "weight"])
def test_rows_that_cannot_be_counted_are_refused(config, tmp_path, key):
    source = {"path": write(tmp_path / "rows.jsonl", sft_rows()), key: {"stream": True, "weight": 1.0}[key]}
    with pytest.raises(ConfigError, match="answers each row once an iteration"):
        config(data__examples=source)


class Opinion(ScorerConfig):
    """A judge's word instead of scores: the answer with the lower first token is better with certainty."""

    name: str

    def start(self):
        def judge(groups):
            found = []
            for group in groups:
                firsts = [completion.token_ids[0] for completion in group.completions]
                table = tuple(tuple(0.5 if a == b else float(a < b) for b in firsts) for a in firsts)
                found.append(Judgement(tuple(map(float, firsts)), table))  # scores that say the opposite
            return found

        return judge


def test_a_judges_preferences_are_its_word(config):
    found = run_training(config(scorer={"name": "tests.loop.test_spin:Opinion"}, optimizer__lr=5e-3)).evaluations
    kept = found[9].samples
    wins = [0.5 * (1 + np.sign(now.score - then.score)) for now, then in zip(kept, found[0].samples, strict=True)]
    assert found[9].metrics["win_rate"] == pytest.approx(1 - np.mean(wins))  # the score is the first token here
    assert 0 < np.mean(wins) != 0.5


def test_a_stage_of_rounds(config, tmp_path):
    """Fine-tuning, and self-play from what it wrote."""
    base = config().to_dict() | {"run_dir": str(tmp_path / "rounds")}
    spin = base.pop("algorithm")
    base["train"] = {"steps": 9}
    stages = [{"name": "sft", "algorithm": "sft"}, {"name": "play", "algorithm": spin}]
    result = run_rounds(parse_job({**base, "rounds": stages}))
    assert list(result.ran) == ["sft", "play"]
    play = tmp_path / "rounds/stages/play"
    assert len(records(play)) == 9 and sorted(generated(play, 2)) == list(range(15))
    again = run_rounds(parse_job({**base, "rounds": stages, "resume": True}))
    assert not again.ran

"""Self-play runs: the opponent is the previous iterate, and answers once an iteration; runs resume exactly."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from rayalign.api import run_evaluation, run_training
from rayalign.checkpoint import load_state
from rayalign.config import parse_config, parse_job
from rayalign.engines.transformers import TransformersEngine, TransformersEngineConfig
from rayalign.errors import ConfigError, DataError, TrainingStopped
from rayalign.rounds import run_rounds
from rayalign.scorers.base import ScorerConfig
from rayalign.types import Judgement
from tests.loop.conftest import records, timeless
from tests.parts import PowerCut, tiny_config

ROWS = 20  # 15 of them to train on
ITERATIONS, STEPS = 3, 3
WORDS = "film review story actor space opera happy sad love hate".split()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft_rows(count=ROWS):
    prompts = (f"write about {WORDS[i % 10]} {i}" for i in range(count))
    return [{"prompt": prompt, "completion": f"a {WORDS[i % 7]} film"} for i, prompt in enumerate(prompts)]


@pytest.fixture
def config(tmp_path, model):
    """A tiny self-play run, everything in this process. `changes` are keys with __ for dots."""

    def build(rows=None, **changes):
        base = tiny_config(tmp_path, model)
        base |= {
            "algorithm": {"name": "spin", "iterations": ITERATIONS, "steps": STEPS, "lam": 1.0, "shard": 4},
            "data": {
                "examples": write(tmp_path / "sft.jsonl", sft_rows() if rows is None else rows),
                "chat_template": False,
                "held_out": 0.25,
                "max_tokens": 48,
            },
            "rollout": {"prompts": 5},
            "optimizer": {"lr": 2e-3},
            "evaluation": {"prompts": 3, "samples": 2},
        }
        del base["train"]
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = base
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return parse_config(base)

    return build


def generated(run_dir, iteration):
    """Row → answer, as the files say."""
    found = {}
    for path in sorted((run_dir / f"generations/iteration-{iteration}").glob("shard-*.jsonl")):
        for line in path.read_text().splitlines()[1:]:
            answer = json.loads(line)
            found[answer["row"]] = answer
    return found


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


def test_lambda_and_the_learning_rate_change_by_iteration(config):
    changes = {"algorithm__lam": [1.0, 1.0, 5.0], "algorithm__lr_scale": [1.0, 0.1], "optimizer__warmup_steps": 2}
    steps = records(run_training(config(**changes)).run_dir)
    assert [r["lr"] for r in steps] == pytest.approx([1e-3, 2e-3, 2e-3, *[1e-4, 2e-4, 2e-4] * 2])
    for r in steps:
        lam = 5.0 if r["spin/iteration"] == 2.0 else 1.0
        assert r["rewards/margins"] == pytest.approx(lam * r["spin/gap"], rel=1e-4, abs=1e-6)


class Cut(TransformersEngine):
    """An engine whose process is killed, or that the run is asked to stop, after so many answers."""

    after = 0
    signal: int | None = None

    def poll(self, timeout_s=1.0):
        done = super().poll(timeout_s)
        Cut.after -= len(done)
        if Cut.after < 0 <= Cut.after + len(done):
            if self.signal is None:
                raise PowerCut("the power went out")
            import os

            os.kill(os.getpid(), self.signal)
        return done


class CutConfig(TransformersEngineConfig):
    name: str
    signal: int | None = None

    def build(self, **arguments):
        engine = Cut(self, **arguments)
        engine.signal = self.signal
        return engine


def whole_and_cut(config, tmp_path, *, after, engine=None, **changes):
    """Records of a run that was never stopped, and the folder of one that was cut after so many answers."""
    whole = run_training(config(run_dir=str(tmp_path / "whole"), **changes)).run_dir
    cut = {"name": "tests.loop.test_spin:CutConfig", "max_context": 64, "max_running": 2, **(engine or {})}
    Cut.after = after
    return whole, {"run_dir": str(tmp_path / "cut"), "engine": cut, **changes}


EVALUATED = 6  # answers before the first iteration begins


@pytest.mark.parametrize("after", [0, 2, 7, 14])
def test_a_kill_during_generation_loses_what_was_in_hand_alone(config, tmp_path, after):
    whole, cut = whole_and_cut(config, tmp_path, after=EVALUATED + after)
    with pytest.raises(PowerCut):
        run_training(config(**cut))
    folder = tmp_path / "cut/generations/iteration-0"
    kept = sum(len(path.read_text().splitlines()) - 1 for path in folder.glob("shard-*"))
    assert after - 2 <= kept <= after + 1
    resumed = run_training(config(**cut, resume=True)).run_dir
    log = (resumed / "log/driver.log").read_text()
    assert [timeless(r) for r in records(resumed)] == [timeless(r) for r in records(whole)]
    assert [timeless(r) for r in records(resumed, "evaluations")] == records(whole, "evaluations")
    for t in range(ITERATIONS):
        assert generated(resumed, t) == generated(whole, t)
    assert not list(folder.glob("*.part")) and "died" not in log


def test_a_kill_in_a_later_iteration_goes_on_there(config, tmp_path):
    whole, cut = whole_and_cut(config, tmp_path, after=2 * (EVALUATED + 15) - 5, evaluation__every=0)
    with pytest.raises(PowerCut):
        run_training(config(**cut))
    before = {p: p.read_bytes() for p in (tmp_path / "cut/generations").rglob("shard-*.jsonl")}
    assert {p.parent.name for p in before} == {"iteration-0", "iteration-1"}
    assert (tmp_path / "cut/checkpoints/step-3").is_dir()  # the iteration's beginning is kept of itself
    resumed = run_training(config(**cut, resume=True)).run_dir
    assert {p: p.read_bytes() for p in before} == before
    assert [timeless(r) for r in records(resumed)] == [timeless(r) for r in records(whole)]


@pytest.mark.parametrize("killed_at", [1, 3, 4, 6, 9])
def test_a_kill_in_training_is_made_good_bit_for_bit(config, tmp_path, killed_at):
    changes = {"checkpoint__every": 2}
    whole = run_training(config(run_dir=str(tmp_path / "whole"), **changes)).run_dir
    changes["run_dir"] = str(tmp_path / "killed")
    with pytest.raises(PowerCut):
        run_training(config(**changes, trackers=[{"name": "tests.parts:Stop", "step": killed_at}]))
    resumed = run_training(config(**changes, resume=True))
    assert resumed.step == ITERATIONS * STEPS
    assert [timeless(r) for r in records(resumed.run_dir)] == [timeless(r) for r in records(whole)]
    assert records(resumed.run_dir, "evaluations") == records(whole, "evaluations")


def test_a_signal_in_generation_stops_calmly_and_keeps_the_answers(config, tmp_path):
    import signal

    engine = {"signal": int(signal.SIGTERM)}
    whole, cut = whole_and_cut(config, tmp_path, after=EVALUATED + 7, engine=engine)
    result = run_training(config(**cut))
    assert (result.step, result.stopped) == (0, True)
    assert len(generated(tmp_path / "cut", 0)) >= 4
    resumed = run_training(config(**cut, resume=True)).run_dir
    assert [timeless(r) for r in records(resumed)] == [timeless(r) for r in records(whole)]


@pytest.mark.parametrize("damage", ["torn", "foreign"])
def test_a_damaged_shard_is_noticed_and_answered_again(config, tmp_path, damage, capsys):
    whole, cut = whole_and_cut(config, tmp_path, after=EVALUATED + 13)
    with pytest.raises(PowerCut):
        run_training(config(**cut))
    shard = tmp_path / "cut/generations/iteration-0/shard-0001.jsonl"
    if damage == "torn":
        shard.write_bytes(shard.read_bytes()[:-20])
    else:
        shutil.copy(whole / "generations/iteration-1/shard-0001.jsonl", shard)
    resumed = run_training(config(**cut, resume=True)).run_dir
    assert [timeless(r) for r in records(resumed)] == [timeless(r) for r in records(whole)]
    told = " ".join(capsys.readouterr().err.split())
    wanted = "is torn" if damage == "torn" else "holds other answers"
    assert f"shard-0001.jsonl {wanted}" in told and "set aside" in told
    assert shard.with_name(f"{shard.name}.set-aside").is_file()


def test_answers_that_are_lost_when_their_opponent_is_gone_are_left_out_and_counted(config, tmp_path, capsys):
    changes = {"run_dir": str(tmp_path / "run"), "checkpoint__every": 1}
    with pytest.raises(PowerCut):
        run_training(config(**changes, trackers=[{"name": "tests.parts:Stop", "step": 5}]))
    (tmp_path / "run/generations/iteration-1/shard-0002.jsonl").unlink()
    result = run_training(config(**changes, resume=True))
    assert result.step == ITERATIONS * STEPS
    assert "4 answers are lost" in " ".join(capsys.readouterr().err.split())
    after = [r for r in records(result.run_dir) if r["step"] > 4]
    assert sum(r.get("pairs/without_opponent", 0.0) for r in after) > 0


def test_a_run_that_goes_back_behind_an_iteration_does_not_take_its_answers(config, tmp_path, capsys):
    changes = {"run_dir": str(tmp_path / "run"), "checkpoint__every": 1, "checkpoint__keep": 99}
    run_training(config(**changes))
    for step in range(2, 10):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step}")
    before = generated(tmp_path / "run", 1)
    run_training(config(**changes, resume=True))
    told = " ".join(capsys.readouterr().err.split())
    assert "iteration-1 was answered by a later policy than the checkpoint's" in told
    assert generated(tmp_path / "run", 1) == before  # float32: the same policy is trained again


def test_more_iterations_are_added_to_a_run(config, tmp_path):
    changes = {"run_dir": str(tmp_path / "run")}
    run_training(config(**changes, algorithm__iterations=2))
    more = run_training(config(**changes, resume=True))
    whole = run_training(config(run_dir=str(tmp_path / "whole")))
    assert more.step == 9
    assert [timeless(r) for r in records(more.run_dir)] == [timeless(r) for r in records(whole.run_dir)]


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

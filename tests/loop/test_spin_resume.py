"""Self-play that is cut short, in generation or in training, goes on exactly where it was; damage is noticed."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from rayalign.api import run_training
from rayalign.engines.transformers import TransformersEngine, TransformersEngineConfig
from tests.loop.conftest import records, timeless
from tests.loop.spin_parts import ITERATIONS, STEPS, generated, self_play
from tests.parts import PowerCut


@pytest.fixture
def config(tmp_path, model):
    return self_play(tmp_path, model)


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
    cut = {"name": "tests.loop.test_spin_resume:CutConfig", "max_context": 64, "max_running": 2, **(engine or {})}
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

"""A killed run goes on as if it had never stopped."""

from __future__ import annotations

import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
from filelock import FileLock

from rayalign.checkpoint import Checkpoints, TrainerState
from rayalign.errors import ActorError, CheckpointError, ConfigError
from tests.loop.conftest import records, timeless
from tests.parts import PowerCut

STEPS = 5
VARIANTS = {
    "plain": {},
    "depth": {"rollout__depth": 1},
    "reused": {"rollout__resample_every": 3},
    "moving reference": {"algorithm__reference": {"update": "average", "decay": 0.9}, "train__minibatches": 2},
}


def settings(tmp_path, name, variant):
    return {
        "train__steps": STEPS,
        "checkpoint__every": 1,
        "checkpoint__keep": 99,
        "evaluation__prompts": 2,
        "run_dir": str(tmp_path / name),
        **VARIANTS[variant],
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("killed_at", range(1, STEPS + 1))
def test_resumed_metrics_are_the_same_bit_for_bit(train, tmp_path, killed_at, variant):
    whole = train(**settings(tmp_path, "whole", variant)).run_dir
    # Dies after the record of a step was written and before its checkpoint: the step is taken again.
    with pytest.raises(PowerCut):
        train(**settings(tmp_path, "killed", variant), trackers=[{"name": "tests.parts:Stop", "step": killed_at}])
    resumed = train(**settings(tmp_path, "killed", variant), resume=True)
    assert resumed.step == STEPS
    expected = [timeless(r) for r in records(whole)]
    assert [timeless(r) for r in records(resumed.run_dir)] == expected
    for name in ("samples", "evaluations"):
        assert records(resumed.run_dir, name) == records(whole, name)


def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(train, tmp_path):
    changes = {**settings(tmp_path, "run", "plain"), "checkpoint__every": 0}
    stop = [{"name": "tests.parts:Stop", "step": 2, "signal": int(signal.SIGTERM)}]
    result = train(**changes, trackers=stop)
    assert (result.step, result.stopped) == (2, True)
    assert train(**changes, resume=True).step == STEPS
    whole = train(**{**changes, "run_dir": str(tmp_path / "whole")}).run_dir
    assert [timeless(r) for r in records(tmp_path / "run")] == [timeless(r) for r in records(whole)]


def test_a_run_that_dies_in_its_last_evaluation_keeps_its_last_step(train, tmp_path):
    changes = {**settings(tmp_path, "run", "plain"), "checkpoint__every": 0}
    stop = {"name": "tests.parts:Stop", "step": STEPS, "at": "eval/reward"}
    with pytest.raises(PowerCut):
        train(**changes, trackers=[stop])
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{STEPS}"]
    resumed = train(**changes, resume=True)
    assert (resumed.step, sorted(resumed.evaluations)) == (STEPS, [0, STEPS])


def test_a_folder_that_another_run_uses_is_left_alone(train, tmp_path):
    changes = settings(tmp_path, "run", "plain")
    train(**{**changes, "train__steps": 1})
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json*")}
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ConfigError, match="another run is using this folder"):
        train(**changes, resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json*")} == before
    assert train(**changes, resume=True).step == STEPS


def test_only_the_newest_checkpoints_are_kept(train, tmp_path):
    run_dir = train(**{**settings(tmp_path, "run", "plain"), "checkpoint__keep": 2}).run_dir
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-4", "step-5"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_ones(train, tmp_path):
    changes = settings(tmp_path, "run", "plain")
    train(**{**changes, "train__steps": 2})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # no file may grow beyond this: what a full disk does to a writer
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(CheckpointError, match="could not be written; older ones are untouched"):
            train(**changes, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-1", "step-2"]
    assert train(**changes, resume=True).step == STEPS


@pytest.mark.parametrize(
    ("free", "wanted", "message"), [(0, CheckpointError, "free disk space"), (2**40, ActorError, "unexpected pos")]
)
def test_a_learner_elsewhere_that_finds_the_disk_full_is_understood(free, wanted, message, tmp_path, monkeypatch):
    """torch's writer says `unexpected pos` and no more, and it says so in another process."""

    class Learner:
        def export(self, folder):
            raise ActorError(
                "save of the policy: RuntimeError: unexpected pos 538085184 vs 538085072", where="learner-0"
            )

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(wanted, match=message) as caught:
        Checkpoints(tmp_path, keep=1).save(TrainerState(1), SimpleNamespace(policy=Learner()), None)
    assert "unexpected pos" in str(caught.value) and not list(tmp_path.iterdir())


def test_an_existing_run_is_not_overwritten_and_a_missing_one_not_resumed(train, tmp_path):
    (tmp_path / "run" / "log").mkdir(parents=True)
    (tmp_path / "run" / "log" / "driver.log").write_text("a run that failed before its first step")
    train(train__steps=1)
    with pytest.raises(ConfigError, match="this run directory exists"):
        train(train__steps=1)
    with pytest.raises(ConfigError, match="there is no run in this folder"):
        train(run_dir=str(tmp_path / "nothing"), resume=True)
    with pytest.raises(ConfigError, match="there is nothing to resume"):
        train(run_dir=None, resume=True)


def test_a_damaged_checkpoint_is_named(train, tmp_path):
    changes = settings(tmp_path, "run", "plain")
    train(**{**changes, "train__steps": 2})
    (tmp_path / "run" / "checkpoints" / "step-2" / "trainer" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        train(**changes, resume=True)

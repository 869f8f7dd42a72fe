"""Roles in groups of actors of their own give the run that they give beside the policy."""

from __future__ import annotations

import pytest

from rayalign.api import run_training
from tests.loop.conftest import records, timeless
from tests.ray.conftest import LIGHT

PPO = {"name": "ppo", "samples": 4, "reference": {"update": "average", "decay": 0.5}}
APART = {"critic": {"ranks": 1, "zero_stage": 0}, "reference": {"apart": True, "zero_stage": 3}}


def test_critic_and_reference_apart_are_as_beside(make, tmp_path, shared):
    """PPO with a reference that follows: the same numbers in one process, where all roles are beside one another."""
    changes = {"algorithm": PPO, "train__steps": 3}
    local = run_training(make(run_dir=str(tmp_path / "local"), **changes)).run_dir
    apart = {**LIGHT, "learner": {**LIGHT["learner"], "roles": APART}}
    remote = run_training(make(run_dir=str(tmp_path / "remote"), **changes, **apart)).run_dir
    for ours, theirs in zip(records(local), records(remote), strict=True):
        ours, theirs = timeless(ours), timeless(theirs)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert theirs[key] == pytest.approx(value, abs=1e-3), key
    assert abs(records(local)[-1]["kl/k1"]) > 0  # the reference is not the policy
    logs = {path.name for path in (remote / "log").iterdir()}
    assert {"learner-0.log", "critic-0.log", "reference-0.log"} <= logs
    saved = remote / "checkpoints" / "step-3" / "trainer"
    assert {path.name for path in saved.iterdir()} >= {"policy", "critic", "reference"}

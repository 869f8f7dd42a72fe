"""Killed actors, deadlines, signals, corrupted weights: named, and nothing lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
import ray
import yaml

from rayalign.api import run_training
from rayalign.errors import ActorError, ConfigError, EngineLost, LearnerLost, SyncMismatch
from rayalign.protocols import UpdatePlan
from tests.loop.conftest import records, timeless
from tests.parts import tiny_config
from tests.ray.conftest import LIGHT, RAY
from tests.ray.test_placements_agree import draw


def pid_of(actor):
    return ray.get(actor.process_id.remote())


def test_an_engine_killed_during_a_rollout_is_replaced_and_the_samples_are_the_same(make, start):
    config = make(sampling__max_tokens=48, **RAY)
    with start(config) as parts:
        parts.engine.load(parts.roles.policy.push(7))
        whole = draw(config, parts)
        first = pid_of(parts.engine.members[0].actor)
        submit = parts.engine.submit

        def submit_and_kill(requests):
            submit(requests)
            os.kill(first, signal.SIGKILL)

        parts.engine.submit = submit_and_kill
        again = draw(config, parts)
        assert pid_of(parts.engine.members[0].actor) != first
    assert [(c.token_ids, c.version) for g in again for c in g.completions] == [
        (c.token_ids, 7) for g in whole for c in g.completions
    ]


def test_an_engine_that_dies_too_often_is_given_up(make, start):
    config = make(**{**LIGHT, "engine": {**LIGHT["engine"], "max_replacements": 0}})
    with start(config) as parts:
        os.kill(pid_of(parts.engine.members[0].actor), signal.SIGKILL)
        with pytest.raises(EngineLost, match=r"engine-0 died, and no replacement is left"):
            draw(config, parts)


def test_a_scorer_that_dies_is_replaced(make, start):
    config = make(**LIGHT)
    with start(config) as parts:
        whole = draw(config, parts)
        os.kill(pid_of(parts.scorer.members[0].actor), signal.SIGKILL)
        assert [g.scores for g in draw(config, parts)] == [g.scores for g in whole]


def test_an_engine_that_does_not_answer_is_named_at_its_deadline(make, start):
    config = make(**{**LIGHT, "engine": {**LIGHT["engine"], "deadline_s": 3, "max_replacements": 0}})
    with start(config) as parts:
        process = psutil.Process(pid_of(parts.engine.members[0].actor))
        process.suspend()
        try:
            with pytest.raises(EngineLost, match="engine-0: no answer to .* within the deadline"):
                draw(config, parts)
        finally:
            process.resume()


def test_a_learner_rank_that_dies_ends_the_call_with_its_name(make, start):
    config = make(**{**LIGHT, "learner": {**LIGHT["learner"], "ranks": 2}})
    with start(config) as parts:
        groups = draw(config, parts)
        examples, _ = config.algorithm.examples(groups)
        os.kill(pid_of(parts.roles.policy._group.actors[1]), signal.SIGKILL)
        with pytest.raises(LearnerLost, match="learner-1 died") as error:
            parts.roles["reference"].annotate(examples, (config.algorithm.needs[0][1],))
        assert "learner-1.log" in str(error.value)
        assert "resume=true" in str(error.value)


def test_a_rank_that_dies_inside_a_collective_call_is_named_too(make, start):
    """The survivor's own error (its connection broke) comes first, and is not the cause."""
    config = make(optimizer__lr=1e-5, **{**LIGHT, "learner": {**LIGHT["learner"], "ranks": 2}})
    with start(config) as parts:
        groups = draw(config, parts)
        examples, _ = config.algorithm.examples(groups)
        examples = parts.roles["reference"].annotate(examples, (config.algorithm.needs[0][1],))
        victim = pid_of(parts.roles.policy._group.actors[1])
        threading.Timer(2.0, os.kill, (victim, signal.SIGKILL)).start()
        with pytest.raises(LearnerLost, match="learner-1 died"):
            parts.roles.policy.update(examples, config.algorithm, UpdatePlan(0, epochs=100_000))


def test_an_engine_that_fails_from_within_is_replaced(make, start, tmp_path):
    config = make(**LIGHT)
    flaky = make(
        **{**LIGHT, "engine": {**LIGHT["engine"], "name": "tests.parts:FailingOnce", "flag": str(tmp_path / "f")}}
    )
    with start(config) as parts:
        whole = draw(config, parts)
    with start(flaky) as parts:
        again = draw(flaky, parts)
    assert [c.token_ids for g in again for c in g.completions] == [c.token_ids for g in whole for c in g.completions]


@pytest.mark.parametrize(
    ("when", "expected"), [("start", "FileNotFoundError: no lexicon here"), ("score", "KeyError: 'missing'")]
)
def test_what_fails_in_an_actor_is_said_in_a_line_with_the_traceback_in_its_log(make, tmp_path, when, expected):
    with pytest.raises(ActorError) as error:
        run_training(make(**LIGHT, scorer={"name": "tests.parts:Raises", "when": when}))
    assert expected in str(error.value)
    assert "scorer-0" in error.value.where
    assert "Traceback" in (tmp_path / "run" / "log" / "scorer-0.log").read_text()


def test_a_part_of_ones_own_is_found_where_the_command_runs(tmp_path, model):
    (tmp_path / "my_rewards.py").write_text(
        "from rayalign.scorers.base import ScorerConfig\n"
        "class Politeness(ScorerConfig):\n"
        "    name: str\n"
        "    word: str = 'please'\n"
        "    def start(self):\n"
        "        return lambda groups: [[float(self.word in t) - i for i, t in enumerate(g.texts)] for g in groups]\n"
    )
    arguments, environment = command(tmp_path, model, train__steps=1, scorer={"name": "my_rewards:Politeness"})
    # -P: the current folder is not on the path by itself, as for the installed command
    done = subprocess.run(
        [arguments[0], "-P", *arguments[1:]], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr


def test_a_push_that_was_changed_on_the_way_is_refused(make, start):
    config = make(**RAY)
    with start(config) as parts:
        push = parts.roles.policy.push(1)
        chunk = push.chunks[0]
        data = ray.get(chunk.data).copy()
        data[chunk.specs[3].offset + 5] ^= 1
        corrupt = replace(push, chunks=(replace(chunk, data=ray.put(data)), *push.chunks[1:]))
        with pytest.raises(SyncMismatch, match=chunk.specs[3].name):
            parts.engine.load(corrupt)
        missing = replace(push, chunks=(replace(chunk, specs=chunk.specs[1:]), *push.chunks[1:]))
        with pytest.raises(SyncMismatch, match=chunk.specs[0].name):
            parts.engine.load(missing)
        parts.engine.load(push)
        assert len(draw(config, parts)) == 4


def test_a_cluster_that_is_not_there_is_said_at_once(make):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match="the Ray cluster does not answer") as error:
            run_training(make(**{**LIGHT, "placement": {"name": "ray", "address": address}}))
    assert address in str(error.value)
    assert "RAY_AUTH_MODE=token" in str(error.value)


@pytest.mark.parametrize("key", ["engine", "learner"])
def test_more_actors_than_the_cluster_can_hold_are_refused_before_any_starts(make, key):
    many = (
        {"engine": {**LIGHT["engine"], "count": 99}}
        if key == "engine"
        else {"learner": {**LIGHT["learner"], "ranks": 16}, "rollout": {"prompts": 16}}
    )
    with pytest.raises(ConfigError, match="the cluster cannot hold so many"):
        run_training(make(**{**LIGHT, **many}))


def command(tmp_path, model, **changes):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path, model, **{**LIGHT, **changes})))
    arguments = [sys.executable, "-m", "rayalign.cli", "train", str(path)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return arguments, environment


def started(tmp_path, model, **changes):
    """The command in a process of its own, once its third step is recorded, and its actors' ids."""
    arguments, environment = command(tmp_path, model, **changes)
    process = subprocess.Popen(
        arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    limit = time.monotonic() + 300
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    return process, children


def gone(children):
    """Whether all of a command's processes have ended."""
    return not psutil.wait_procs(children, timeout=30)[1]


def test_a_killed_learner_ends_the_command_and_resume_goes_on_as_if_never_stopped(tmp_path, model):
    changes = {"train__steps": 200, "checkpoint__every": 1, "checkpoint__keep": 1}
    process, children = started(tmp_path, model, **changes)
    # Ray names an actor's process after its class and method; the log says which process is the learner.
    learner = next(c for c in children if any(f.path.endswith("learner-0.log") for f in c.open_files()))
    learner.kill()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    assert "error: learner-0: learner-0 died" in err
    assert "Traceback" not in err
    assert gone(children)
    done = len(records(tmp_path / "run"))
    arguments, environment = command(tmp_path, model, **{**changes, "train__steps": done + 2})
    again = subprocess.run([*arguments, "resume=true"], env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    resumed = records(tmp_path / "run")
    assert [r["step"] for r in resumed] == list(range(1, done + 3))
    whole = run_training_here(tmp_path, model, {**changes, "train__steps": done + 2})
    for ours, theirs in zip(resumed, whole, strict=True):
        assert timeless(ours) == pytest.approx(timeless(theirs), abs=1e-3)


def run_training_here(tmp_path, model, changes):
    arguments, environment = command(tmp_path, model, **{**changes, "run_dir": str(tmp_path / "whole")})
    subprocess.run(arguments, env=environment, check=True, capture_output=True, timeout=180)
    return records(tmp_path / "whole")


def test_ctrl_c_twice_stops_at_once(tmp_path, model):
    process, children = started(tmp_path, model, train__steps=500, sampling__max_tokens=48, rollout__prompts=16)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert gone(children)


def test_ctrl_c_ends_all_actors_and_leaves_a_loadable_state(tmp_path, model):
    process, children = started(tmp_path, model, train__steps=500)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to every process of the command
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "stopping after this step and a checkpoint" in err
    assert gone(children)
    step = len(records(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step}"]
    arguments, environment = command(tmp_path, model, train__steps=step + 1)
    again = subprocess.run([*arguments, "resume=true"], env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert len(records(tmp_path / "run")) == step + 1

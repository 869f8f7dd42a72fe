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
from rayalign.build import load_tokenizer, start_parts
from rayalign.config import parse_config
from rayalign.console import Console
from rayalign.errors import ActorError, ConfigError, EngineLost, LearnerLost, SyncMismatch
from rayalign.label import run_labelling
from rayalign.protocols import UpdatePlan
from rayalign.runtime import cluster
from tests.loop.conftest import records, timeless
from tests.parts import tiny_config
from tests.ray.conftest import LIGHT
from tests.ray.test_placements_agree import draw
from tests.tiny_models import build_tiny_llama


def pid_of(actor):
    return ray.get(actor.process_id.remote())


class Running:
    """Parts that several tests look at, one after the other: what each of them breaks is whole again afterwards."""

    def __init__(self, config, parts, flag):
        self.config, self.parts, self.flag = config, parts, flag
        self.parts.engine.load(parts.roles.policy.push(7))
        self.groups = self.draw()
        self.second_rank = pid_of(parts.roles.policy._group.actors[1])

    def draw(self):
        return draw(self.config, self.parts)

    def same(self, groups):
        sampled = [(c.token_ids, c.version) for g in groups for c in g.completions]
        return sampled == [(c.token_ids, 7) for g in self.groups for c in g.completions]

    def annotated(self):
        examples, _ = self.config.algorithm.examples(self.groups)
        return self.parts.roles["reference"].annotate(examples, (self.config.algorithm.needs[0][1],))

    def kill_learner(self):
        os.kill(self.second_rank, signal.SIGKILL)


@pytest.fixture(scope="class")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("running")
    (flag := folder / "failed").touch()
    engine = {**LIGHT["engine"], "name": "tests.parts:FailingOnce", "flag": str(flag), "max_replacements": 2}
    learner = {**LIGHT["learner"], "ranks": 2}
    model = build_tiny_llama(folder / "model")
    changes = {"optimizer__lr": 1e-5, "sampling__max_tokens": 32, **LIGHT, "engine": engine, "learner": learner}
    config = parse_config(tiny_config(folder, model, **changes))
    cluster.connect(config.placement)
    with start_parts(config, load_tokenizer(config), folder / "parts", Console()) as parts:
        yield Running(config, parts, flag)


class TestOneAfterTheOther:
    """In this order, on the same actors."""

    def test_a_scorer_that_dies_is_replaced(self, running):
        os.kill(pid_of(running.parts.scorer.members[0].actor), signal.SIGKILL)
        assert [g.scores for g in running.draw()] == [g.scores for g in running.groups]

    def test_an_engine_that_fails_from_within_is_replaced(self, running):
        running.flag.unlink()
        assert running.same(running.draw())
        assert running.flag.exists()  # it did fail

    def test_an_engine_killed_during_a_rollout_is_replaced_and_the_samples_are_the_same(self, running, monkeypatch):
        engine = running.parts.engine
        first, submit = pid_of(engine.members[0].actor), engine.submit

        def submit_and_kill(requests):
            submit(requests)
            os.kill(first, signal.SIGKILL)

        with monkeypatch.context() as patched:
            patched.setattr(engine, "submit", submit_and_kill)
            again = running.draw()
        assert pid_of(engine.members[0].actor) != first and running.same(again)

    def test_a_push_that_was_changed_on_the_way_is_refused(self, running):
        engine, push = running.parts.engine, running.parts.roles.policy.push(7)
        chunk = push.chunks[0]
        data = ray.get(chunk.data).copy()
        data[chunk.specs[3].offset + 5] ^= 1
        corrupt = replace(push, chunks=(replace(chunk, data=ray.put(data)), *push.chunks[1:]))
        with pytest.raises(SyncMismatch, match=chunk.specs[3].name):
            engine.load(corrupt)
        missing = replace(push, chunks=(replace(chunk, specs=chunk.specs[1:]), *push.chunks[1:]))
        with pytest.raises(SyncMismatch, match=chunk.specs[0].name):
            engine.load(missing)
        engine.load(push)
        assert running.same(running.draw())

    def test_an_engine_that_dies_too_often_is_given_up(self, running):
        """Its two replacements are spent by the tests before this one."""
        os.kill(pid_of(running.parts.engine.members[0].actor), signal.SIGKILL)
        with pytest.raises(EngineLost, match=r"engine-0 died, and no replacement is left"):
            running.draw()

    def test_a_rank_that_dies_inside_a_collective_call_is_named_too(self, running):
        """The survivor's own error (its connection broke) comes first, and is not the cause."""
        examples = running.annotated()
        threading.Timer(2.0, running.kill_learner).start()
        with pytest.raises(LearnerLost, match="learner-1 died"):
            running.parts.roles.policy.update(examples, running.config.algorithm, UpdatePlan(0, epochs=100_000))


def test_what_died_before_it_was_asked_and_what_does_not_answer_are_named(make, start):
    engine = {**LIGHT["engine"], "deadline_s": 8, "max_replacements": 0}
    config = make(**{**LIGHT, "engine": engine, "learner": {**LIGHT["learner"], "ranks": 2}})
    with start(config) as parts:
        examples, _ = config.algorithm.examples(draw(config, parts))
        os.kill(pid_of(parts.roles.policy._group.actors[1]), signal.SIGKILL)
        with pytest.raises(LearnerLost, match="learner-1 died") as error:
            parts.roles["reference"].annotate(examples, (config.algorithm.needs[0][1],))
        assert "learner-1.log" in str(error.value)
        assert "resume=true" in str(error.value)
        process = psutil.Process(pid_of(parts.engine.members[0].actor))
        process.suspend()
        try:
            with pytest.raises(EngineLost, match="engine-0: no answer to .* within the deadline"):
                draw(config, parts)
        finally:
            process.resume()


LABEL = {"algorithm": {"name": "label", "samples": 2}}  # starts no learner


@pytest.mark.parametrize(
    ("when", "expected"), [("start", "FileNotFoundError: no lexicon here"), ("score", "KeyError: 'missing'")]
)
def test_what_fails_in_an_actor_is_said_in_a_line_with_the_traceback_in_its_log(make, tmp_path, shared, when, expected):
    with pytest.raises(ActorError) as error:
        run_labelling(make(**LIGHT, **LABEL, scorer={"name": "tests.parts:Raises", "when": when}))
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
    own = {"scorer": {"name": "my_rewards:Politeness"}, **LABEL}
    arguments, environment = command(tmp_path, model, verb="label", **own)
    # -P: the current folder is not on the path by itself, as for the installed command
    done = subprocess.run(
        [arguments[0], "-P", *arguments[1:]], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert len(records(tmp_path / "run", "samples")) == 32


def test_a_cluster_that_is_not_there_is_said_at_once(make, alone):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match="the Ray cluster does not answer") as error:
            run_training(make(**{**LIGHT, "placement": {"name": "ray", "address": address}}))
    assert address in str(error.value)
    assert "RAY_AUTH_MODE=token" in str(error.value)


@pytest.mark.parametrize("key", ["engine", "learner"])
def test_more_actors_than_the_cluster_can_hold_are_refused_before_any_starts(make, shared, key):
    many = (
        {"engine": {**LIGHT["engine"], "count": 99}}
        if key == "engine"
        else {"learner": {**LIGHT["learner"], "ranks": 16}, "rollout": {"prompts": 16}}
    )
    with pytest.raises(ConfigError, match="the cluster cannot hold so many"):
        run_training(make(**{**LIGHT, **many}))


def command(tmp_path, model, verb="train", **changes):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path, model, **{**LIGHT, **changes})))
    arguments = [sys.executable, "-m", "rayalign.cli", verb, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return arguments, environment


def started(tmp_path, model, steps=3, **changes):
    """The command in a process of its own, once so many steps are recorded, and its actors' ids."""
    arguments, environment = command(tmp_path, model, **changes)
    process = subprocess.Popen(
        arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    limit = time.monotonic() + 300
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= steps):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    return process, children


def gone(children):
    """Whether all of a command's processes have ended."""
    return not psutil.wait_procs(children, timeout=30)[1]


def resumed(tmp_path, model, steps, **changes):
    """The run of the command, gone on with to so many steps, in this process."""
    again = {**LIGHT, **changes, "train__steps": steps, "resume": True}
    return records(run_training(parse_config(tiny_config(tmp_path, model, **again))).run_dir)


def test_a_killed_learner_ends_the_command_and_resume_goes_on_as_if_never_stopped(tmp_path, model, make, shared):
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
    ours = resumed(tmp_path, model, done + 2, checkpoint__every=1, checkpoint__keep=1)
    assert [r["step"] for r in ours] == list(range(1, done + 3))
    whole = run_training(make(train__steps=done + 2, run_dir=str(tmp_path / "whole")))
    for record, wanted in zip(ours, records(whole.run_dir), strict=True):
        assert timeless(record) == pytest.approx(timeless(wanted), abs=1e-3)


def test_ctrl_c_twice_stops_at_once(tmp_path, model):
    process, children = started(tmp_path, model, steps=1, sampling__max_tokens=48, rollout__prompts=16)
    os.killpg(process.pid, signal.SIGINT)
    said = []
    for line in process.stderr:  # until it has ended
        said.append(line)
        if "once more to stop at once" in line:
            os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, said
    assert not any(word in line for line in said for word in ("Traceback", "checkpoint /"))
    assert len(records(tmp_path / "run")) == 1 and gone(children)  # not even the step is ended


def test_ctrl_c_ends_all_actors_and_leaves_a_loadable_state(tmp_path, model, shared):
    process, children = started(tmp_path, model, train__steps=500)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to every process of the command
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "stopping after this step and a checkpoint" in err
    assert gone(children)
    step = len(records(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step}"]
    assert len(resumed(tmp_path, model, step + 1)) == step + 1

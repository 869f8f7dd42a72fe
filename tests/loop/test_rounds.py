"""Rounds: stages hand over weights and rows; what ended is not run again, what was cut goes on."""

from __future__ import annotations

import copy
import json

import pytest
from transformers import AutoModelForCausalLM

from rayalign.config import load_job, parse_job
from rayalign.data.files import content
from rayalign.errors import CheckpointError, ConfigError
from rayalign.report import write_report
from rayalign.rounds import run_rounds
from tests.loop.conftest import STAGES, records, timeless
from tests.parts import PowerCut, write_prompts


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same(first, second):
    return all((first[name] == second[name]).all() for name in first)


def test_stages_hand_over_weights_and_rows(rounds, model):
    found = rounds()
    assert list(found.stages) == list(found.ran) == ["answers", "sft", "dpo"] and not found.stopped
    rows = found.output("answers", "data")
    assert len(rows.read_text().splitlines()) == 16
    for stage, before in (("sft", str(model)), ("dpo", str(found.output("sft")))):
        config = load_job(found.run_dir / "stages" / stage / "config.yaml")
        assert config.model.path == before and config.data.examples[0].path == str(rows)
    assert not same(weights(found.output("sft")), weights(found.output("dpo")))
    manifest = json.loads((found.run_dir / "stages/dpo/manifest.json").read_text())
    assert manifest["ended"] and manifest["inputs"].keys() == {"model.path", "data.examples.0.path"}
    assert manifest["inputs"]["model.path"] == found.stages["sft"].fingerprint
    page = (found.run_dir / "report.html").read_text()
    assert "3 of 3 stages ended" in page
    for stage in found.stages:
        assert f'href="stages/{stage}/report.html"' in page
        assert (found.run_dir / "stages" / stage / "report.html").is_file()
    compared = write_report([found.run_dir], found.run_dir / "compared.html").read_text()
    assert "3 runs compared" in compared
    assert compared.index("answers") < compared.index("dpo")


def test_a_repeated_list_starts_each_time_from_the_newest_policy(rounds, model):
    found = rounds(repeat=2)
    assert list(found.stages) == ["answers", "sft", "dpo", "answers-2", "sft-2", "dpo-2"]
    configs = {name: load_job(found.run_dir / "stages" / name / "config.yaml") for name in found.stages}
    starts = [configs[name].model.path for name in found.stages]
    made = [str(found.output(name)) for name in ("sft", "dpo", "sft-2")]
    assert starts == [str(model), str(model), made[0], made[1], made[1], made[2]]
    assert configs["dpo-2"].data.examples[0].path == str(found.output("answers-2", "data"))
    first, second = (found.output(name, "data").read_text() for name in ("answers", "answers-2"))
    assert first != second
    assert [configs[name].seed for name in ("answers", "answers-2")] == [0, 1]


POINTS = {
    "in the labelling": ("answers", {"step": 1, "at": "reward/mean"}),
    "inside a stage": ("sft", {"step": 2}),
    "between two stages": ("dpo", {"step": 1}),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_job_goes_on_as_if_it_had_not_been(rounds, tmp_path, point):
    name, when = POINTS[point]
    whole = rounds(run_dir=str(tmp_path / "whole"))
    stages = [
        {**stage, "trackers": [{"name": "tests.parts:Stop", **when}]} if stage["name"] == name else stage
        for stage in STAGES
    ]
    with pytest.raises(PowerCut):
        rounds(stages)
    ended = [stage["name"] for stage in STAGES][: [stage["name"] for stage in STAGES].index(name)]
    kept = {each: (tmp_path / "rounds/stages" / each / "manifest.json").read_text() for each in ended}
    found = rounds(resume=True)
    assert list(found.stages) == ["answers", "sft", "dpo"]
    assert list(found.ran) == [each for each in found.stages if each not in ended]
    assert all((found.run_dir / "stages" / each / "manifest.json").read_text() == kept[each] for each in ended)
    assert not (found.run_dir / "replaced").exists()
    assert found.output("answers", "data").read_text() == whole.output("answers", "data").read_text()
    for each in ("sft", "dpo"):
        expected = [timeless(record) for record in records(whole.run_dir / "stages" / each)]
        assert [timeless(record) for record in records(found.run_dir / "stages" / each)] == expected
        assert same(weights(found.output(each)), weights(whole.output(each)))
    assert rounds(resume=True).ran == ()


def test_a_signal_stops_the_job_behind_the_step(rounds):
    import signal

    stop = {"trackers": [{"name": "tests.parts:Stop", "step": 1, "signal": int(signal.SIGTERM)}]}
    found = rounds([STAGES[0], {**STAGES[1], **stop}, STAGES[2]])
    assert found.stopped and list(found.stages) == ["answers"]
    again = rounds(resume=True)
    assert again.ran == ("sft", "dpo") and not again.stopped


def changed(job, key, value):
    """One key of one stage, dotted."""
    name, *parents, last = key.split(".")
    node = next(stage for stage in job if stage["name"] == name)
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return job


@pytest.mark.parametrize(
    ("key", "value", "again"),
    [
        ("dpo.algorithm", {"name": "preference", "loss": {"name": "dpo", "beta": 0.3}}, ["dpo"]),
        ("sft.optimizer.lr", 1e-4, ["sft", "dpo"]),
        ("answers.sampling.max_tokens", 6, ["answers", "sft", "dpo"]),
        ("sft.evaluation.rows", 3, []),  # says more of the same weights
        ("dpo.checkpoint.keep", 1, []),
        ("answers.scorer", {"name": "tests.parts:Tokens", "deadline_s": 99}, []),
    ],
)
def test_a_changed_input_runs_the_stage_and_those_behind_it_again(rounds, key, value, again):
    rounds()
    found = rounds(changed(copy.deepcopy(STAGES), key, value), resume=True)
    assert list(found.ran) == again and list(found.stages) == ["answers", "sft", "dpo"]
    kept = sorted(path.name.split("-")[0] for path in (found.run_dir / "replaced").glob("*"))
    assert kept == sorted(again)
    for path in (found.run_dir / "replaced").glob("*"):
        assert (path / "manifest.json").is_file() and (path / "config.yaml").is_file()


def test_other_rows_of_the_same_answers_are_written_without_asking_again(rounds):
    first = rounds()
    shards = sorted((first.run_dir / "stages/answers/labels").iterdir())
    times = [shard.stat().st_mtime_ns for shard in shards]
    found = rounds(changed(copy.deepcopy(STAGES), "answers.algorithm.write", "pairs"), resume=True)
    assert found.ran == ("answers", "sft", "dpo")
    assert [shard.stat().st_mtime_ns for shard in shards] == times
    assert "chosen" in found.output("answers", "data").read_text()
    assert sorted(path.name.split("-")[0] for path in (found.run_dir / "replaced").iterdir()) == ["dpo", "sft"]


def test_a_changed_file_runs_all_that_comes_of_it_again(rounds, tmp_path, job):
    rounds()
    assert rounds(resume=True).ran == ()
    data = job()  # writes the same prompts again
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("film 3", "film 33"))
    assert run_rounds(parse_job({**data, "resume": True})).ran == ("answers", "sft", "dpo")


def test_all_of_a_data_set_is_looked_at(tmp_path):
    """Files in folders below it, and the middle of long ones."""
    folder, file = tmp_path / "saved", tmp_path / "rows.jsonl"
    (folder / "train").mkdir(parents=True)
    (folder / "train/data-0.arrow").write_bytes(b"one")
    file.write_bytes(b"a" * (17 * 2**20))
    before = content(folder), content(file)
    (folder / "train/data-0.arrow").write_bytes(b"two")
    file.write_bytes(b"a" * (8 * 2**20) + b"b" + b"a" * (9 * 2**20 - 1))
    assert content(folder) != before[0] and content(file) != before[1]


def test_what_a_stage_left_is_made_again_when_it_is_gone(rounds, tmp_path):
    import shutil

    found = rounds()
    shutil.rmtree(found.output("sft"))
    again = rounds(resume=True)
    assert again.ran == ("sft",)
    assert again.output("sft").is_dir()


def test_a_folder_that_was_moved_is_still_known(rounds, tmp_path, monkeypatch):
    first = rounds()
    first.run_dir.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    again = rounds(resume=True, run_dir="elsewhere")
    assert again.ran == () and again.output("dpo") == tmp_path / "elsewhere/stages/dpo/checkpoints/step-2"
    manifest = tmp_path / "elsewhere/stages/sft/manifest.json"
    for damage in ("{", "[]", '{"stage": "sft"}'):
        manifest.write_text(damage)
        with pytest.raises(CheckpointError, match="this manifest of a stage is damaged"):
            rounds(resume=True, run_dir="elsewhere")


def test_reward_models_and_rejection_sampling_are_stages(rounds, tmp_path):
    prompts = {"prompts": str(tmp_path / "prompts.jsonl")}
    learned = {"name": "reward_model", "model": "stage:reward", "dtype": "float32"}
    found = rounds(
        [
            {**STAGES[0], "algorithm": {"name": "label", "samples": 3}},
            {**STAGES[1], "name": "reward", "algorithm": "reward_model", "scorer": None},
            {"name": "best", "algorithm": {"name": "rejection_sampling", "samples": 3}, "data": prompts},
            {
                "name": "online",
                "algorithm": {"name": "online_preference", "samples": 2},
                "scorer": learned,
            },
            {
                "name": "ppo",
                "algorithm": {"name": "ppo", "samples": 2, "critic": {"model": "stage:reward"}},
                "scorer": learned,
            },
        ]
    )
    config = load_job(found.run_dir / "stages/online/config.yaml")
    assert config.model.path == str(found.output("best"))  # not the reward model, which answers nothing
    assert config.scorer.model == str(found.output("reward"))
    last = load_job(found.run_dir / "stages/ppo/config.yaml")
    assert (last.model.path, last.algorithm.critic.model) == (str(found.output("online")), str(found.output("reward")))
    assert records(found.run_dir / "stages/ppo")[-1]["critic/loss"] > 0
    step = records(found.run_dir / "stages/best")[0]
    assert step["best_of_n/gain"] == pytest.approx(step["best_of_n/reward"] - step["best_of_n/mean_reward"])
    assert step["best_of_n/kl_bound"] == pytest.approx(0.4319456220)  # ln 3 − ⅔
    assert step["best_of_n/mean_reward"] == pytest.approx(step["reward/mean"])


def test_self_play_is_a_stage(rounds):
    answers = {**STAGES[0], "algorithm": {"name": "label", "samples": 2, "write": "best"}}
    spin, sft = {"name": "spin", "iterations": 2, "steps": 1}, {**STAGES[1], "train": {"steps": 1}}

    def stages(**more):
        return [answers, {**STAGES[1], "name": "spin", "algorithm": {**spin, **more}}, sft]

    found = rounds(stages(), train={})
    assert found.ran == ("answers", "spin", "sft")
    assert load_job(found.run_dir / "stages/sft/config.yaml").model.path == str(found.output("spin"))
    shards = list((found.run_dir / "stages/spin/generations").glob("iteration-*/shard-*"))
    times = [shard.stat().st_mtime_ns for shard in shards]
    found = rounds(stages(iterations=3), train={}, resume=True)
    assert found.ran == ("spin", "sft") and found.stages["spin"].steps == 3
    assert times and [shard.stat().st_mtime_ns for shard in shards] == times


@pytest.fixture
def file(job, tmp_path):
    import yaml

    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(job(), sort_keys=False))
    return path


def test_a_stage_is_overridden_by_its_name(file):
    found = load_job(file, ["rounds.dpo.train.steps=7", "rounds.answers.algorithm.samples=6", "rollout.prompts=3"])
    configs = {stage.name: stage.config for stage in found.stages}
    assert (configs["dpo"].train.steps, configs["sft"].train.steps) == (7, 2)
    assert configs["answers"].algorithm.samples == 6
    assert {config.rollout.prompts for config in configs.values()} == {3}
    for override, expected in (
        ("rounds.dop.train.steps=7", "did you mean dpo"),
        ("rounds.dpo.train.stepz=7", "command line, key rounds.dpo.train.stepz"),
        ("algorithm.samples=3", "each stage says this itself"),
    ):
        with pytest.raises(ConfigError) as error:
            load_job(file, [override])
        assert expected in str(error.value)


def test_messages_name_the_line_of_a_stage_or_of_what_all_share(file):
    text = file.read_text()
    file.write_text(text.replace("- name: dpo\n", "- name: dpo\n  train: {steps: none}\n"))
    line = file.read_text().split("\n").index("  train: {steps: none}") + 1
    with pytest.raises(ConfigError) as error:
        load_job(file)
    assert error.value.where == f"{file}:{line}, key rounds.dpo.train.steps"
    file.write_text(text.replace("max_tokens: 8", "max_tokens: -8"))
    line = next(n for n, each in enumerate(file.read_text().split("\n"), start=1) if "-8" in each)
    with pytest.raises(ConfigError) as error:
        load_job(file)
    assert error.value.where == f"{file}:{line}, key rounds.answers.sampling.max_tokens"


def test_the_command_line_runs_rounds(file, monkeypatch, capsys):
    import sys

    from rayalign.cli import main

    monkeypatch.setattr(sys, "argv", ["rayalign", "train", str(file), "repeat=1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "stage 1 of 3, answers: label" in told and "stage 3 of 3, dpo: preference" in told
    assert "data.examples from answers" in told
    write_prompts(file.parent / "prompts.jsonl")
    monkeypatch.setattr(sys, "argv", ["rayalign", "train", str(file), "resume=true"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.count("is not run again") == 3
    monkeypatch.setattr(sys, "argv", ["rayalign", "evaluate", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "this config is of several runs" in capsys.readouterr().err

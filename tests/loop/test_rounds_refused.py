"""What stages cannot be is refused before the first of them starts; what ended stays."""

from __future__ import annotations

import pytest

from rayalign.config import parse_job
from rayalign.errors import ConfigError, DataError
from rayalign.rounds import run_job
from tests.loop.conftest import STAGES


def stages(*found):
    return {"rounds": list(found)}


A = {"name": "a", "algorithm": {"name": "label", "samples": 2}}
SFT = {"name": "b", "algorithm": "sft", "data": {"examples": "stage:a", "prompts": None}}
REFUSED = {
    "no stage": ({"rounds": []}, ["key rounds", "there is no stage"]),
    "no list": ({"rounds": {"a": 1}}, ["these are no stages", "a list of stages"]),
    "no name": (stages(A, {"algorithm": "sft"}), ["key rounds.1", "this stage has no name"]),
    "no good name": (stages({**A, "name": "../a"}), ["key rounds.0.name", "no name of a stage", "../a"]),
    "a name twice": (stages(A, {**SFT, "name": "a"}), ["key rounds.1.name", "two stages have this name", "place 1"]),
    "a name that is another's second": (
        {**stages(A, {**SFT, "name": "a-2"}), "repeat": 2},
        ["two stages would have the same folder", "a-2"],
    ),
    "an unknown stage": (
        stages(A, {**SFT, "data": {"examples": "stage:aa"}}),
        ["no stage is called aa", "did you mean a?"],
    ),
    "itself": (stages(A, {**SFT, "model": "stage:b"}), ["key rounds.b.model", "wait for one another: b → b"]),
    "a later one": (
        stages({**A, "model": "stage:b"}, {**SFT, "data": {"examples": "x.jsonl", "prompts": None}}),
        ["key rounds.a.model", "a stage waits for a later one", "b comes after a", "leave model.path out"],
    ),
    "a cycle": (
        stages({**A, "model": {"path": "stage:c"}}, SFT, {"name": "c", "algorithm": "sft", "model": "stage:b"}),
        ["key rounds.a.model.path", "wait for one another: a → c → b → a"],
    ),
    "rows of a training": (stages(A, SFT, {**SFT, "name": "c", "data": {"examples": "stage:b", "prompts": None}}),
                           ["key rounds.c.data.examples", "the stage b (sft) writes no data", "name a"]),
    "weights of a labelling": (stages(A, {**SFT, "model": "stage:a"}), ["the stage a (label) trains nothing"]),
    "a policy that is a reward model": (
        stages(A, {**SFT, "name": "r", "algorithm": "reward_model", "scorer": None}, {**SFT, "model": "stage:r"}),
        ["key rounds.b.model.path", "the stage r trains a reward model"],
    ),
    "a reward model that is a policy": (
        stages(A, SFT, {**A, "name": "c", "scorer": {"name": "reward_model", "model": "stage:b"}}),
        ["key rounds.c.scorer.model", "trains no reward model"],
    ),
    "prompts of a stage": (
        stages(A, {**A, "name": "b", "data": {"prompts": "stage:a"}}),
        ["key rounds.b.data.prompts", "no prompts", "under data.examples"],
    ),
    "rows of another kind": (
        stages({**A, "algorithm": {**A["algorithm"], "write": "best"}}, {**SFT, "algorithm": "preference"}),
        ["key rounds.b.data.examples", "the rows of the stage a are none for preference", "chosen"],
    ),
    "a policy in a mix": (
        stages(A, SFT, {**A, "name": "c", "scorer": {"name": "mix", "scorers": [
            {"weight": 1, "scorer": {"name": "reward_model", "model": "stage:b"}},
        ]}}),
        ["trains no reward model"],
    ),
    "a judge that gives scores": (
        stages(A, {**SFT, "name": "r", "algorithm": "reward_model", "scorer": None}, {**A, "name": "c", "scorer": {
            "name": "judge", "template": "positive", "ask": {"name": "engine", "model": "stage:r"}}}),
        ["the stage r trains a reward model", "trains a language model", "add such a stage"],
    ),
    "a shared stage": ({**stages(A), "model": {"path": "stage:a"}}, ["what all stages share cannot come from one"]),
    "a key of the whole": (stages({**A, "run_dir": "x"}), ["run_dir is none of a stage's keys"]),
    "a stage of the wrong keys": (stages(A, {**SFT, "trian": {"steps": 1}}), ["key rounds.b.trian", "unknown key"]),
    "a stage of a wrong value": (stages(A, {**SFT, "train": {"steps": 0}}), ["key rounds.b.train.steps", "at least 1"]),
    "no times": ({**stages(A), "repeat": 0}, ["key repeat", "at least 1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_starts(job, tmp_path, case):
    changes, expected = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        run_job(parse_job({**job(), **changes}))
    assert all(text in str(error.value) for text in expected), str(error.value)
    assert error.value.rule and error.value.remedy and error.value.value is not None
    assert not (tmp_path / "rounds").exists()


def test_the_data_of_a_later_stage_are_read_before_the_first_starts(rounds, tmp_path):
    later = {"name": "c", "algorithm": "sft", "data": {"examples": str(tmp_path / "nope.jsonl"), "prompts": None}}
    with pytest.raises(DataError, match="there is no such file") as error:
        rounds([*STAGES, later])
    assert error.value.where.startswith("stage c, ")
    with pytest.raises(ConfigError, match="cannot be split so far") as error:
        rounds([*STAGES, {**later, "data": STAGES[1]["data"], "train": {"minibatches": 9}}])
    assert error.value.where == "stage c, key train.minibatches"
    assert not (tmp_path / "rounds/stages").exists()


def test_an_error_of_a_stage_names_it_and_what_ended_stays(rounds):
    broken = {**STAGES[2], "algorithm": {"name": "preference", "loss": {"name": "soft"}}}
    with pytest.raises(DataError, match="neither votes nor a probability") as error:
        rounds([*STAGES[:2], broken])
    assert error.value.where.startswith("stage dpo, ")
    assert rounds(resume=True).ran == ("dpo",)


def test_folders_that_do_not_fit_are_refused(rounds, tmp_path):
    with pytest.raises(ConfigError, match="there are no rounds in this folder"):
        rounds(resume=True)
    with pytest.raises(ConfigError, match="there is nothing to resume"):
        rounds(resume=True, run_dir=None)
    rounds([STAGES[0]])
    with pytest.raises(ConfigError, match="this run directory exists"):
        rounds([STAGES[0]])

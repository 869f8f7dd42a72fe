"""What a plan says of scorers that hold a model, or ask somebody whose needs it does not know."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rayalign.config import load_config, parse_config
from rayalign.plan import make_plan, print_plan
from rayalign.plan.records import GIB
from rayalign.plan.shapes import read_shape

ROOT = Path(__file__).resolve().parents[2]
SHAPES = Path(__file__).parent / "shapes"
QWEN = str(SHAPES / "Qwen2.5-1.5B-Instruct")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def planned(scorer, nodes="1x2cpu/32GiB", **more):
    data = load_config("configs/demo.yaml", [f"model.path={SHAPES / 'SmolLM2-135M-Instruct'}"]).to_dict()
    return make_plan(parse_config({**data, "scorer": scorer, **more}), nodes=nodes)


def held(plan):
    return {role.role: role for role in plan.fit.memory if role.actor == "scorer"}


def text(plan) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=200))
    return out.getvalue()


def test_a_reward_model_is_counted_in_its_own_dtype_on_each_actor():
    plain, bf16 = planned({"name": "rules", "rule": "vader"}), {"name": "reward_model", "model": QWEN, "count": 2}
    plan, wide = planned(bf16), planned({**bf16, "dtype": "float32"})
    parameters = read_shape(QWEN, network="score").parameters
    role = held(plan)["reward model"]
    assert role.count == 2 and role.host.weights == 2 * parameters and role.device.total == 0
    assert held(wide)["reward model"].host.weights == 4 * parameters
    more = 2 * role.host.total / GIB
    assert more > 5.5
    assert plan.fit.loads[0].needed == pytest.approx(
        plain.fit.loads[0].needed + more + held(plain)["scorer"].host.total / GIB
    )
    assert "scorer: reward model × 2" in text(plan)


def test_one_that_does_not_fit_is_a_problem():
    plan = planned({"name": "reward_model", "model": QWEN, "dtype": "float32"}, nodes="1x2cpu/12GiB")
    assert not plan.fits and "scorer" in plan.problems[0].value


def test_it_has_a_gpu_of_its_own_unless_it_is_told_to_do_without():
    scorer = {"name": "reward_model", "model": QWEN}
    on_gpu = planned(scorer, nodes="1x3xA100-80/400GiB")
    places = {place.actor: place.gpus for place in on_gpu.fit.places}
    assert places == {"engine-0": 1.0, "learner-0": 1.0, "scorer-0": 1.0}
    assert held(on_gpu)["reward model"].device.weights > 2.8 * GIB
    assert any("scorer" in load.holds and load.of_gpu for load in on_gpu.fit.loads)
    two = planned(scorer, nodes="1x2xA100-80/400GiB")
    assert not two.fits and two.problems[0].where == "key scorer.count"
    without = planned({**scorer, "device": "cpu"}, nodes="1x2xA100-80/400GiB")
    assert without.fits and held(without)["reward model"].device.total == 0


def test_models_of_a_mix_are_counted_together():
    rule = {"scorer": {"name": "rules", "rule": "vader"}}
    models = [{"scorer": {"name": "reward_model", "model": QWEN}, "label": label} for label in ("kind", "true")]
    plan = planned({"name": "mix", "scorers": [rule, *models]})
    assert [role.role for role in plan.fit.memory if role.actor == "scorer"] == [
        "scorer",
        "reward model",
        "reward model",
    ]


@pytest.mark.parametrize(
    ("scorer", "note"),
    [
        (
            {"name": "reward_model", "model": "runs/reward/checkpoints/step-30"},
            "scorer.model=runs/reward/checkpoints/step-30 is not on this machine: the memory that it takes is not",
        ),
        ({"name": "url", "url": "http://host/score"}, "what the service at scorer.url needs"),
        (
            {"name": "python", "function": "configs.rewards:on_topic"},
            "what configs.rewards:on_topic needs is not planned",
        ),
        (
            {"name": "mix", "scorers": [{"scorer": {"name": "reward_model", "model": "a/b"}}]},
            "scorer.scorers.0.scorer.model=a/b is not on this machine",
        ),
        (
            {"name": "judge", "ask": {"name": "server", "url": "http://host/v1", "model": "big"}},
            "what the judge's server needs, and how fast it answers, is not planned",
        ),
    ],
    ids=["reward_model", "url", "python", "mix", "server"],
)
def test_what_a_plan_does_not_know_it_says(scorer, note):
    plan = planned(scorer)
    assert plan.fits and any(note in each for each in plan.fit.notes), plan.fit.notes


def test_a_classifier_of_a_dpm_scorer_is_counted_with_its_classes(tmp_path):
    known = json.loads((Path(QWEN) / "config.json").read_text())
    labels = {"id2label": {"0": "bad", "1": "neutral", "2": "good"}, "label2id": {"bad": 0, "neutral": 1, "good": 2}}
    (tmp_path / "config.json").write_text(json.dumps(known | labels))
    plan = planned({"name": "dpm", "model": str(tmp_path), "count": 2})
    parameters = read_shape(QWEN, network="score").parameters + 2 * known["hidden_size"]
    role = held(plan)["preference model"]
    assert role.count == 2 and role.host.weights == 2 * parameters
    missing = planned({"name": "dpm", "model": "runs/nothing/checkpoints/step-1"})
    assert any("is not on this machine" in note for note in missing.fit.notes)


def test_a_training_of_one_has_a_head_of_its_classes():
    config = load_config(ROOT / "configs/disagreement.yaml", [f"model.path={SHAPES / 'SmolLM2-135M-Instruct'}"])
    plan = make_plan(config, nodes="1x2cpu/16GiB")
    language = read_shape(str(SHAPES / "SmolLM2-135M-Instruct"))
    assert plan.shape.labels == 3 and plan.shape.parameters == language.parameters + 3 * language.hidden
    assert "3-class head" in text(plan) and plan.fits

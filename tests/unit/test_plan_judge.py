"""What a plan says of a judge: its memory, its GPUs, its questions, and what is not known."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rayalign.config import load_config
from rayalign.plan import make_plan
from tests.http_service import Reply, serving

ROOT = Path(__file__).resolve().parents[2]
SHAPES = Path(__file__).parent / "shapes"
SMALL, LARGE = SHAPES / "SmolLM2-135M-Instruct", SHAPES / "Llama-3.1-8B"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def plan(*overrides: str, config: str = "online_dpo_judge", nodes: str = "1x2cpu/16GiB"):
    return make_plan(load_config(ROOT / f"configs/{config}.yaml", [f"model.path={SMALL}", *overrides]), nodes=nodes)


def memory_of(found, role: str) -> float:
    return sum(each.host.total + each.device.total for each in found.fit.memory if each.role == role) / 2**30


def test_a_judge_on_a_cpu_is_counted_as_an_engine_is() -> None:
    found = plan(f"scorer.ask.model={SMALL}")
    rules = plan("scorer={name: rules, rule: vader}")
    judge = memory_of(found, "judge")
    assert judge == pytest.approx(memory_of(found, "engine"), rel=0.25)  # the same model, fewer keys and values
    assert found.fit.loads[0].needed - rules.fit.loads[0].needed == pytest.approx(judge, abs=0.01)
    assert memory_of(rules, "judge") == 0
    large = plan(f"scorer.ask.model={LARGE}")
    assert not large.fits and memory_of(large, "judge") > 14


def test_judges_have_gpus_of_their_own_where_they_are_not_shared() -> None:
    changes = (f"model.path={LARGE}", f"scorer.ask.model={LARGE}")
    found = plan(*changes, config="online_dpo_judge_8gpu", nodes="1x8xA100-80/1800GiB")
    gpus = {place.actor: place.gpus for place in found.fit.places}
    assert gpus["scorer-0"] == gpus["scorer-1"] == 1.0 and sum(gpus.values()) == 8
    many = plan(*changes, "scorer.count=3", config="online_dpo_judge_8gpu", nodes="1x8xA100-80/1800GiB")
    assert any("scorer.count" in problem.where for problem in many.problems)
    pair = plan(
        *changes,
        f"scorer={{name: judge, ask: {{name: engine, model: {LARGE}, engine: {{tensor_parallel: 2}}}}}}",
        config="online_dpo_judge_8gpu",
        nodes="1x8xA100-80/1800GiB",
    )
    assert {place.actor: place.gpus for place in pair.fit.places}["scorer-0"] == 2.0


def test_a_judge_that_shares_the_only_gpu_is_added_up() -> None:
    own = f"scorer={{name: judge, ask: {{name: engine, model: {SMALL}, engine: {{gpu_memory: 0.5}}}}}}"
    alone = plan(config="online_dpo_judge_1gpu", nodes="1x1xA100-80/400GiB")
    beside = plan(own, config="online_dpo_judge_1gpu", nodes="1x1xA100-80/400GiB")
    (gpu,), (both,) = ([load for load in each.fit.loads if load.of_gpu] for each in (alone, beside))
    assert "scorer" not in gpu.holds and "scorer" in both.holds
    assert both.needed - gpu.needed == pytest.approx(0.5 * 79.2, abs=0.5)
    assert sum(place.gpus for place in beside.fit.places) <= 1


def test_the_policys_engine_needs_no_place_and_no_second_model() -> None:
    found = plan(config="online_dpo_judge_pairwise")
    assert not any(place.actor.startswith("scorer") for place in found.fit.places)
    assert any("two more pushes a rollout" in note for note in found.fit.notes)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ((), 8 * 12),
        (("scorer.schedule=tournament",), 8 * 6),
        (("scorer.schedule=swiss", "scorer.comparisons=4"), 8 * 8),
        (("scorer.mode=direct", "scorer.template=positive_score"), 8 * 4),
    ],
)
def test_questions_are_counted(changes: tuple[str, ...], count: int) -> None:
    found = plan("scorer={name: judge, template: positive, ask: policy}", *changes, "engine.max_context=640")
    assert any(f"up to {count} questions" in note for note in found.fit.notes), found.fit.notes


@pytest.mark.parametrize(
    "scorer",
    [
        "{name: url, url: 'URL'}",
        "{name: judge, ask: {name: server, url: 'URL', model: m}}",
        "{name: mix, scorers: [{scorer: {name: rules, rule: vader}}, {scorer: {name: url, url: 'URL'}}]}",
    ],
)
def test_a_server_that_cannot_be_reached_is_told_before_the_run(scorer: str, free_port: int) -> None:
    """Whatever one says that is there, that it does not take a GET for instance, it is there."""
    absent, asked = f"http://127.0.0.1:{free_port}/v1", []
    found = plan(f"scorer={scorer.replace('URL', absent)}")
    (note,) = (note for note in found.fit.notes if "cannot be reached" in note)
    assert absent in note and "scorer." in note and "Connect" in note and "start" in note
    assert found.fits
    with serving(lambda body, before: asked.append(body) or Reply({})) as service:
        there = plan(f"scorer={scorer.replace('URL', service.url)}")
    assert not any("cannot be reached" in note for note in there.fit.notes) and not asked  # nothing that is paid for


def test_a_server_that_takes_its_time_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayalign.plan.servers.PATIENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/score"
        found = plan(f"scorer={{name: url, url: '{url}'}}")
    assert not any("cannot be reached" in note for note in found.fit.notes)


def test_a_server_is_not_planned_and_a_judge_that_is_not_there_is_a_problem() -> None:
    ask = "scorer={name: judge, ask: {name: server, url: 'http://127.0.0.1:8000/v1', model: m}}"
    assert any("server needs" in note for note in plan(ask).fit.notes)
    (problem,) = plan("scorer.ask.model=/no/such/judge").problems
    assert problem.where == "key scorer.ask.model" and "no such folder" in problem.what


def test_a_judge_without_room_for_a_request_is_a_problem_of_the_judge() -> None:
    found = plan(f"scorer.ask.model={SMALL}", "scorer.ask.engine.kv_cache_gib=0.001")
    (problem,) = found.problems
    assert problem.where == "key scorer.ask.engine.kv_cache_gib" and "scorer.ask.engine.max_context" in problem.rule

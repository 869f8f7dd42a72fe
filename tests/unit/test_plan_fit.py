"""Whole plans: every shipped config, what does not fit, and that advice that is followed does fit."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rayalign.config import load_config
from rayalign.config.source import in_yaml
from rayalign.errors import ConfigError
from rayalign.plan import make_plan, print_plan
from rayalign.plan.advice import apply
from rayalign.plan.batches import prompt_lengths
from rayalign.plan.fit import evaluate
from rayalign.plan.nodes import parse_nodes, write_nodes
from rayalign.plan.shapes import read_shape
from rayalign.trackers import TensorBoard

ROOT = Path(__file__).resolve().parents[2]
SHAPES = Path(__file__).parent / "shapes"
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "\nrounds:\n" not in path.read_text())
LARGE = (
    "rollout.prompts=64",
    "sampling.max_tokens=1024",
    "engine.max_context=2048",
    "learner.zero_stage=2",
    "learner.micro_batch_tokens=8192",
)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def demo(model: str, *overrides: str):
    return load_config(ROOT / "configs/demo.yaml", [f"model.path={SHAPES / model}", *overrides])


def printed(plan, width: int = 80) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_plans(path):
    config = load_config(path)
    name = Path(config.model.path).name
    nodes = next((nodes for part, nodes in NODES.items() if part in path.stem), "1x2cpu/16GiB")
    there = [f"model.path={SHAPES / SIMILAR.get(name, name)}"]
    if judge := getattr(getattr(config.scorer, "ask", None), "model", None):
        there.append(f"scorer.ask.model={SHAPES / SIMILAR.get(Path(judge).name, Path(judge).name)}")
    plan = make_plan(load_config(path, there), nodes=nodes)
    assert plan.fits, plan.problems
    expected = {"learner": config.learns, "engine": config.samples, "scorer": config.scorer_actors}
    kinds = {kind for kind, there in expected.items() if there}
    assert {place.actor.split("-")[0] for place in plan.fit.places} == kinds
    assert plan.fit.batches.passes or "hub" in (plan.lengths.rows or plan.lengths).source
    assert "this fits" in printed(plan)


# What a config is written for; else a laptop.
NODES = {
    "1gpu": "1x1xA100-80/400GiB",
    "8gpu": "1x8xA100-80/1800GiB",
    "mdpo": "1x8xA100-80/1800GiB",
    "multinode": "4x8xA100-80/1800GiB",
}
SIMILAR = {"Llama-3.1-8B-Instruct": "Llama-3.1-8B"}  # of the same shape


def test_the_demo_takes_what_the_readme_says():
    plan = make_plan(demo("SmolLM2-135M-Instruct"), nodes="1x2cpu/16GiB")
    (load,) = plan.fit.loads
    assert 7.0 < load.needed < 10.0
    assert plan.differs["learner.zero_stage"] == (0, 2) and "seed" not in plan.differs
    assert plan.fit.batches.optimizer_steps_in_run == 30


def test_8b_on_a_node_of_h100():
    plan = make_plan(demo("Llama-3.1-8B", *LARGE, "learner.ranks=4"), nodes="1x8xH100/1800GiB")
    assert not plan.fits and plan.problems[0].where == "each GPU of learner-0 … learner-3"
    assert plan.advice.overrides == ["learner.gradient_checkpointing=true"]


def test_70b_needs_gpus_that_can_load_it():
    plan = make_plan(demo("Llama-3.1-70B", *LARGE, "learner.ranks=4"), nodes="2x8xH100")
    assert plan.advice is None and any("cannot load" in problem.what for problem in plan.problems)
    assert "no change" in printed(plan)


CASES = [
    ("Llama-3.1-8B", "1x8xH100", ("learner.ranks=4",)),
    ("Llama-3.1-8B", "1x4xA100-40", ("learner.ranks=2",)),
    ("Llama-3.1-8B", "1x8xA100", ("learner.ranks=8",)),
    ("Llama-3.1-8B", "1x4xL40S/256GiB", ("learner.ranks=3",)),
    ("Llama-3.1-8B", "1x1xH200", ("placement.colocate=true", "engine.gpu_memory=0.9")),
    ("Llama-3.1-70B", "1x8xB200/2000GiB", ("learner.ranks=6",)),
    ("Llama-3.1-70B", "1x8xMI300X/1500GiB", ("learner.ranks=4", "engine.tensor_parallel=4")),
    ("SmolLM2-135M-Instruct", "1x2cpu/8GiB", ()),
    ("SmolLM2-135M-Instruct", "1x1cpu/8GiB", ("learner.micro_batch_tokens=2048",)),
    ("SmolLM2-135M-Instruct", "1x2cpu/16GiB", ("engine.count=4",)),
    ("SmolLM2-135M-Instruct", "1x8cpu/64GiB", ("engine.tensor_parallel=2",)),
    ("SmolLM2-135M-Instruct", "1x2cpu/16GiB", ("engine.kv_cache_gib=0.02", "engine.max_context=2048")),
]


@pytest.mark.parametrize(("model", "nodes", "overrides"), CASES)
def test_advice_that_is_followed_fits(model, nodes, overrides):
    large = LARGE if model != "SmolLM2-135M-Instruct" else ()
    config = demo(model, *large, *overrides)
    plan = make_plan(config, nodes=nodes)
    assert not plan.fits and plan.advice is not None, plan.problems
    # As a user would: the printed line, pasted.
    words = printed(plan).splitlines()[-1].split()
    there = next((word.removeprefix("nodes=") for word in words if word.startswith("nodes=")), nodes)
    again = make_plan(
        demo(model, *large, *overrides, *[word for word in words if not word.startswith("nodes=")]), nodes=there
    )
    assert again.fits, (words, again.problems)
    assert len(parse_nodes(there)) >= len(plan.nodes)


def test_the_number_of_nodes_is_the_smallest():
    config = demo("Llama-3.1-70B", *LARGE, "learner.ranks=6", "engine.tensor_parallel=2")
    plan = make_plan(config, nodes="1x8xB200/2000GiB")
    nodes = plan.advice.nodes
    assert len(nodes) > 1
    assert not _anything_that_fits(config, nodes[:-1])


def test_several_keys_are_tried_before_more_nodes():
    overrides = [*LARGE, "learner.micro_batch_tokens=2048", "learner.ranks=16", "engine.count=2"]
    config = demo("Llama-3.1-70B", *overrides, "engine.tensor_parallel=8", "learner.zero_stage=3")
    plan = make_plan(config, nodes="4x8xH200/96cpu/2000GiB")
    assert not plan.fits and plan.advice.nodes == () and len(plan.advice.settings) > 2
    changed = apply(config, plan.advice.settings)
    assert make_plan(changed, nodes="4x8xH200/96cpu/2000GiB").fits
    for key in dict(plan.advice.settings):  # no key of it is idle
        rest = [each for each in plan.advice.settings if each[0] != key]
        assert not make_plan(apply(config, rest), nodes="4x8xH200/96cpu/2000GiB").fits, key
    assert _anything_that_fits(config, parse_nodes("4x8xH200/96cpu/2000GiB"))
    fewer = make_plan(config, nodes="2x8xH200/96cpu/2000GiB")
    assert "it fits on" in printed(fewer) and "smallest" not in printed(fewer)
    assert not _anything_that_fits(config, fewer.advice.nodes[:-1]), len(fewer.advice.nodes)


def _anything_that_fits(config, nodes):
    """The first of all choices of the keys that save memory, with every number of ranks."""
    shape = read_shape(config.model.path)
    lengths = prompt_lengths(config)
    savings = (("learner.gradient_checkpointing", True), ("learner.zero_stage", 3), ("engine.max_running", 1))
    least = (*savings, ("learner.micro_batch_tokens", 256), ("learner.logprob_chunk", 128))
    for parallel, offload in itertools.product((1, 2, 4, 8), ("none", "cpu")):
        trades = (*least, ("engine.tensor_parallel", parallel), ("learner.offload", offload))
        for ranks in range(1, 8 * len(nodes) + 1):
            settings = (*trades, ("learner.ranks", ranks))
            if evaluate(apply(config, settings), shape, lengths, nodes).fits:
                return settings
    return None


def test_actors_that_have_no_place_are_a_problem_with_a_remedy():
    plan = make_plan(demo("SmolLM2-135M-Instruct", "engine.count=3"), nodes="1x2cpu/32GiB")
    assert plan.fit.places == () and plan.problems[0].where == "key engine.count"
    assert "lower engine.count to 2" in printed(plan)


@pytest.mark.parametrize("nodes", ["1x4cpu/16GiB", "1x1xL4/64GiB"])
def test_a_local_plan_is_one_process(nodes, make):
    plan = make_plan(make(), nodes=nodes)
    assert plan.fits and len({place.node for place in plan.fit.places}) == 1
    assert "engine-0, learner-0, scorer-0" in printed(plan, 100)


def test_more_scorers_than_cores_can_be_shared_out_to_are_refused():
    plan = make_plan(demo("SmolLM2-135M-Instruct", "scorer.count=99999999"), nodes="2x2cpu/32GiB")
    assert plan.problems[0].where == "key scorer.count" and "to 360" in plan.problems[0].remedy
    assert make_plan(demo("SmolLM2-135M-Instruct", "scorer.count=4"), nodes="2x2cpu/32GiB").fits


def test_what_is_not_known_is_said():
    plan = make_plan(demo("SmolLM2-135M-Instruct"), nodes="1x2xH100")
    text = " ".join(printed(plan).split())
    assert "host memory is not known" in text and "bounds" in text and "not checked" in text


@pytest.mark.parametrize(
    ("model", "nodes", "overrides"),
    [
        ("Llama-3.1-8B", "1x8xA100", ("learner.ranks=2", "learner.gradient_checkpointing=true")),
        ("Llama-3.1-70B", "1x8xB200", ("learner.ranks=6",)),
        ("Llama-3.1-70B", "4x8xB200", ("learner.ranks=8", "engine.tensor_parallel=8")),
    ],
)
def test_nothing_is_offloaded_into_memory_that_is_not_known(model, nodes, overrides):
    config = demo(model, *LARGE, *overrides)
    plan = make_plan(config, nodes=nodes)
    assert plan.advice and "learner.offload" not in dict(plan.advice.settings)
    ranks = dict(plan.advice.settings)["learner.ranks"]
    assert ranks > config.learner.ranks
    text = " ".join(printed(plan, 100).split())
    changed = make_plan(apply(config, plan.advice.settings), nodes=write_nodes(plan.advice.nodes or plan.nodes))
    needed = max(load.needed for load in changed.fit.loads if not load.of_gpu)
    assert f"if each node has {needed:.1f} GiB of host memory, which was not checked" in text
    assert ("may need fewer nodes" in text) == bool(plan.advice.nodes)


@pytest.mark.parametrize(
    ("model", "nodes", "overrides"),
    [
        ("Llama-3.1-8B", "2x1xH100", ("learner.ranks=1", "rollout.prompts=1")),  # one prompt is for one rank
        ("Llama-3.1-70B", "4x8xH200", ("learner.ranks=8", "engine.tensor_parallel=8")),  # loading fills each GPU
    ],
)
def test_offloading_is_advised_where_nothing_else_helps_and_the_memory_is_said(model, nodes, overrides):
    plan = make_plan(demo(model, *LARGE, *overrides), nodes=nodes)
    assert dict(plan.advice.settings)["learner.offload"] == "cpu"
    assert "GiB of host memory, which was not checked" in " ".join(printed(plan).split())


def test_a_verdict_says_what_it_did_not_check():
    config = demo("SmolLM2-135M-Instruct")
    text = " ".join(printed(make_plan(config, nodes="1x2xH100")).split())
    assert "this fits if each node has 3.9 GiB of host memory, which was not checked" in text
    assert printed(make_plan(config, nodes="1x2xH100/64GiB")).splitlines()[-1] == "this fits"


def test_prompts_that_are_missing_are_the_only_problem_said():
    plan = make_plan(demo("SmolLM2-135M-Instruct", "data.prompts=configs/prompts/nope.jsonl"), nodes="1x2cpu/64GiB")
    text = " ".join(printed(plan).split())
    assert "problem: configs/prompts/nope.jsonl: there is no such file" in text and "all else fits" in text


def test_the_config_is_shown_as_a_config_would_hold_it():
    trackers = "[{name: tensorboard}, {name: wandb, project: x}]"
    plan = make_plan(demo("SmolLM2-135M-Instruct", f"trackers={trackers}", "seed=3"), nodes="1x2cpu/64GiB")
    text = printed(plan, 140)
    assert trackers in text and "(top level): run_dir=null resume=false" in text
    for values in (plan.defaults, {key: value for key, (value, _) in plan.differs.items()}):
        for value in values.values():
            assert yaml.safe_load(in_yaml(value)) == (list(value) if isinstance(value, tuple) else value)


def test_secrets_are_not_shown():
    tracker = "{name: 'tests.unit.test_plan_fit:Tracker', api_key: abc123}"
    plan = make_plan(demo("SmolLM2-135M-Instruct", f"trackers=[{tracker}]"), nodes="1x2cpu/64GiB")
    assert "abc123" not in printed(plan, 140) and "***" in printed(plan, 140)


class Tracker(TensorBoard):
    name: str = "tests.unit.test_plan_fit:Tracker"  # type: ignore[assignment]
    api_key: str = ""


def test_keys_stand_on_one_line_and_offload_is_spoken_of_where_it_is_off():
    overrides = ["learner.ranks=6", "learner.gradient_checkpointing=true", "engine.kv_cache_gib=0.75"]
    trackers = "trackers=[{name: tensorboard}, {name: wandb, project: a-name-that-is-long}]"
    text = printed(make_plan(demo("Llama-3.1-70B", *LARGE, *overrides, trackers), nodes="1x8xB200"))
    assert " learner.gradient_checkpointing " in text and "with learner.offload=cpu" in text
    text = printed(make_plan(demo("Llama-3.1-70B", *LARGE, *overrides, "learner.offload=cpu"), nodes="1x1xB200"))
    assert "such nodes" in text and "with learner.offload=cpu" not in text


def test_a_config_that_no_machine_can_run_is_refused():
    with pytest.raises(ConfigError, match="no room for such a context"):
        make_plan(demo("SmolLM2-135M-Instruct", "engine.max_context=100000"), nodes="1x8xH100")


@pytest.mark.parametrize("width", [80, 100, 140])
def test_it_is_readable_at_this_width(width):
    config = demo("Llama-3.1-70B", *LARGE, "learner.ranks=8", "engine.tensor_parallel=4", "engine.count=2")
    text = printed(make_plan(config, nodes="2x8xB200/2000GiB"), width)
    pasted = [line for line in text.splitlines() if line.startswith("  nodes=")]
    assert all(len(line) <= width for line in text.splitlines() if line not in pasted)
    for part in ("what differs", "actors on nodes", "one step", "memory by role", "70,553,706,496", "KV cache"):
        assert part in text
    # No number is cut off, and memory rows stand on one line where there is room.
    assert "…" not in text.split("memory by role")[1].split("what each place")[0]


def test_more_of_something_never_needs_less():
    sizes = []
    for tokens, prompts in itertools.product((2048, 8192), (8, 64)):
        overrides = [*LARGE, f"learner.micro_batch_tokens={tokens}", f"rollout.prompts={prompts}"]
        plan = make_plan(demo("Llama-3.1-8B", *overrides), nodes="1x8xH200")
        sizes.append(max(load.needed for load in plan.fit.loads if "learner" in load.where))
    assert sizes == sorted(sizes)

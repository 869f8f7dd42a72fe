"""Plans of runs that learn from rows of data: arithmetic by hand, and no engine where nothing is sampled."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rayalign.config import parse_config
from rayalign.learners.settings import LearnerSpec
from rayalign.plan import make_plan, print_plan
from rayalign.plan.activations import kl_bytes, logit_bytes
from rayalign.plan.advice import apply
from rayalign.plan.batches import count_batches, data_lengths, tokens_of_a_step
from rayalign.plan.learners import adapter_parameters, learner_memory
from rayalign.plan.records import Lengths, Rows, Tokens
from rayalign.plan.shapes import read_shape
from tests.parts import write_prompts

SHAPES = Path(__file__).parent / "shapes"
PAIRS = Rows(15.0, 20, 8, (1.0, 0.0), 16, 4, True, "")
LENGTHS = Lengths(0.0, 0, 0, 0, 0, True, "", rows=PAIRS)
PAIR = {"chosen": "it is good", "rejected": "bad"}
RANKED = {"completions": ["a", "b c", "d", "e"], "ranks": [2, 1, 3, 0]}


@pytest.fixture
def offline(tmp_path, model):
    """A checked config of the tiny model with 20 rows of data, in this process, with changes."""

    def build(algorithm="preference", row=None, count=20, **changes):
        path = tmp_path / "rows.jsonl"
        rows = [{"prompt": f"film {i}", **(row or PAIR)} for i in range(count)]
        if row == "labels":
            rows = [{"prompt": f"film {i}", "completion": "good", "label": i % 2} for i in range(count)]
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        base = {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"examples": str(path)},
            "algorithm": algorithm,
            "rollout": {"prompts": 4},
            "train": {"steps": 8},
            "learner": {"name": "torch", "threads": 1},
            "placement": "local",
            "checkpoint": {"every": 0},
            "trackers": [],
        }
        return parse_config(base | changes)

    return build


def printed(plan) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=120))
    return " ".join(out.getvalue().split())


def test_a_step_of_pairs_by_hand(offline):
    learner = {"name": "deepspeed", "ranks": 2, "micro_batch_tokens": 100}
    config = offline(rollout={"prompts": 8}, train={"steps": 10}, learner=learner, placement="ray")
    batches, micro = count_batches(config, LENGTHS)
    assert (batches.prompts, batches.samples, batches.completions, batches.rollouts) == (8, 2, 0, 0)
    assert (batches.examples, batches.rows, batches.share) == (8, 2, 4)
    # A pair is 2 rows of 20 tokens, so that 2 pairs fit 100 tokens: 2 micro-batches of 80 with 4 answers of 8.
    assert (batches.micro_batches, micro.tokens, micro.longest, micro.positions) == (2, 80, 20, 32)
    assert (batches.optimizer_steps_in_run, batches.pushes) == (10, 0)
    assert batches.passes == 10 * 8 / 16
    assert (batches.evaluations, batches.evaluation_rows, batches.evaluation_completions) == (2, 4, 0)
    assert tokens_of_a_step(config, LENGTHS, batches) == Tokens(0.0, 0.0, 8 * 2 * 15.0, 8 * 2 * 15.0)


@pytest.mark.parametrize(
    ("algorithm", "scores", "examples", "sequences"),
    [  # of one row
        ("sft", (1.0, 0.0), 1, 1),
        ("kto", (1.0,), 1, 2),  # the mismatched answer is a second sequence
        ("kto", (1.0, 0.0), 2, 2),
        ({"name": "kto", "paired": True}, (1.0, 0.0), 1, 2),
        ({"name": "cringe", "variant": "binary"}, (0.0,), 1, 1),
        ({"name": "cringe", "variant": "pairwise"}, (1.0, 0.0), 1, 2),
        ("preference", (-1.0, -2.0, -3.0, -3.0), 6, 2),  # at most: ties would be dropped
        ({"name": "preference", "pairs": "best_worst"}, (-1.0, -2.0, -3.0, -4.0), 1, 2),
        ({"name": "preference", "loss": {"name": "slic_hf", "target": "best"}}, (-1.0, -2.0, -3.0), 3, 3),
        ("preference", (0.0, 0.0, 1.0), 2, 2),  # a choice: the one against each other
        ("reward_model", (1.0, 0.0), 1, 2),
        ({"name": "reward_model", "loss": {"name": "bradley_terry", "margin": "column"}}, (1.0, 0.0), 1, 2),
        ({"name": "reward_model", "loss": "k_choose_2"}, (-1.0, -2.0, -3.0, -4.0), 1, 4),
        ({"name": "reward_model", "loss": "best_of_choice"}, (0.0, 1.0, 0.0), 1, 3),
    ],
)
def test_what_each_algorithm_makes_of_a_row(offline, algorithm, scores, examples, sequences):
    lengths = replace(LENGTHS, rows=replace(PAIRS, scores=scores))
    batches, _ = count_batches(offline(algorithm), lengths)
    assert (batches.examples, batches.rows) == (4 * examples, sequences)


def test_rows_are_measured_where_the_tokenizer_is_there(offline, tmp_path, model):
    rows = data_lengths(offline()).rows
    assert rows.measured and (rows.training, rows.held_out, rows.scores) == (16, 4, (1.0, 0.0))
    assert 1 < rows.answer < rows.mean < rows.longest < 60
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_text((model / "config.json").read_text())
    rows = data_lengths(offline(row=RANKED, model={"path": str(shape)})).rows
    assert not rows.measured and (rows.training, rows.held_out, rows.longest) == (16, 4, 1024)
    assert len(rows.scores) == 4 and "no tokenizer" in rows.source
    hub = data_lengths(offline(data={"examples": "nobody/data"})).rows
    assert (hub.training, hub.measured, hub.problem) == (None, False, None)


def test_nothing_is_started_that_samples(offline):
    plan = make_plan(offline(), nodes="1x2cpu/16GiB")
    assert plan.fits and [place.actor for place in plan.fit.places] == ["learner-0"]
    assert [role.role for role in plan.fit.memory] == ["policy", "reference", "process"] and plan.fit.cache is None
    text = printed(plan)
    for part in ("rows of data", "2.00 over 16 training rows", "16 pairs from", "4 held-out rows"):
        assert part in text
    assert "pushes" not in text and "KV cache" not in text and "engine-0" not in text
    ray = make_plan(offline(placement="ray", learner={"ranks": 2, "threads": 1}), nodes="1x2cpu/64GiB")
    assert [place.actor for place in ray.fit.places] == ["learner-0", "learner-1"]


def test_prompts_beside_rows_are_for_evaluation(offline, tmp_path):
    data = {"examples": str(tmp_path / "rows.jsonl"), "prompts": str(write_prompts(tmp_path / "p.jsonl"))}
    sampled = {"engine": {"name": "transformers", "max_context": 64}, "sampling": {"max_tokens": 8}}
    config = offline(data=data, scorer={"name": "rules", "rule": "brevity"}, **sampled, evaluation={"every": 4})
    plan = make_plan(config, nodes="1x4cpu/64GiB")
    assert plan.fits and [place.actor for place in plan.fit.places] == ["engine-0", "learner-0", "scorer-0"]
    batches = plan.fit.batches
    assert (batches.completions, batches.rollouts) == (0, 0)
    # At the start, and before the evaluations at 4 and 8; all 20 prompts are held out, 4 samples each.
    assert (batches.pushes, batches.evaluations, batches.evaluation_completions) == (3, 3, 80)


def test_a_cached_reference_takes_no_memory_and_is_the_nearest_change(offline):
    cached = offline({"name": "preference", "reference": {"cached": True}})
    plan = make_plan(cached, nodes="1x2cpu/16GiB")
    assert [role.role for role in plan.fit.memory] == ["policy", "process"] and plan.tokens.reference == 0
    assert "computed once" in printed(plan)
    large = {"model": {"path": str(SHAPES / "Llama-3.1-8B")}, "placement": "ray", "rollout": {"prompts": 8}}
    learner = {"zero_stage": 2, "ranks": 8, "gradient_checkpointing": True, "micro_batch_tokens": 4096}
    config = offline(**large, learner=learner)
    live = make_plan(config, nodes="1x8xH100/2000GiB").fit.loads[0].needed
    nodes = f"1x8x{int(live - 10)}GiB/2000GiB"  # no room for the reference's 15 GiB
    plan = make_plan(config, nodes=nodes)
    assert not plan.fits and plan.advice.overrides == ["algorithm.reference.cached=true"]
    assert make_plan(apply(config, plan.advice.settings), nodes=nodes).fits
    moving = offline({"name": "preference", "reference": {"update": "replace", "every": 5}}, **large, learner=learner)
    assert "algorithm.reference.cached" not in dict(make_plan(moving, nodes=nodes).advice.settings)


def test_a_score_network_has_a_scalar_head_and_no_logits(offline):
    path = str(SHAPES / "Llama-3.1-8B")
    language, score = read_shape(path), read_shape(path, network="score")
    assert score.parameters == language.parameters - language.vocabulary * language.hidden + language.hidden
    assert (score.architecture, score.tied) == ("LlamaForSequenceClassification", False)
    plan = make_plan(offline("reward_model"), nodes="1x2cpu/16GiB")
    assert plan.fits and "scalar head" in printed(plan)
    assert [role.role for role in plan.fit.memory] == ["policy", "process"]
    many = {"learner": {"name": "torch", "logprob_chunk": 1024}}
    lengths = replace(LENGTHS, rows=replace(PAIRS, longest=1024, answer=1000))
    _, micro = count_batches(offline(**many), lengths)
    wide = replace(read_shape(path), vocabulary=10**6)  # logits would outweigh all else
    with_logits, without = (
        learner_memory(offline(name, **many), wide, micro, on_gpu=True)[0].device for name in ("sft", "reward_model")
    )
    assert with_logits.activations - without.activations > 1e9


def test_an_exact_kl_has_the_reference_and_its_logits(offline):
    shape = replace(read_shape(str(SHAPES / "Llama-3.1-8B")), vocabulary=10**6)
    lengths = replace(LENGTHS, rows=replace(PAIRS, longest=512, answer=500))
    learner = {"name": "torch", "logprob_chunk": 256}
    found = []
    for algorithm in ("sft", {"name": "sft", "kl_weight": 0.1}):
        config = offline(algorithm, learner=learner)
        batches, micro = count_batches(config, lengths)
        found.append({role.role: role.device for role in learner_memory(config, shape, micro, on_gpu=True)})
        tokens = tokens_of_a_step(config, lengths, batches)
        assert tokens.reference == (0 if algorithm == "sft" else tokens.trained)
    assert "reference" not in found[0] and found[1]["reference"].weights == 4 * shape.parameters
    hidden = 4 * shape.hidden * micro.positions
    # Of 256 positions: two more blocks of float32 logits, and two of probabilities.
    assert kl_bytes(shape, 256, width=4) == 256 * 10**6 * 16
    more = found[1]["policy"].activations - found[0]["policy"].activations
    assert more == kl_bytes(shape, 256, width=4) + hidden
    assert logit_bytes(shape, 256, width=4, temperature=1.0) == 256 * 10**6 * 12


@pytest.mark.parametrize("algorithm", ["preference", "reward_model"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_lora_trains_as_many_parameters_as_are_estimated(offline, model, algorithm, targets):
    lora = {"rank": 4, "targets": targets}
    config = offline(algorithm, model={"path": str(model), "dtype": "float32", "lora": lora})
    shape = read_shape(str(model), network=config.algorithm.network)
    spec = LearnerSpec(
        "policy",
        str(model),
        dtype="float32",
        optimizer=config.optimizer,
        settings=config.learner,
        network=config.algorithm.network,
        lora=config.model.lora,
    )
    learner = config.learner.build([spec], rank=0, world_size=1, address=("", 0))["policy"]
    parameters = list(learner.policy.parameters())
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    assert trained == adapter_parameters(config, shape)
    policy = learner_memory(config, shape, count_batches(config, LENGTHS)[1], on_gpu=True)[0].device
    assert (policy.gradients, policy.optimizer) == (4 * trained, 8 * trained)
    assert policy.weights == 4 * sum(each.numel() for each in parameters)


def test_the_reference_of_lora_is_the_policy_without_its_adapters(offline, model):
    path = {"path": str(SHAPES / "Llama-3.1-8B"), "lora": {"rank": 16}}
    learner = {"zero_stage": 2, "gradient_checkpointing": True}
    plan = make_plan(offline(model=path, placement="ray", learner=learner), nodes="1x1xH100/400GiB")
    roles = {role.role: role.device for role in plan.fit.memory}
    # rank 16 on q, k, v, o, gate, up and down of 32 layers, as peft counts them.
    assert roles["policy"].optimizer == 12 * 41_943_040
    assert roles["reference"].total == 0 and plan.fits
    assert plan.disk.checkpoint < 17


@pytest.mark.parametrize(
    ("changes", "what", "where"),
    [
        ({"data": {"examples": "not-there.jsonl"}}, "there is no such file", "not-there.jsonl"),
        ({"count": 4}, "fewer rows than one step takes", "key rollout.prompts"),
        ({"row": {"completion": "good"}}, "these rows are prompt/completion", "rows.jsonl"),
        ({"row": {"chosen": "same", "rejected": "same"}}, "the two answers are the same", "rows.jsonl:1"),
        ({"algorithm": "kto", "row": {"completion": "good", "label": True}}, "all labels are equal", "rows.jsonl"),
    ],
)
def test_rows_that_a_run_could_not_learn_from_are_a_problem(offline, changes, what, where):
    plan = make_plan(offline(**changes), nodes="1x2cpu/64GiB")
    (problem,) = plan.problems
    assert not plan.fits and plan.fit.fits and plan.advice is None
    assert what in problem.what and where in problem.where and problem.value and problem.rule and problem.remedy


def test_data_that_is_cut_is_the_last_resort(offline):
    large = {"model": {"path": str(SHAPES / "Llama-3.1-8B")}, "placement": "ray"}
    learner = {"zero_stage": 3, "ranks": 4, "gradient_checkpointing": True, "logprob_chunk": 128}
    learner |= {"offload": "cpu", "micro_batch_tokens": 256}
    data = {"examples": str(offline().data.examples[0].path), "max_tokens": 131072}
    config = offline("sft", **large, learner=learner, data=data)
    plan = make_plan(config, nodes="1x4x40GiB/2000GiB")
    assert not plan.fits and plan.advice is not None
    assert "data.max_tokens" in dict(plan.advice.settings)
    assert make_plan(apply(config, plan.advice.settings), nodes="1x4x40GiB/2000GiB").fits

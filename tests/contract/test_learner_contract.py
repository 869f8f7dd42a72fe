"""TorchLearner against plain torch, and every promise of the Learner protocol on one process."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayalign.errors import CheckpointError, ConfigError, DataError, TrainingStopped
from rayalign.learners.base import learning_rate, merge_annotations, merge_metrics
from rayalign.learners.torch import TorchLearnerConfig
from rayalign.protocols import UpdatePlan
from rayalign.sync.flat import checksum, unpack
from rayalign.types import Column, TopLogits
from tests.contract.learner_cases import (
    DPO,
    OPTIMIZER,
    PROBES,
    Broken,
    Centred,
    Compared,
    Distilled,
    pairs,
    smooth,
    specs,
    train,
    weights,
)
from tests.tiny_models import build_tiny_llama

ADDRESS = ("127.0.0.1", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_llama(tmp_path_factory.mktemp("model"), tied=True)


def build(model, **settings):
    changes = {name: settings.pop(name) for name in ("dtype", "network") if name in settings}
    config = TorchLearnerConfig(**settings)
    return config.build(specs(model, config, **changes), rank=0, world_size=1, address=ADDRESS)


def annotate(learner, examples, columns):
    return learner.annotate(examples, columns)


def update(learner, examples, algorithm, plan):
    return learner.update(examples, algorithm, plan)


def run(roles, examples, **plan):
    return train(roles, examples, annotate=annotate, update=update, **plan)


def plain_logps(model, ids, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def test_two_steps_are_those_of_plain_torch_one_row_at_a_time(model):
    """Written out with nothing of rayalign: DPO with beta 0.1 at temperature 0.8, clipped AdamW."""
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), eps=1e-5, weight_decay=0.01)

    def total(net, row):
        logits = net(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0] / 0.8
        start = len(row.prompt_ids) - 1
        picked = logits.log_softmax(-1)[start : start + len(row.completion_ids)]
        return picked.gather(1, torch.tensor(row.completion_ids)[:, None]).sum()

    roles, examples = build(model), pairs(5)
    for got, rate in zip(run(roles, examples), (1e-3, 1e-3), strict=True):
        losses = []
        for example in examples:
            chosen, rejected = (total(policy, row) - total(reference, row).detach() for row in example.sequences)
            losses.append(-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)))
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert got["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
        assert got["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert got["lr"] == rate
    own = weights(roles["policy"])
    for name, parameter in policy.named_parameters():
        assert torch.allclose(own[name], parameter, atol=1e-5), name
    assert set(own) == {name for name, _ in policy.named_parameters()} and "lm_head.weight" not in own


@pytest.mark.parametrize("tokens", [1, 30, 70])
@pytest.mark.parametrize("plan", [{}, {"epochs": 2, "minibatches": 2, "seed": 3}])
def test_any_split_into_micro_batches_gives_the_same_numbers(model, tokens, plan):
    whole, parts = build(model), build(model, micro_batch_tokens=tokens, logprob_chunk=4)
    examples = pairs(5)
    for one, other in zip(run(whole, examples, **plan), run(parts, examples, **plan), strict=True):
        assert smooth(one) == pytest.approx(smooth(other), abs=1e-5)
    theirs = weights(parts["policy"])
    for name, tensor in weights(whole["policy"]).items():
        assert torch.allclose(tensor, theirs[name], atol=1e-5), name


def test_metrics_are_means_over_optimiser_steps_and_the_rate_follows_the_step(model):
    roles = build(model)
    reference = roles["reference"].annotate(pairs(4), [Column.LOGPS])
    metrics = roles["policy"].update(reference, DPO, UpdatePlan(step=3, epochs=2, minibatches=2, seed=1))
    assert metrics["lr"] == learning_rate(OPTIMIZER, 3, 5)
    assert 0 < metrics["loss"] < 0.6931 and 0 <= metrics["rewards/accuracies"] <= 1
    steps = [len({float(state["step"])}) for state in roles["policy"]._optimizer.state.values()]
    assert set(steps) == {1} and next(iter(roles["policy"]._optimizer.state.values()))["step"] == 4


def test_annotations_keep_order_lengths_and_earlier_columns(model):
    roles = build(model, micro_batch_tokens=30)
    examples = pairs(5)
    once = roles["reference"].annotate(examples, [Column.LOGPS, Column.ENTROPY])
    twice = roles["policy"].annotate(once, [Column.LOGPS])
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    for before, after in zip(examples, twice, strict=True):
        for row, filled in zip(before.sequences, after.sequences, strict=True):
            assert (row.prompt_ids, row.completion_ids) == (filled.prompt_ids, filled.completion_ids)
            assert set(filled.columns) == {"reference/logps", "reference/entropy", "policy/logps"}
            want = plain_logps(plain, row.prompt_ids + row.completion_ids, 0.8)[len(row.prompt_ids) - 1 :]
            for name in ("reference/logps", "policy/logps"):
                assert filled.columns[name].dtype == np.float32
                assert np.allclose(filled.columns[name], want, atol=1e-5)
    assert roles["policy"].annotate([], [Column.LOGPS]) == []


def test_logps_are_those_of_the_model_at_temperature_one(model):
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    found = build(model)["policy"].logps(PROBES)
    assert [len(array) for array in found] == [len(ids) - 1 for ids in PROBES]
    for ids, array in zip(PROBES[:-1], found[:-1], strict=True):
        assert array.dtype == np.float32 and np.allclose(array, plain_logps(plain, ids), atol=1e-5)


def test_the_exact_kl_and_its_gradient_are_those_of_plain_torch(model):
    roles = build(model, micro_batch_tokens=40, logprob_chunk=3)
    run(roles, pairs(4))
    policy, reference = (roles[name].policy.model for name in ("policy", "reference"))

    def wanted(row):
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        with torch.no_grad():
            log_p = (reference(ids).logits[0, len(row.prompt_ids) - 1 : -1] / 0.8).log_softmax(-1)
        log_q = (policy(ids).logits[0, len(row.prompt_ids) - 1 : -1] / 0.8).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    found = roles["policy"].annotate(pairs(4), [Column.REFERENCE_KL])
    for row in (row for example in found for row in example.sequences):
        kl = row.columns["policy/reference_kl"]
        assert kl.min() > 0 and np.allclose(kl, wanted(row).detach().numpy(), atol=1e-5)
    learner = roles["policy"]
    batch = learner.batch(pairs(3), [0, 1, 2])
    learner.columns(batch, [Column.REFERENCE_KL])["reference_kl"].sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    sum(wanted(row).sum() for example in pairs(3) for row in example.sequences).backward()
    for name, parameter in policy.named_parameters():
        assert torch.allclose(got[name], parameter.grad, atol=1e-4, rtol=1e-4), name
    assert all(parameter.grad is None for parameter in reference.parameters())
    alone = build(model)["policy"]
    alone.peers.pop("reference")
    with pytest.raises(ConfigError, match="no reference"):
        alone.annotate(pairs(1), [Column.REFERENCE_KL])


@pytest.mark.parametrize("algorithm", [DPO, Centred(), Distilled(), Compared()])
@pytest.mark.parametrize("settings", [{}, {"micro_batch_tokens": 30, "logprob_chunk": 4, "packing": True}])
def test_measuring_gives_what_the_next_update_gives_and_changes_nothing(model, algorithm, settings):
    roles = build(model, network="score" if isinstance(algorithm, Compared) else "causal")
    parts = build(model, network="score" if isinstance(algorithm, Compared) else "causal", **settings)
    run(roles, pairs(4), algorithm=algorithm)
    run(parts, pairs(4), algorithm=algorithm)
    examples = roles["reference"].annotate(pairs(5, seed=2), [Column.LOGPS])
    before = weights(roles["policy"])
    measured = roles["policy"].measure(examples, algorithm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(roles["policy"]).items())
    assert smooth(parts["policy"].measure(examples, algorithm)) == pytest.approx(smooth(measured), abs=1e-5)
    updated = roles["policy"].update(examples, algorithm, UpdatePlan(step=2))
    assert set(updated) - set(measured) == {"lr", "grad_norm", "padding"}
    assert {name: updated[name] for name in measured} == pytest.approx(measured, abs=1e-6)
    with pytest.raises(DataError):
        roles["policy"].measure([], algorithm)


@pytest.mark.parametrize("algorithm", [Distilled(), Compared()])
def test_every_column_works_in_bfloat16(model, algorithm):
    network = "score" if isinstance(algorithm, Compared) else "causal"
    exact, rounded = (build(model, network=network, dtype=dtype) for dtype in ("float32", "bfloat16"))
    for one, other in zip(
        run(exact, pairs(4), algorithm=algorithm), run(rounded, pairs(4), algorithm=algorithm), strict=True
    ):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.1)


def test_padding_is_the_share_of_positions_without_a_token(model):
    examples = build(model)["reference"].annotate(pairs(3), [Column.LOGPS])
    rows = [len(row) for example in examples for row in example.sequences]
    for settings, padding in (({}, 1 - sum(rows) / (6 * max(rows))), ({"packing": True}, 0.0)):
        found = build(model, **settings)["policy"].update(examples, DPO, UpdatePlan(step=0))
        assert found["padding"] == pytest.approx(padding)


def test_columns_of_several_numbers_are_annotated_and_batched(model):
    roles = build(model, micro_batch_tokens=30)
    found = roles["policy"].annotate(pairs(3), [TopLogits(4), Column.LOGPS])
    for row in (row for example in found for row in example.sequences):
        assert row.columns["policy/top_logits"].shape == (len(row.completion_ids), 5)
    batch = roles["policy"].batch(found, [0, 1])
    assert batch.columns["policy/top_logits"].shape == (*batch.labels.shape, 5)


def test_policy_and_reference_have_one_vocabulary(model, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(model)
    other.resize_token_embeddings(170)
    other.save_pretrained(tmp_path)
    config = TorchLearnerConfig()
    policy, reference = specs(model, config)
    with pytest.raises(ConfigError, match="different vocabularies") as caught:
        config.build([policy, replace(reference, model=str(tmp_path))], rank=0, world_size=1, address=ADDRESS)
    assert "160" in caught.value.value and "170" in caught.value.value
    policy = replace(policy, network="score")
    config.build([policy, replace(reference, model=str(tmp_path))], rank=0, world_size=1, address=ADDRESS)


def test_a_score_network_resumes_bit_for_bit(model, tmp_path):
    straight, halved = build(model, network="score"), build(model, network="score")
    for roles in (straight, halved):
        run(roles, pairs(4), algorithm=Compared())
    halved["policy"].save(tmp_path)
    resumed = build(model, network="score")
    resumed["policy"].restore(tmp_path)
    want, got = (run(roles, pairs(4), start=2, algorithm=Compared()) for roles in (straight, resumed))
    assert want == got and want[0]["loss"] > want[1]["loss"]
    theirs = weights(resumed["policy"])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(straight["policy"]).items())


def test_refresh_replaces_or_averages(model):
    roles = build(model)
    first = weights(roles["reference"])
    run(roles, pairs(3))
    policy = weights(roles["policy"])
    roles["reference"].refresh("policy", decay=0.75)
    for name, tensor in weights(roles["reference"]).items():
        assert torch.allclose(tensor, 0.75 * first[name] + 0.25 * policy[name], atol=1e-7), name
    roles["reference"].refresh("policy")
    assert all(torch.equal(tensor, policy[name]) for name, tensor in weights(roles["reference"]).items())
    for source, decay, error in (("critic", 0.0, ConfigError), ("policy", 1.0, ValueError)):
        with pytest.raises(error):
            roles["reference"].refresh(source, decay=decay)
    with pytest.raises(ConfigError):
        roles["policy"].refresh("reference")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_and_push_carry_the_trained_weights(model, tmp_path, dtype):
    roles = build(model, dtype=dtype)
    metrics = run(roles, pairs(3))
    assert all(np.isfinite(value) for step in metrics for value in step.values())
    policy = roles["policy"]
    wrapped = []
    policy.wrap_chunk = lambda array: wrapped.append(array) or array
    push = policy.push(7)
    arrived = {name: tensor.clone() for chunk in push.chunks for name, tensor in unpack(chunk)}
    own, kind = weights(policy), getattr(torch, dtype)
    assert push.version == 7 and len(wrapped) == len(push.chunks) and set(push.manifest) == set(own) == set(arrived)
    for name, tensor in arrived.items():
        assert torch.equal(tensor, own[name].to(kind)) and push.manifest[name] == checksum(tensor)
    policy.export(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == kind
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, arrived[name]), name


def test_a_restored_run_is_the_same_bit_for_bit(model, tmp_path):
    straight, halved = build(model), build(model)
    for roles in (straight, halved):
        run(roles, pairs(4))
        roles["reference"].refresh("policy", decay=0.5)
    for role, learner in halved.items():
        (tmp_path / role).mkdir()
        learner.save(tmp_path / role)
    resumed = build(model)
    for role, learner in resumed.items():
        learner.restore(tmp_path / role)
    want, got = (run(roles, pairs(4, seed=9), start=2) for roles in (straight, resumed))
    assert want == got
    for role in straight:
        theirs = weights(resumed[role])
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(straight[role]).items())


def test_a_frozen_role_that_never_changed_saves_a_marker_only(model, tmp_path):
    build(model)["reference"].save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["learner.json"]
    again = build(model)["reference"]
    again.restore(tmp_path)
    assert not again.refreshed


def test_checkpoints_of_something_else_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="no state"):
        build(model)["policy"].restore(tmp_path)
    build(model)["reference"].save(tmp_path)
    with pytest.raises(CheckpointError, match="another learner"):
        build(model)["policy"].restore(tmp_path)
    other = build_tiny_llama(tmp_path / "deeper", layers=3)
    build(other)["policy"].save(tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        build(model)["policy"].restore(tmp_path)


@pytest.mark.parametrize("where, message", [("loss", "the loss"), ("gradient", "the gradient norm")])
def test_numbers_that_are_not_finite_stop_the_run_before_the_step(model, where, message):
    policy = build(model)["policy"]
    before = weights(policy)
    with pytest.raises(TrainingStopped, match=message) as caught:
        policy.update(pairs(5), Broken(where), UpdatePlan(step=4))
    assert caught.value.where == "step 5" and "optimizer.lr" in caught.value.remedy
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(policy).items())


def test_updates_that_cannot_be_are_refused(model):
    roles = build(model)
    with pytest.raises(DataError):
        roles["policy"].update([], DPO, UpdatePlan(step=0))
    with pytest.raises(ConfigError):
        roles["reference"].update(pairs(1), DPO, UpdatePlan(step=0))
    roles["policy"].close()
    assert "policy" not in roles and roles["reference"].memory_gib() > 0


def test_merging_what_ranks_give():
    assert merge_metrics([({"loss": 1.0, "x": 2.0}, {"lr": 3.0}), ({"loss": 0.5}, {"lr": 3.0})]) == {
        "loss": 1.5,
        "x": 2.0,
        "lr": 3.0,
    }
    examples = pairs(2)
    new = ({"a": np.zeros(1)}, {"a": np.ones(1)})
    merged = merge_annotations(examples, [[(1, new)], [(0, new)]])
    assert merged[1].sequences[1].columns["a"] == 1.0
    assert merged[0] == replace(examples[0], sequences=merged[0].sequences)
    with pytest.raises(ValueError):
        merge_annotations(examples, [[(1, new)]])

"""DeepSpeed on one rank and on two gives what one process with one big batch gives, under every ZeRO stage."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rayalign.learners.deepspeed import DeepSpeedLearnerConfig
from rayalign.learners.torch import TorchLearnerConfig
from rayalign.types import Column
from tests.contract.deepspeed_rank import OFFLOAD, TRAINING, launch
from tests.contract.learner_cases import DPO, PROBES, pairs, smooth, specs, train, weights
from tests.tiny_models import build_tiny_llama

STAGES = (0, 1, 2, 3)
BY_RANKS = {2: STAGES, 1: (2,)}  # one rank is the easy case: one stage of it
CASES = [(stage, ranks) for ranks, stages in BY_RANKS.items() for stage in stages]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_llama(tmp_path_factory.mktemp("model"), tied=True)


@pytest.fixture(scope="module", params=CASES, ids=[f"zero{stage}-{ranks}ranks" for stage, ranks in CASES])
def out(request, model, tmp_path_factory):
    """The folder with what the ranks of one stage found. The ranks run once for each number of ranks."""
    stage, ranks = request.param
    done = FOLDERS.get(ranks)
    if done is None:
        done = FOLDERS[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        launch(ranks, list(BY_RANKS[ranks]), model, done, timedelta(seconds=420))
    return done / f"stage{stage}"


FOLDERS: dict[int, object] = {}


@pytest.fixture(scope="module")
def wanted(model):
    """Metrics and weights of TorchLearner with one big batch, by number of examples and plan."""
    found = {}
    for name, (settings, count, plan) in (TRAINING | OFFLOAD).items():
        config = TorchLearnerConfig()
        network = settings.get("network", "causal")
        roles = config.build(specs(model, config, network), rank=0, world_size=1, address=("", 0))
        metrics = train(
            roles,
            pairs(count),
            annotate=lambda role, *rest: role.annotate(*rest),
            update=lambda role, *rest: role.update(*rest),
            **plan,
        )
        annotated = roles["reference"].annotate(pairs(count), [Column.LOGPS])
        metrics.append(roles["policy"].measure(annotated, plan.get("algorithm", DPO)))
        found[name] = metrics, weights(roles["policy"])
    return found


def assert_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=tolerance), name


def test_loss_norm_and_parameters_are_those_of_one_big_batch(out, wanted):
    names = [name for name in wanted if (out / f"{name}.pt").exists()]
    assert set(TRAINING) <= set(names) and ("offloaded" in names) == (out.name != "stage0")
    for name in names:
        found = torch.load(out / f"{name}.pt", weights_only=False)
        metrics, parameters = wanted[name]
        assert [smooth(step) for step in found["metrics"]] == [
            pytest.approx(smooth(step), abs=1e-5, rel=1e-5) for step in metrics
        ], name
        assert_close(found["weights"], parameters, 1e-5)


def test_refresh_push_and_export_carry_the_weights(out):
    found = torch.load(out / "travel.pt", weights_only=False)
    policy, first = found["policy"], found["first"]
    assert max((policy[name] - first[name]).abs().max() for name in first) > 1e-4
    assert_close(found["averaged"], {name: 0.75 * first[name] + 0.25 * policy[name] for name in first}, 1e-6)
    assert_close(found["replaced"], policy, 0.0)
    for ours, theirs in zip(found["policy_logps"], found["reference_logps"], strict=True):
        assert np.allclose(ours, theirs, atol=1e-6)
    assert found["version"] == 4
    assert_close(found["pushed"], found["last"], 0.0)
    loaded = AutoModelForCausalLM.from_pretrained(out / "export").eval()
    assert_close(dict(loaded.named_parameters()), found["last"], 0.0)
    for ids, logps in zip(PROBES, found["last_logps"], strict=True):
        with torch.no_grad():
            plain = loaded(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        assert np.allclose(logps, plain.gather(1, torch.tensor(ids[1:])[:, None].long())[:, 0], atol=1e-5)


def test_scores_survive_checkpoint_and_export(out):
    found = torch.load(out / "scores.pt", weights_only=False)
    loaded = AutoModelForSequenceClassification.from_pretrained(out / "reward").eval()
    for example, other in zip(found["values"], found["again"], strict=True):
        for row, same in zip(example.sequences, other.sequences, strict=True):
            values = row.columns["policy/values"]
            assert np.allclose(values, same.columns["policy/values"], atol=1e-6) and np.ptp(values) > 0
            with torch.no_grad():
                score = loaded(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0, 0]
            assert float(score) == pytest.approx(values[-1], abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restored_run_goes_on_as_if_never_stopped(out, dtype):
    found = torch.load(out / f"resumed-{dtype}.pt", weights_only=False)
    assert found["got"] == [pytest.approx(step, abs=1e-6) for step in found["want"]]
    for role, tensors in found["straight"].items():
        assert_close(found["again"][role], tensors, 1e-6)


def test_a_slow_moving_average_moves_in_bfloat16(out):
    found = torch.load(out / "average.pt", weights_only=False)
    share = 0.98**30
    moved = 0.0
    for name, first in found["first"].items():
        want = share * first + (1 - share) * found["policy"][name]
        assert torch.allclose(found["averaged"][name], want, rtol=2**-8, atol=1e-6), name  # to bfloat16's rounding
        moved += float((want - first).abs().sum())
    assert moved > 1.0


def test_keys_that_follow_from_others_are_refused():
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        DeepSpeedLearnerConfig(config={"gradient_accumulation_steps": 2})
    assert DeepSpeedLearnerConfig(config={"zero_optimization": {"overlap_comm": False}}).zero_stage == 2

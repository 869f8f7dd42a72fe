"""Every algorithm on two ranks of DeepSpeed, in small micro-batches, is what it is in one process and one batch."""

from __future__ import annotations

import pytest
import torch

from rayalign.learners.torch import TorchLearnerConfig
from tests.contract.algorithms_rank import CASES, main, specs, trained_weights, two_steps
from tests.contract.learner_cases import smooth
from tests.ranks import free_port, spawn
from tests.tiny_models import build_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a policy and another model as its reference."""
    folder = tmp_path_factory.mktemp("models")
    build_tiny_llama(folder / "policy")
    build_tiny_llama(folder / "reference", seed=3)
    return folder


@pytest.fixture(scope="module")
def two_ranks(model, tmp_path_factory):
    """The folder with what two ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    port = free_port()
    spawn(main, (2, port, str(model), str(out)), 2)
    return out


def in_one_process(model, name: str, **settings):
    algorithm, groups = CASES[name]
    config = TorchLearnerConfig(dtype="float32", threads=1, **settings)
    roles = config.build(specs(str(model), algorithm, config), rank=0, world_size=1, address=("", 0))
    return two_steps(roles, algorithm, groups, everywhere=lambda value: [value]), trained_weights(roles)


@pytest.fixture(scope="module", params=CASES)
def case(request, model):
    return request.param, *in_one_process(model, request.param)


def assert_same(metrics, tensors, wanted_metrics, wanted_tensors):
    assert [smooth(step) for step in metrics] == [
        pytest.approx(smooth(step), rel=1e-4, abs=1e-5) for step in wanted_metrics
    ]
    for name, tensor in wanted_tensors.items():
        assert torch.allclose(tensors[name], tensor, rtol=0, atol=2e-5), name


def test_two_ranks_are_one(case, two_ranks):
    name, metrics, tensors = case
    found = torch.load(two_ranks / f"{name}.pt", weights_only=False)
    assert_same(found["metrics"], found["weights"], metrics, tensors)


def test_an_example_at_a_time_is_all_at_once(case, model):
    name, metrics, tensors = case
    assert_same(*in_one_process(model, name, micro_batch_tokens=1), metrics, tensors)


def test_it_learns_what_it_is_trained_on(case):
    """Two steps on the same examples lower their loss, and `measure` changes nothing that `update` would see."""
    _, (first, second, measured), _ = case
    assert first["loss"] > second["loss"] > measured["loss"]
    assert set(measured) <= set(first) and "lr" not in measured


@pytest.mark.parametrize(
    ("name", "point"), [("kto", "kto/reference_point"), ("kto paired", "kto/reference_point_rejected")]
)
def test_ktos_reference_points_are_above_zero_here(name, point, model):
    """Else the tests above would not see how they are added up over ranks."""
    metrics, _ = in_one_process(model, name)
    assert all(step[point] > 0.1 for step in metrics)

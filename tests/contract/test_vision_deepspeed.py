"""Rows with images on two ranks of DeepSpeed are what they are in one process, under each way of sharing parameters."""

from __future__ import annotations

import pytest
import torch

from rayalign.learners.torch import TorchLearnerConfig
from tests.contract.algorithms_rank import specs, two_steps
from tests.contract.learner_cases import smooth, weights
from tests.contract.vision_rank import CASES, STAGES, main
from tests.ranks import free_port, spawn
from tests.tiny_vision import build_tiny_llava


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a policy and another model as its reference."""
    folder = tmp_path_factory.mktemp("models")
    build_tiny_llava(folder / "policy")
    build_tiny_llava(folder / "reference", seed=3)
    return folder


@pytest.fixture(scope="module")
def two_ranks(model, tmp_path_factory):
    """The folder with what two ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    port = free_port()
    spawn(main, (2, port, str(model), str(out)), 2)
    return out


@pytest.fixture(scope="module", params=CASES)
def case(request, model):
    algorithm, groups, settings = CASES[request.param]
    config = TorchLearnerConfig(dtype="float32", threads=1, **settings)
    roles = config.build(specs(str(model), algorithm, config), rank=0, world_size=1, address=("", 0))
    first = weights(roles["policy"])
    metrics = two_steps(roles, algorithm, groups, everywhere=lambda value: [value])
    return request.param, metrics, first, weights(roles["policy"])


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_one_process(case, two_ranks, stage):
    name, metrics, first, tensors = case
    found = torch.load(two_ranks / f"{name}-{stage}.pt", weights_only=False)
    assert [smooth(step) for step in found["metrics"]] == [
        pytest.approx(smooth(step), rel=2e-4, abs=2e-5) for step in metrics
    ]
    for weight, tensor in tensors.items():
        assert torch.allclose(found["weights"][weight], tensor, rtol=0, atol=3e-5), weight
        assert torch.equal(found["restored"][weight], found["weights"][weight]), weight
    moved = {weight for weight, tensor in tensors.items() if not torch.equal(tensor, first[weight])}
    assert any("multi_modal_projector" in weight for weight in moved)
    assert any("vision_tower" in weight for weight in moved) == ("what sees learns" in name)

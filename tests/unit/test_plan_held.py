"""What real learners hold, tensor by tensor, and what their checkpoints weigh, is what a plan says."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayalign.algorithms.online_preference import OnlinePreference
from rayalign.learners.deepspeed import DeepSpeedLearnerConfig
from rayalign.learners.deepspeed_config import engine_config
from rayalign.learners.settings import LearnerSpec, OptimizerConfig
from rayalign.learners.torch import TorchLearnerConfig
from rayalign.plan.learners import checkpoint_bytes
from rayalign.plan.shapes import read_shape
from rayalign.plan.zero import Zero, torch_state, trained_state
from rayalign.protocols import UpdatePlan
from rayalign.types import Example
from rayalign.types import Sequence as Row
from tests.ranks import free_port, spawn

CASES = [(stage, dtype, "none") for stage in (0, 1, 2, 3) for dtype in ("float32", "bfloat16")]
CASES += [(stage, dtype, "cpu") for stage in (2, 3) for dtype in ("float32", "bfloat16")]
ROW = Row((1, 2, 3), (4, 5), columns={"reference/logps": np.zeros(2, np.float32)})
EXAMPLES = [Example((ROW, replace(ROW, completion_ids=(6, 7)))) for _ in range(2)]


def storages() -> Iterator[tuple[int, int, torch.Tensor]]:
    """(address, bytes, tensor) of all that Python can see, gradients included."""
    gc.collect()
    for found in [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]:
        for tensor in (found, found.grad if found.is_leaf else None):
            if tensor is not None and tensor.untyped_storage().nbytes():
                yield tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes(), tensor


def held(learner, before: set[int]) -> int:
    """Bytes of tensors that were not there before, when the second optimiser step begins."""
    found = {}
    step = learner.step

    def noted(lr: float) -> float:
        found.update({address: size for address, size, _ in storages() if address not in before})
        return step(lr)

    learner.update_shard(EXAMPLES, OnlinePreference(), UpdatePlan(0))
    learner.step = noted
    learner.update_shard(EXAMPLES, OnlinePreference(), UpdatePlan(1))
    del learner.step
    return sum(found.values())


def of_one_rank(rank: int, ranks: int, port: int, model: str, cases: list, out: str) -> None:
    torch.set_num_threads(1)
    found = []
    for index, (stage, dtype, offload) in enumerate(cases):
        alive = list(storages())  # kept, so that no address is used again
        settings = DeepSpeedLearnerConfig(
            zero_stage=stage, dtype=dtype, offload=offload, micro_batch_tokens=1, deadline_s=120
        )
        spec = LearnerSpec("policy", model, dtype=dtype, optimizer=OptimizerConfig(lr=1e-4), settings=settings)
        learner = settings.build([spec], rank=rank, world_size=ranks, address=("127.0.0.1", port))["policy"]
        measured = held(learner, {address for address, _, _ in alive})
        folder = Path(out) / f"checkpoint-{index}"
        folder.mkdir(exist_ok=True)
        learner.save(folder)
        saved = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        found.append((measured, saved))
        learner.close()
        del learner, alive
    if rank == 0:
        (Path(out) / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama whose weights outweigh everything else: 3 million parameters."""
    path = tmp_path_factory.mktemp("held") / "model"
    config = LlamaConfig(
        vocab_size=160, hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def run(ranks: int, model: Path, cases: list, out: Path) -> list[list[int]]:
    port = free_port()
    spawn(of_one_rank, (ranks, port, str(model), cases, str(out)), ranks)
    return json.loads((out / "found.json").read_text())


def zero(shape, stage: int, dtype: str, offload: str, ranks: int) -> Zero:
    settings = DeepSpeedLearnerConfig(zero_stage=stage, dtype=dtype, offload=offload)
    spec = LearnerSpec("policy", shape.path, dtype=dtype, optimizer=OptimizerConfig(), settings=settings)
    told = engine_config(spec, getattr(torch, dtype), ranks, shape.parameters)["zero_optimization"]
    width = 2 if dtype == "bfloat16" else 4
    return Zero(told["stage"], ranks, width, "offload_optimizer" in told, told.get("reduce_bucket_size", 0))


def test_one_rank_of_deepspeed_holds_what_is_estimated(folder, tmp_path, make):
    shape = read_shape(str(folder))
    for case, (measured, saved) in zip(CASES, run(1, folder, CASES, tmp_path), strict=True):
        stage, dtype, offload = case
        state = trained_state(shape, zero(shape, *case, 1))
        estimated = state.device.total + state.host.total
        assert measured == pytest.approx(estimated, rel=0.01), (case, measured / shape.parameters)
        learner = {"name": "deepspeed", "zero_stage": stage, "dtype": dtype, "offload": offload}
        whole = checkpoint_bytes(make(learner=learner), shape)
        exported = (2 if dtype == "bfloat16" else 4) * shape.parameters
        assert saved == pytest.approx(whole - exported, rel=0.02), case


def test_two_ranks_share_as_is_estimated(folder, tmp_path):
    shape = read_shape(str(folder))
    cases = [(1, "bfloat16", "none"), (2, "bfloat16", "none"), (2, "float32", "none"), (2, "bfloat16", "cpu")]
    for case, (measured, _) in zip(cases, run(2, folder, cases, tmp_path), strict=True):
        state = trained_state(shape, zero(shape, *case, 2))
        estimated = state.device.total + state.host.total
        # A tensor on the border of two shares is held on both sides of it.
        assert measured == pytest.approx(estimated, abs=4.2 * shape.largest), (case, measured / shape.parameters)


def test_the_torch_learner_holds_what_is_estimated(folder, tmp_path, make):
    shape = read_shape(str(folder))
    alive = list(storages())
    settings = TorchLearnerConfig(dtype="float32")
    spec = LearnerSpec("policy", str(folder), dtype="float32", optimizer=OptimizerConfig(lr=1e-4), settings=settings)
    learner = settings.build([spec], rank=0, world_size=1, address=("", 0))["policy"]
    measured = held(learner, {address for address, _, _ in alive})
    parameters = list(learner.policy.parameters())
    state = torch_state(shape, trained=True, autocast=False).device
    assert sum(4 * math.prod(parameter.shape) for parameter in parameters) == state.weights == state.gradients
    moments = [v for s in learner._optimizer.state.values() for v in s.values() if v.numel() > 1]
    assert sum(4 * moment.numel() for moment in moments) == state.optimizer
    assert measured == pytest.approx(state.total, rel=0.01)
    learner.save(tmp_path)
    saved = sum(path.stat().st_size for path in tmp_path.iterdir())
    config = make(learner={"name": "torch", "dtype": "float32"})
    assert saved == pytest.approx(checkpoint_bytes(config, shape) - 4 * shape.parameters, rel=0.02)

"""Formulas of memory, with numbers worked by hand, and against tensors that torch really saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayalign.learners.models import CausalPolicy
from rayalign.plan.activations import layer_bytes, logit_bytes, saved_bytes
from rayalign.plan.engines import engine_memory, split_choices, token_bytes
from rayalign.plan.records import GIB, Bytes
from rayalign.plan.shapes import read_shape
from rayalign.plan.zero import Zero, frozen_state, gathered_bytes, torch_state, trained_state
from rayalign.types import Column

SHAPES = Path(__file__).parent / "shapes"
SIZE = 8_030_261_248
B200M = 200_000_000


@pytest.fixture(scope="module")
def big():
    return read_shape(str(SHAPES / "Llama-3.1-8B"))


def test_8b_under_zero3_on_8_gpus(big):
    state = trained_state(big, Zero(3, 8, 2, False, B200M))
    share = SIZE / 8  # 1,003,782,656 parameters a rank
    assert state.device.weights == 2 * share == 2_007_565_312
    assert state.device.gradients == 4 * share == 4_015_130_624
    assert state.device.optimizer == 12 * share == 12_045_391_872
    assert state.device.other == 4 * B200M + 1.5 * 2 * 1_000_000_000  # a bucket, and gathered parameters
    assert state.host == Bytes() and state.work == 4 * 1_000_000_000  # one group of the step at a time


def test_8b_with_the_optimizer_in_host_memory(big):
    state = trained_state(big, Zero(3, 8, 2, True, B200M))
    assert (state.device.optimizer, state.device.gradients) == (0, 0)
    assert (state.host.optimizer, state.host.gradients) == (12 * SIZE / 8, 8 * SIZE / 8)
    second = trained_state(big, Zero(2, 8, 2, True, B200M))
    assert (second.device.weights, second.device.gradients, second.device.optimizer) == (2 * SIZE, SIZE / 2, 0)
    assert (second.host.optimizer, second.host.gradients) == (12 * SIZE / 8, 6 * SIZE / 8)


@pytest.mark.parametrize(
    ("stage", "width", "ranks", "weights", "gradients", "optimizer"),
    [  # bytes a parameter
        (0, 4, 8, 4, 4, 8),
        (1, 2, 8, 2, 6, 1.5),
        (1, 4, 8, 4, 4, 1.5),
        (2, 2, 8, 2, 0.5, 1.5),
        (2, 4, 8, 4, 0.5, 1.5),
        (3, 4, 8, 0.5, 0.5, 1.5),
        (2, 2, 1, 2, 4, 12),
    ],
)
def test_what_each_stage_shares_out(big, stage, width, ranks, weights, gradients, optimizer):
    device = trained_state(big, Zero(stage, ranks, width, False, B200M)).device
    assert (device.weights / SIZE, device.gradients / SIZE, device.optimizer / SIZE) == (weights, gradients, optimizer)


def test_a_frozen_role_is_shared_out_by_stage_3_only(big):
    assert frozen_state(big, Zero(2, 8, 2, True, B200M), averaged=False).device == Bytes(weights=2 * SIZE)
    third = Zero(3, 8, 2, False, B200M)
    moving = frozen_state(big, third, averaged=True).device
    assert (moving.weights, moving.optimizer) == (2 * SIZE / 8, 4 * SIZE / 8)
    assert gathered_bytes(big, third) == 3e9 and gathered_bytes(big, replace(third, ranks=1)) == 0


def test_the_torch_learner_holds_float32(big):
    device = torch_state(big, trained=True, autocast=True).device
    assert (device.weights, device.gradients, device.optimizer, device.other) == (
        4 * SIZE,
        4 * SIZE,
        8 * SIZE,
        2 * SIZE,
    )
    assert torch_state(big, trained=False, autocast=True).device.total == 4 * SIZE


def test_activations_of_8b_by_hand(big):
    # 16h + 4·2·h + 4·2·f + 2·longest + 8 + 4·heads, with h = 4096, f = 14336, 32 heads of 128
    assert layer_bytes(big, width=2, autocast=False, longest=1000) == 65536 + 32768 + 114688 + 2000 + 136
    whole = saved_bytes(big, 1000, width=2, autocast=False, longest=1000, checkpointing=False)
    assert whole == 1000 * (32 * 215_128 + 6 * 4096)
    recomputed = saved_bytes(big, 1000, width=2, autocast=False, longest=1000, checkpointing=True)
    assert recomputed == 1000 * (32 * 2 * 4096 + 215_128 + 6 * 4096)


def test_logits_of_a_chunk(big):
    assert logit_bytes(big, 2048, width=2, temperature=1.0) == 2048 * 128_256 * 12
    assert logit_bytes(big, 2048, width=4, temperature=1.0) == 2048 * 128_256 * 12
    assert logit_bytes(big, 2048, width=4, temperature=0.7) == 2048 * 128_256 * 16


def saved_by_torch(layers: int, dtype: torch.dtype, *, autocast: bool, checkpointing: bool, rows: int) -> float:
    """Bytes that autograd keeps after a forward pass over padded rows of 32 tokens, parameters not counted."""
    config = LlamaConfig(
        vocab_size=160, hidden_size=64, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    policy = CausalPolicy(LlamaForCausalLM(config).to(dtype), gradient_checkpointing=checkpointing).train()
    ids = torch.randint(1, 160, (rows, 32))
    attention = torch.ones_like(ids)
    attention[0, -3:] = 0
    positions = torch.arange(15, 31).expand(rows, 16)
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    seen, kept = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # alive, so that no address comes twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        policy(ids, attention, ids[:, 16:], positions, torch.ones(rows, 16), (Column.LOGPS,))
    return float(sum(seen.values()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_a_real_layer_saves_what_is_estimated(dtype, autocast, checkpointing, model):
    def layer(rows: int) -> float:
        more, fewer = (
            saved_by_torch(n, dtype, autocast=autocast, checkpointing=checkpointing, rows=rows) for n in (4, 2)
        )
        return (more - fewer) / 2

    measured = (layer(8) - layer(4)) / (4 * 32)  # a token: what does not grow with tokens is gone
    shape = replace(read_shape(str(model)), hidden=64, intermediate=256, heads=4, kv_heads=2, head_dim=16, layers=1)
    width = 2 if autocast or dtype is torch.bfloat16 else 4
    if checkpointing:
        assert measured == (4 if autocast else width) * 64
    else:
        assert measured == layer_bytes(shape, width=width, autocast=autocast, longest=32)


def test_keys_and_values_of_8b(big):
    assert token_bytes(big, width=2) == 2 * 32 * 8 * 128 * 2 == 131_072


def test_tensor_parallel_goes_by_heads(big):
    assert split_choices(big, 8) == [1, 2, 4, 8]
    assert split_choices(read_shape(str(SHAPES / "SmolLM2-135M-Instruct")), 8) == [1, 3]


def test_an_engine_on_a_gpu_takes_its_share(big, make):
    config = make(engine={"name": "vllm", "max_context": 400, "max_running": 64, "tensor_parallel": 2})
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    engine, cache, problems = engine_memory(config, big, gpu_gib=40.0, on_gpu=True)
    assert engine.device.total == pytest.approx(0.85 * 40 * GIB) and engine.device.weights == SIZE
    assert cache.gib == pytest.approx(2 * engine.device.cache / GIB) and not problems
    assert cache.wanted_gib == pytest.approx(131_072 * 64 * 401 / GIB)
    assert cache.requests == int(cache.gib * GIB // (131_072 * 401))
    assert engine_memory(config, big, gpu_gib=8.0, on_gpu=True)[2][0].where == "key engine.gpu_memory"

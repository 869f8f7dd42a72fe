"""Packed rows give what padded rows give, and sequences stay apart."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Lfm2Config

from rayalign.collate import collate
from rayalign.errors import ConfigError
from rayalign.learners.score import load_network
from rayalign.learners.settings import LearnerSettings, LearnerSpec, OptimizerConfig
from rayalign.types import Column, TopLogits
from tests.contract.learner_cases import pairs
from tests.tiny_models import build_tiny_llama
from tests.unit.test_causal_policy import OTHERS

CAUSAL = (Column.LOGPS, Column.ENTROPY, TopLogits(2))
LONG = GPT2Config(vocab_size=160, n_embd=32, n_layer=2, n_head=2, n_positions=128)
# gemma2 has a window of 8 tokens, opt counts positions in its own way
ARCHITECTURES = {"llama": None, "gpt2": LONG, "gemma2": OTHERS["gemma2"], "opt": OTHERS["opt"]}


@pytest.fixture(params=ARCHITECTURES)
def folder(request, tmp_path):
    config = copy.deepcopy(ARCHITECTURES[request.param])
    if config is None:
        return build_tiny_llama(tmp_path)
    torch.manual_seed(1)
    config.vocab_size = 160
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)
    return tmp_path


def load(folder, network="causal", **settings):
    settings = LearnerSettings(**settings)
    return load_network(
        LearnerSpec("policy", str(folder), optimizer=OptimizerConfig(), settings=settings, network=network),
        torch.float32,
    )


@pytest.mark.parametrize("network", ["causal", "score"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_have_the_columns_and_gradients_of_padded_ones(folder, network, checkpointing):
    batch = collate(pairs(4), pad_id=0)
    columns = CAUSAL if network == "causal" else (Column.VALUES,)
    found = []
    for packing in (False, True):
        policy = load(folder, network, packing=packing, gradient_checkpointing=packing and checkpointing).train()
        got = policy(batch.input_ids, batch.attention_mask, batch.labels, batch.positions, batch.mask, columns, 0.7, 16)
        sum(values.sin().sum() for values in got.values()).backward()
        found.append((got, {name: parameter.grad for name, parameter in policy.named_weights()}))
    (padded, gradients), (packed, others) = found
    for name, values in padded.items():
        assert values.abs().max() > 1e-3 and torch.allclose(values, packed[name], atol=1e-5, rtol=1e-5), name
    for name, gradient in gradients.items():
        if gradient is not None:  # a pooling or a bias that takes no part
            assert torch.allclose(gradient, others[name], atol=1e-4, rtol=1e-4), name


def test_an_architecture_whose_state_runs_along_the_row_is_refused(tmp_path):
    config = Lfm2Config(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be packed"):
        load(tmp_path, packing=True)


def test_packing_has_its_own_attention():
    with pytest.raises(ValueError, match="packed rows have their own attention"):
        LearnerSettings(packing=True, attention="eager")

"""The columns of CausalPolicy against plain log-softmax over the full logits of the same model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    OPTConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from rayalign.collate import collate
from rayalign.errors import ConfigError
from rayalign.learners.models import CausalPolicy
from rayalign.learners.settings import LearnerSettings, LearnerSpec, OptimizerConfig
from rayalign.types import Column, Example, Sequence, TopLogits
from tests.tiny_models import build_tiny_llama

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
OTHERS = {
    "gemma2": Gemma2Config(**SMALL, final_logit_softcapping=2.0, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "cohere": CohereConfig(**SMALL, logit_scale=3.0),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0),
    "opt": OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
    ),
}
EXAMPLES = [
    Example((Sequence((5, 6, 7), (8, 9)), Sequence((5, 6, 7), (10, 11, 12, 0)))),
    Example((Sequence((3,), (9, 9, 9, 9, 9)), Sequence((3, 4, 5, 6, 7, 8), (1,)))),
]


@pytest.fixture(params=["llama", "llama-tied", *OTHERS])
def folder(request, tmp_path):
    if request.param.startswith("llama"):
        return build_tiny_llama(tmp_path, tied=request.param.endswith("tied"))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(OTHERS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)
    return tmp_path


def load(folder, trainable=True, **settings):
    spec = LearnerSpec(
        "policy", str(folder), trainable=trainable, optimizer=OptimizerConfig(), settings=LearnerSettings(**settings)
    )
    return CausalPolicy.load(spec, torch.float32)


def run(policy, columns=(Column.LOGPS, Column.ENTROPY), temperature=0.7, chunk=2048):
    batch = collate(EXAMPLES, pad_id=0)
    return policy(
        batch.input_ids, batch.attention_mask, batch.labels, batch.positions, batch.mask, columns, temperature, chunk
    )


def test_columns_are_those_of_the_full_logits_row_by_row(folder):
    policy, plain = load(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    columns = run(policy)
    rows = [row for example in EXAMPLES for row in example.sequences]
    for index, row in enumerate(rows):
        ids = torch.tensor([row.prompt_ids + row.completion_ids])  # alone, without padding
        with torch.no_grad():
            logps = (plain(ids).logits[0].float() / 0.7).log_softmax(-1)
        start, count = len(row.prompt_ids) - 1, len(row.completion_ids)
        want = logps[start : start + count]
        got = columns["logps"][index, :count]
        assert torch.allclose(got, want.gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0], atol=1e-5)
        assert torch.allclose(columns["entropy"][index, :count], -(want.exp() * want).sum(-1), atol=1e-5)
        assert (columns["logps"][index, count:] == 0).all()


def test_top_logits_are_the_labels_own_and_the_largest_others(folder):
    policy, plain = load(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    found = run(policy, (TopLogits(3),), temperature=0.5)["top_logits"]
    assert found.shape == (4, 5, 4)
    for index, row in enumerate(row for example in EXAMPLES for row in example.sequences):
        start = len(row.prompt_ids) - 1
        with torch.no_grad():
            logits = plain(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0, start:-1].float() / 0.5
        for step, label in enumerate(row.completion_ids):
            others = torch.cat([logits[step, :label], logits[step, label + 1 :]]).topk(3).values
            assert torch.allclose(found[index, step], torch.cat([logits[step, label : label + 1], others]), atol=1e-4)
        assert (found[index, len(row.completion_ids) :] == 0).all()
    for k in (0, policy.vocabulary):
        with pytest.raises(ConfigError, match="top logits"):
            run(policy, (TopLogits(k),))
    with pytest.raises(ConfigError, match="no such column"):
        run(policy, (Column.VALUES,))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_and_recomputed_layers_change_nothing(tmp_path, checkpointing):
    folder = build_tiny_llama(tmp_path, tied=True)
    grads = []
    for policy, chunk in ((load(folder), 2048), (load(folder, gradient_checkpointing=checkpointing), 3)):
        found = run(policy, (Column.LOGPS, TopLogits(2)), chunk=chunk)
        (found["logps"].sum() + 0.01 * found["top_logits"].pow(2).sum()).backward()
        grads.append({name: parameter.grad for name, parameter in policy.named_weights()})
    assert grads[0].keys() == grads[1].keys() and "lm_head.weight" not in grads[0]
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-5, rtol=1e-4), name


def test_layers_are_really_recomputed_and_dropout_stays_off(tmp_path):
    configs = {
        "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.5),
        "opt": copy.deepcopy(OTHERS["opt"]),  # applies dropout in the layer itself
    }
    configs["opt"].dropout = 0.5
    for name, config in configs.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        policy = load(tmp_path / name, gradient_checkpointing=True).train()
        layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
        calls = []
        next(layers[0].children()).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        first = run(policy, (Column.LOGPS,))["logps"]
        first.sum().backward()
        assert len(calls) == 2, name
        plain = load(tmp_path / name)
        assert torch.equal(first, run(policy, (Column.LOGPS,))["logps"]), name
        assert torch.allclose(first, run(plain, (Column.LOGPS,))["logps"], atol=1e-5), name


def test_an_architecture_that_scales_its_logits_otherwise_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(build_tiny_llama(tmp_path))
    CausalPolicy(model)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output)  # harmless
    CausalPolicy(model)
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits * 2))
    with pytest.raises(ConfigError, match="logits"):
        CausalPolicy(model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_models_checkpoint_is_no_policy(tmp_path, tied):
    plain = AutoModelForCausalLM.from_pretrained(build_tiny_llama(tmp_path / "causal", tied=tied))
    AutoModelForSequenceClassification.from_config(plain.config).save_pretrained(tmp_path / "reward")
    with pytest.raises(ConfigError, match="not a whole language model") as caught:
        load(tmp_path / "reward")
    assert "LlamaForSequenceClassification" in caught.value.value
    assert ("lm_head.weight" in caught.value.value) != tied


def test_a_language_model_without_its_head_is_no_policy(tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(build_tiny_llama(tmp_path / "causal"))
    plain.base_model.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ConfigError, match="lm_head.weight"):
        load(tmp_path / "backbone")


def test_a_folder_without_a_model_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path)

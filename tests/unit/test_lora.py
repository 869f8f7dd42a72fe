"""LoRA: what the config may say, which layers get an adapter, and what a role computes with it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from rayalign.build import learner_specs
from rayalign.config import parse_config
from rayalign.errors import ConfigError
from rayalign.learners.settings import LearnerSpec, LoraConfig, OptimizerConfig
from rayalign.learners.torch import TorchLearnerConfig
from rayalign.protocols import UpdatePlan
from rayalign.types import Column
from tests.contract.learner_cases import DPO, OPTIMIZER, Compared, Distilled, pairs, weights
from tests.parts import tiny_config
from tests.tiny_models import PAD_ID, build_tokenizer

LORA = LoraConfig(rank=2, alpha=4)


def policy(model, lora=LORA, **changes):
    settings = TorchLearnerConfig(dtype=changes.pop("dtype", "float32"))
    return LearnerSpec("policy", str(model), optimizer=OPTIMIZER, settings=settings, lora=lora, **changes)


def reference(model, dtype="float32", **changes):
    settings = TorchLearnerConfig(dtype=dtype)
    return LearnerSpec("reference", str(model), trainable=False, settings=settings, **changes)


def build(*specs):
    return specs[0].settings.build(specs, rank=0, world_size=1, address=("", 0))


def train(roles, steps=2, algorithm=DPO, examples=None):
    examples = examples or pairs(3)
    for step in range(steps):
        if "reference" in roles:
            examples = roles["reference"].annotate(examples, [Column.LOGPS])
        metrics = roles["policy"].update(examples, algorithm, UpdatePlan(step=step))
    return metrics


def trained(learner):
    return {name for name, parameter in learner.policy.named_weights() if parameter.requires_grad}


def test_the_reference_without_adapter_is_a_frozen_model_of_its_own(model):
    """Bit for bit: log-probs, and the loss and the policy that come of them, with the exact KL as well."""
    shared = build(policy(model), reference(model, shares="policy"))
    apart = build(policy(model), reference(model))
    assert shared["reference"].policy is shared["policy"].policy
    for algorithm in (DPO, Distilled()):
        for roles in (shared, apart):
            roles["metrics"] = train({name: roles[name] for name in ("policy", "reference")}, algorithm=algorithm)
        assert shared.pop("metrics") == apart.pop("metrics")
    one, other = (roles["reference"].annotate(pairs(4), [Column.LOGPS]) for roles in (shared, apart))
    for a, b in zip(one, other, strict=True):
        for row, same in zip(a.sequences, b.sequences, strict=True):
            assert (row.columns["reference/logps"] == same.columns["reference/logps"]).all()
    mine, theirs = weights(shared["policy"]), weights(apart["policy"])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert all(torch.equal(t, weights(apart["reference"])[name]) for name, t in weights(shared["reference"]).items())


def test_only_adapters_are_trained_and_the_model_stays_as_it_is(model):
    roles = build(policy(model, adapters=("reference",)), reference(model, shares="policy"))
    learner = roles["policy"]
    base = {n: p.detach().clone() for n, p in learner.policy.named_weights() if ".lora_" not in n}
    assert trained(learner) and all(name.endswith(".policy.weight") for name in trained(learner))
    held = [id(p) for group in learner._optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in learner.policy.parameters() if p.requires_grad)
    train(roles)
    for name, parameter in learner.policy.named_weights():
        assert ".lora_" in name or torch.equal(parameter, base[name]), name
    kinds = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained(learner)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_named_targets_and_the_seed(model):
    one = build(policy(model, LORA.model_copy(update={"targets": ("q_proj", "layers.1.mlp.up_proj")}), seed=1))[
        "policy"
    ]
    found = {name.partition(".lora_")[0] for name, _ in one.own_tensors()}
    layers = [f"model.layers.{index}.self_attn.q_proj" for index in (0, 1)]
    assert found == {*layers, "model.layers.1.mlp.up_proj"}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    same, other = (dict(build(policy(model, seed=seed))["policy"].own_tensors()) for seed in (1, 2))
    first = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(dict(one.own_tensors())[first], dict(one.own_tensors())[first])
    assert not torch.equal(same[first], other[first])
    assert torch.equal(same[first], dict(build(policy(model, seed=1))["policy"].own_tensors())[first])
    assert before.shape == torch.get_rng_state().shape


@pytest.mark.parametrize("target", ["q_porj", "lm_head", "embed_tokens", "proj"])
def test_a_target_that_matches_nothing_lists_what_there_is(model, target):
    with pytest.raises(ConfigError, match="no linear layer of the model has this name") as caught:
        build(policy(model, LORA.model_copy(update={"targets": ("q_proj", target)})))
    assert caught.value.value == target and caught.value.where == "key model.lora.targets"
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in caught.value.rule


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"dropout": 0.1}, ["key model.lora.dropout", "adapters have no dropout here", "one function of the weights"]),
        ({"targets": []}, ["key model.lora.targets", "there is nothing to train"]),
        ({"rank": 0}, ["key model.lora.rank", "at least 1"]),
        ({"rnk": 8}, ["key model.lora.rnk", "did you mean rank?"]),
        ({"targets": "q_proj"}, ["key model.lora.targets", "all-linear"]),
    ],
)
def test_a_config_that_cannot_be_is_explained(tmp_path, model, lora, expected):
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny_config(tmp_path, model, model__lora=lora))
    for part in expected:
        assert part in str(caught.value), str(caught.value)


def test_dropout_of_0_is_no_mistake(make):
    assert make(model__lora={"dropout": 0}).model.lora == LoraConfig()
    assert make().model.lora is None and make(model__lora={}).model.lora == LoraConfig(rank=16, alpha=32, merge=True)


@pytest.mark.parametrize(
    ("reference", "adapters"),
    [
        ({}, ()),
        ({"update": "replace", "every": 2}, ("reference",)),
        ({"update": "average", "decay": 0.9}, ("reference",)),
    ],
)
def test_the_reference_is_built_in_the_policys_model(make, reference, adapters):
    config = make(model__lora={"rank": 4}, algorithm__reference=reference)
    first, second = learner_specs(config, build_tokenizer(), policy=None, train=True)
    assert (first.lora.rank, first.adapters) == (4, adapters)
    assert (second.shares, second.lora) == ("policy", None)


def test_an_evaluated_checkpoint_has_its_adapter_merged(make, model):
    first, second = learner_specs(make(model__lora={}), build_tokenizer(), policy=str(model), train=False)
    assert (first.lora, first.adapters, second.shares) == (None, (), None)


def test_a_reference_without_adapter_cannot_follow(model):
    roles = build(policy(model), reference(model, shares="policy"))
    with pytest.raises(ConfigError, match="no weights of its own"):
        roles["reference"].refresh("policy")


def test_what_makes_no_sense_is_no_spec(model):
    for wrong in ({"trainable": True}, {"lora": LORA}, {"network": "score"}):
        with pytest.raises(ValueError, match="cannot share a model"):
            spec = {"trainable": False, "shares": "policy", "optimizer": OptimizerConfig()} | wrong
            LearnerSpec("reference", str(model), **spec)
    with pytest.raises(ValueError, match="no lora"):
        LearnerSpec("reference", str(model), trainable=False, adapters=("other",))


def test_in_bfloat16_adapters_are_float32_and_the_model_is_not(model):
    roles = build(
        policy(model, adapters=("reference",), dtype="bfloat16"), reference(model, shares="policy", dtype="bfloat16")
    )
    metrics = train(roles)
    assert metrics["loss"] < 0.6931 and metrics["grad_norm"] > 0
    for name, parameter in roles["policy"].policy.named_weights():
        assert parameter.dtype is (torch.float32 if ".lora_" in name else torch.bfloat16), name
    roles["reference"].refresh("policy", decay=0.99)  # less than bfloat16 would resolve
    one, other = (dict(roles[role].own_tensors()) for role in ("policy", "reference"))
    assert any(not torch.equal(tensor, one[name]) and tensor.abs().max() > 0 for name, tensor in other.items())


def test_layers_with_transposed_weights_are_merged_as_peft_does(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=160, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=1, bos_token_id=1)).save_pretrained(tmp_path / "gpt2")
    roles = build(policy(tmp_path / "gpt2"), reference(tmp_path / "gpt2", shares="policy"))
    train(roles)
    out = tmp_path / "out"
    out.mkdir()
    roles["policy"].export(out)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    merged = PeftModel.from_pretrained(plain, out / "adapter").merge_and_unload()
    own = weights(roles["policy"])
    for name, parameter in merged.named_parameters():
        assert torch.allclose(own[name], parameter, atol=1e-6), name
    assert not torch.equal(
        own["transformer.h.0.attn.c_attn.weight"], weights(roles["reference"])["transformer.h.0.attn.c_attn.weight"]
    )


def test_an_encoders_head_and_pooler_are_trained_in_full(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = BertConfig(**sizes, max_position_embeddings=128, pad_token_id=PAD_ID, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    learner = build(policy(tmp_path / "bert", network="score"))["policy"]
    heads = {name for name in trained(learner) if ".lora_" not in name}
    assert heads == {f"{name}.{kind}" for name in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")}
    train({"policy": learner}, algorithm=Compared())
    out = tmp_path / "out"
    out.mkdir()
    learner.export(out)
    values = learner.annotate(pairs(2), [Column.VALUES])
    merged = AutoModelForSequenceClassification.from_pretrained(out).eval()
    adapted = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert"), out / "adapter"
    ).eval()
    for row in (row for example in values for row in example.sequences):
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        with torch.no_grad():
            scores = [float(each(input_ids=ids).logits[0, 0]) for each in (merged, adapted)]
        assert scores == pytest.approx([float(row.columns["policy/values"][-1])] * 2, abs=1e-5)


def test_an_adapter_with_the_path_of_its_model_is_no_model(tmp_path, model):
    learner = build(policy(model, LORA.model_copy(update={"merge": False})))["policy"]
    learner.export(tmp_path)
    with pytest.raises(ConfigError, match="is an adapter"):
        build(policy(tmp_path))

"""Score networks: what their values are, where they start, and that transformers reads what they export."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    RobertaConfig,
)

from rayalign.collate import collate
from rayalign.errors import ConfigError
from rayalign.learners.score import ScoreNetwork
from rayalign.learners.settings import LearnerSettings, LearnerSpec, OptimizerConfig
from rayalign.types import Column
from tests.contract.learner_cases import pairs
from tests.tiny_models import EOS_ID, PAD_ID, build_tiny_llama

ENCODER = dict(
    vocab_size=160,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=128,
    pad_token_id=PAD_ID,
)


def load(folder, pad_id=PAD_ID, seed=0, dtype=torch.float32, trainable=True, **settings):
    spec = LearnerSpec(
        "policy",
        str(folder),
        trainable=trainable,
        optimizer=OptimizerConfig() if trainable else None,
        settings=LearnerSettings(**settings),
        pad_id=pad_id,
        network="score",
        seed=seed,
    )
    return ScoreNetwork.load(spec, dtype)


def run(network, examples, pad_id=PAD_ID):
    batch = collate(examples, pad_id=pad_id)
    found = network(batch.input_ids, batch.attention_mask, batch.labels, batch.positions, batch.mask, (Column.VALUES,))[
        "values"
    ]
    last = batch.mask.sum(1) - 1
    return found, found[torch.arange(len(last)), last], batch


def export(network, path):
    path.mkdir()
    state = {name: parameter.detach() for name, parameter in network.named_weights()}
    network.export(path, state, torch.float32)
    return AutoModelForSequenceClassification.from_pretrained(path).eval()


def test_a_new_head_is_small_and_a_function_of_the_seed(causal):
    torch.manual_seed(5)
    one = load(causal, seed=3)
    state = torch.get_rng_state()
    two, other = load(causal, seed=3), load(causal, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.model.score.weight, two.model.score.weight)
    assert not torch.equal(one.model.score.weight, other.model.score.weight)
    values, _, _ = run(one, pairs(4))
    assert 0 < values.abs().max() < 1.0
    own = AutoModelForCausalLM.from_pretrained(causal).base_model
    for name, parameter in own.named_parameters():
        assert torch.equal(parameter, dict(one.model.base_model.named_parameters())[name]), name


def test_the_exported_model_gives_the_same_scores(causal, tmp_path):
    network = load(causal)
    with torch.no_grad():
        network.model.score.weight.add_(torch.randn_like(network.model.score.weight))
    values, last, batch = run(network, pairs(4))
    loaded = export(network, tmp_path / "reward")
    assert loaded.config.num_labels == 1 and loaded.config.pad_token_id == PAD_ID
    padded = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    assert torch.allclose(padded, last, atol=1e-5)
    for index, row in enumerate(row for example in pairs(4) for row in example.sequences):
        for length in range(1, len(row.completion_ids) + 1):  # a value is the score of what was read so far
            ids = torch.tensor([row.prompt_ids + row.completion_ids[:length]])
            assert torch.allclose(loaded(input_ids=ids).logits[0, 0], values[index, length - 1], atol=1e-5)
        assert (values[index, len(row.completion_ids) :] == 0).all()
    again = load(tmp_path / "reward", seed=9)
    assert torch.equal(again.model.score.weight, network.model.score.weight)
    assert torch.equal(run(again, pairs(4))[1], last)


def test_padding_with_the_end_token_is_not_exported(tmp_path):
    """Decoders of transformers score the last token that is not padding: with the end token, the one before it."""
    ended = [
        type(example)(tuple(type(row)(row.prompt_ids, (*row.completion_ids, EOS_ID)) for row in example.sequences))
        for example in pairs(3)
    ]
    folder = build_tiny_llama(tmp_path / "causal")
    network = load(folder, pad_id=EOS_ID)  # its config knows a better one
    _, last, _ = run(network, ended, pad_id=EOS_ID)
    loaded = export(network, tmp_path / "one")
    assert loaded.config.pad_token_id == PAD_ID
    batch = collate(ended, pad_id=PAD_ID)
    assert torch.allclose(loaded(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0], last, atol=1e-5)
    network.model.config.pad_token_id = EOS_ID  # and now it does not: no id, and no wrong number
    loaded = export(network, tmp_path / "two")
    assert loaded.config.pad_token_id is None
    row = ended[0].sequences[0]
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    assert torch.allclose(loaded(ids).logits[0], last[0], atol=1e-5)
    with pytest.raises(ValueError, match="padding"):
        loaded(batch.input_ids)


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig])
def test_an_encoder_scores_the_whole(tmp_path, kind):
    torch.manual_seed(2)
    (tmp_path / "encoder").mkdir()
    AutoModelForSequenceClassification.from_config(kind(**ENCODER, num_labels=1)).base_model.save_pretrained(
        tmp_path / "encoder"
    )
    network = load(tmp_path / "encoder")
    values, last, batch = run(network, pairs(4))
    loaded = export(network, tmp_path / "reward")
    assert torch.allclose(loaded(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0], last, atol=1e-5)
    assert last.unique().numel() == len(last)
    assert torch.equal(values, torch.where(batch.mask > 0, last.unsqueeze(1), 0.0))
    values.sum().backward()
    assert all(parameter.grad is not None for _, parameter in network.named_weights())
    with pytest.raises(ConfigError, match="cannot be packed"):
        load(tmp_path / "encoder", packing=True)


def test_a_language_model_that_is_not_to_be_trained_is_no_reward_model(causal, tmp_path):
    """Measured, it would give the scores of a head drawn at random."""
    with pytest.raises(ConfigError, match="has no scalar head") as caught:
        load(causal, trainable=False)
    assert caught.value.value.endswith("without score.weight")
    export(load(causal), tmp_path / "reward")
    frozen = load(tmp_path / "reward", trainable=False)
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())


def test_what_is_no_reward_model_is_refused(tmp_path):
    folder = build_tiny_llama(tmp_path / "causal")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ConfigError, match="is a classifier") as caught:
        load(tmp_path / "classifier")
    assert "3 labels" in caught.value.value
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no such column"):
        network = load(folder)
        batch = collate(pairs(1), pad_id=0)
        network(batch.input_ids, batch.attention_mask, batch.labels, batch.positions, batch.mask, (Column.LOGPS,))

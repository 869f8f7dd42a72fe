"""Critics that start as another checkpoint: which are taken, and what is said of others before anything is sampled."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rayalign.build import learner_specs
from rayalign.errors import ConfigError
from tests.exact import TOKENS, build_model, run
from tests.tiny_models import build_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("policy") / "model")


def train(folder: Path, tiny: Path, critic: Path) -> list[dict]:
    algorithm = {"name": "ppo", "samples": 2, "kl": {"coef": 0.0}, "critic": {"model": str(critic)}}
    return run(folder, tiny, algorithm, length=2, train={"steps": 1})[1]


def test_one_with_further_tokens_is_taken(tiny, tmp_path):
    """A reward model of the policy's family, with a [PAD] of its own."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "critic")
    (record,) = train(tmp_path / "run", tiny, tmp_path / "critic")
    assert math.isfinite(record["critic/loss"]) and len(tokenizer) == len(TOKENS) + 1


def test_one_that_reads_other_tokens_is_refused(tiny, tmp_path):
    critic = build_tiny_llama(tmp_path / "critic")
    with pytest.raises(ConfigError, match="the critic reads other tokens") as raised:
        train(tmp_path / "run", tiny, critic)
    count = len(set(AutoTokenizer.from_pretrained(tiny).get_vocab().items())
                - set(AutoTokenizer.from_pretrained(critic).get_vocab().items()))  # fmt: skip
    assert f"{count} of the policy's {len(TOKENS)} tokens" in raised.value.value


def test_one_that_is_not_there_is_named_with_its_key(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "untold").mkdir()
    (tmp_path / "untold" / "config.json").write_text("{}")
    whats = {}
    for name in ("none", "empty", "untold"):
        with pytest.raises(ConfigError) as raised:
            train(tmp_path / "run", tiny, tmp_path / name)
        assert raised.value.where == "key algorithm.critic.model" and "demo" not in raised.value.remedy
        whats[name] = raised.value.what
    assert whats == {
        "none": "there is no such folder",
        "empty": "this folder holds no model",
        "untold": "no tokenizer could be loaded from there",
    }


def test_one_without_a_network_is_named_with_its_key(tiny, tmp_path):
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "critic")
    (tmp_path / "critic" / "config.json").write_text('{"model_type": "mamba"}')  # has no network with a score head
    with pytest.raises(ConfigError, match="no score model could be loaded") as raised:
        train(tmp_path / "run", tiny, tmp_path / "critic")
    assert raised.value.where == "key algorithm.critic.model"


def test_a_plan_names_the_key_too(make):
    config = make(algorithm={"name": "ppo", "critic": {"model": "/no/such/critic"}})
    with pytest.raises(ConfigError) as raised:
        learner_specs(config, None, policy=None, train=True)
    assert raised.value.where == "key algorithm.critic.model"


def test_one_with_too_few_positions_is_refused(tiny, tmp_path):
    """The policy has 16, and engine.max_context is as much."""
    for name, positions in (("short", 8), ("as_long", 16)):
        model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
        model.config.max_position_embeddings = positions
        for each in (model, AutoTokenizer.from_pretrained(tiny)):
            each.save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match="the critic has no room for the policy's context") as raised:
        train(tmp_path / "run", tiny, tmp_path / "short")
    assert raised.value.where == "key algorithm.critic.model" and "engine.max_context=8" in raised.value.remedy
    assert not (tmp_path / "run" / "run").exists()
    assert len(train(tmp_path / "again", tiny, tmp_path / "as_long")) == 1


def test_an_encoder_is_refused(tiny, tmp_path):
    config = BertConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "critic")
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(tmp_path / "critic")
    with pytest.raises(ConfigError, match="gives no value to each token") as raised:
        train(tmp_path / "run", tiny, tmp_path / "critic")
    assert raised.value.where == "key algorithm.critic.model"
    assert raised.value.value == f"{tmp_path / 'critic'}: BertForSequenceClassification"
    assert not (tmp_path / "run" / "run").exists()

"""Score networks with several labels: logits of decoders and encoders are those of the export in transformers."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from rayalign.collate import collate
from rayalign.data.groups import Tokeniser
from rayalign.data.readers import Row as DataRow
from rayalign.data.tokens import Turns
from rayalign.errors import ConfigError
from rayalign.learners.lora import part_of
from rayalign.learners.models import most_positions
from rayalign.learners.score_model import start
from rayalign.learners.settings import LearnerSettings, LearnerSpec, LoraConfig, OptimizerConfig
from rayalign.learners.torch import TorchLearner
from rayalign.scorers.base import score_groups
from rayalign.scorers.dpm import DpmScorer
from rayalign.types import Column, Example
from rayalign.types import Sequence as Row
from tests.contract.learner_cases import pairs
from tests.scored import group
from tests.tiny_models import PAD_ID, build_tiny_llama
from tests.unit.test_score_network import ENCODER

CLASSES = ("bad", "neutral", "good")


def learner(folder, **changes):
    settings = LearnerSettings(threads=1, dtype="float32", **changes.pop("settings", {}))
    spec = LearnerSpec(
        "policy", str(folder), network="score", classes=CLASSES, class_weights=(-2.0, 0.0, 1.0), settings=settings,
        optimizer=OptimizerConfig(), pad_id=PAD_ID, **changes,
    )  # fmt: skip
    return TorchLearner(spec, {})


def exported(made, path):
    path.mkdir()
    made.export(path)
    return AutoModelForSequenceClassification.from_pretrained(path).eval()


def classes_of(made, examples):
    found = made.annotate(examples, [Column.CLASSES])
    return torch.tensor([row.columns["policy/classes"].tolist() for example in found for row in example.sequences])


def spread_out(made):
    """Larger head weights, so that classes differ."""
    with torch.no_grad():
        for name, parameter in made.policy.named_weights():
            if name in made.policy._last:
                parameter.add_(torch.randn_like(parameter))
    return made


def test_the_logits_are_those_of_the_exported_classifier(causal, tmp_path):
    made = spread_out(learner(causal))
    found = classes_of(made, pairs(4))
    batch = collate(pairs(4), pad_id=PAD_ID)
    loaded = exported(made, tmp_path / "classifier")
    want = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(found, want.detach(), atol=1e-5, rtol=0)
    assert found.std(0).min() > 0.05 and found.shape == (8, 3)
    assert loaded.config.id2label == dict(enumerate(CLASSES)) and loaded.config.class_weights == [-2.0, 0.0, 1.0]
    again = learner(tmp_path / "classifier", seed=9)  # nothing of it is new
    torch.testing.assert_close(classes_of(again, pairs(4)), found)


def test_packed_rows_and_small_micro_batches_are_the_same(tmp_path):
    usual = spread_out(learner(build_tiny_llama(tmp_path / "causal")))
    want = classes_of(usual, pairs(4))
    for settings in ({"packing": True}, {"micro_batch_tokens": 1}, {"gradient_checkpointing": True}):
        made = learner(tmp_path / "causal", settings=settings)
        with torch.no_grad():
            made.policy.model.score.weight.copy_(usual.policy.model.score.weight)
        torch.testing.assert_close(classes_of(made, pairs(4)), want, atol=1e-5, rtol=0)


def test_the_temperature_is_in_the_exports_weights_and_in_what_is_measured_but_not_in_its_own(causal, tmp_path):
    made = spread_out(learner(causal))
    before, own = classes_of(made, pairs(2)), {name: tensor.clone() for name, tensor in made.own_tensors()}
    made.temper(2.5)
    batch = collate(pairs(2), pad_id=PAD_ID)
    loaded = exported(made, tmp_path / "tempered")
    want = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.detach()
    torch.testing.assert_close(want, before / 2.5, atol=1e-5, rtol=0)
    torch.testing.assert_close(classes_of(made, pairs(2)), want, atol=1e-5, rtol=0)
    assert all(tensor.equal(own[name]) for name, tensor in made.own_tensors())
    assert json.loads((tmp_path / "tempered" / "config.json").read_text())["fitted_temperature"] == 2.5


def test_adapters_leave_a_whole_head_and_export_it_tempered(tmp_path):
    folder = build_tiny_llama(tmp_path / "causal")
    made = spread_out(learner(folder, lora=LoraConfig(rank=2)))
    assert dict(part_of(made.spec, made.policy).own())["score.weight"].requires_grad
    before = classes_of(made, pairs(2))
    made.temper(2.0)
    batch = collate(pairs(2), pad_id=PAD_ID)
    loaded = exported(made, tmp_path / "merged")
    want = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.detach()
    torch.testing.assert_close(want, before / 2.0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("names", [("bad", "good"), ("good", "neutral", "bad"), ("LABEL_0", "LABEL_1")])
def test_a_classifier_with_other_classes_is_refused(tmp_path, names):
    folder = build_tiny_llama(tmp_path / "causal")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="has other classes") as caught:
        learner(tmp_path / "other")
    assert ", ".join(names) in caught.value.value and "bad, neutral, good" in caught.value.rule


def test_a_reward_model_is_no_classifier_and_a_column_of_the_other_kind_is_none(tmp_path):
    folder = build_tiny_llama(tmp_path / "causal")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    with pytest.raises(ConfigError, match="gives one score"):
        learner(tmp_path / "reward")
    with pytest.raises(ConfigError, match="no such column"):
        learner(folder).annotate(pairs(1), [Column.VALUES])


def encoder_tokenizer(kind):
    """Letters, and a pair as the kind's own tokenizers make it."""
    specials = ["<pad>", "<s>", "</s>", "?"]
    vocab = {piece: i for i, piece in enumerate([*specials, *(chr(code) for code in range(97, 123))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    between = "</s> </s>" if kind is RobertaConfig else "</s>"
    second = "$B:1 </s>:1" if kind is BertConfig else "$B </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=f"<s> $A {between} {second}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<s>", sep_token="</s>", unk_token="?"
    )


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig])
def test_an_encoder_has_prompt_and_answer_as_two_segments(tmp_path, kind):
    torch.manual_seed(2)
    (tmp_path / "encoder").mkdir()
    types = {"type_vocab_size": 2} if kind is BertConfig else {"type_vocab_size": 1}
    config = kind(**(ENCODER | types), num_labels=3, initializer_range=0.5)
    AutoModelForSequenceClassification.from_config(config).base_model.save_pretrained(tmp_path / "encoder")
    tokenizer = encoder_tokenizer(kind)
    turns = Turns(tokenizer, chat_template=True, segments=True)
    assert turns.segments
    texts = [("how", "fine"), ("how are you", "well"), ("a", "b")]
    tokeniser = Tokeniser(turns, max_tokens=60)
    groups = [
        tokeniser.group(DataRow("votes", [{"role": "user", "content": a}], (b,), None), "row", index=0, id="0")[0]
        for a, b in texts
    ]
    rows = [Row(g.prompt.token_ids, g.completions[0].token_ids) for g in groups]
    assert [row.prompt_ids + row.completion_ids for row in rows] == [
        tuple(tokenizer(a, b)["input_ids"]) for a, b in texts
    ]
    made = spread_out(learner(tmp_path / "encoder", segments=True))
    found = classes_of(made, [Example((row,)) for row in rows])
    loaded = exported(made, tmp_path / "classifier")
    for (a, b), logits in zip(texts, found, strict=True):
        asked = tokenizer(a, b, return_tensors="pt", return_token_type_ids=kind is BertConfig)
        want = loaded(**asked).logits[0].detach()
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)
    if kind is BertConfig:  # what the segments are is not nothing
        without = classes_of_without_types(tmp_path / "classifier", rows)
        assert (without - found).abs().max() > 1e-3
    loss = made.columns(made.batch([Example((rows[0],))], [0]), (Column.CLASSES,))["classes"].sum()
    loss.backward()
    assert all(parameter.grad is not None for _, parameter in made.policy.named_weights())


def test_norms_of_a_new_head_let_its_input_through():
    sizes = {name: ENCODER[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    model = AutoModelForSequenceClassification.from_config(ModernBertConfig(**sizes, pad_token_id=0, num_labels=3))
    start(model, [name for name, _ in model.named_parameters() if not name.startswith("model.")], seed=0)
    assert model.head.norm.weight.eq(1).all() and model.classifier.bias.eq(0).all()


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig])
def test_a_row_that_is_too_long_for_an_encoder_is_cut(tmp_path, kind):
    """Also where padding takes some of its positions."""
    config = kind(**ENCODER, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    encoder_tokenizer(kind).save_pretrained(tmp_path)
    (scores,) = score_groups(DpmScorer(model=str(tmp_path)).start(), [group(0, "a" * 300, "b" * 300)], who="s")
    assert len(scores.scores) == 2
    most = most_positions(config)
    assert most == config.max_position_embeddings - (0 if kind is BertConfig else PAD_ID + 1)
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))


def classes_of_without_types(folder, rows):
    return classes_of(learner(folder), [Example((row,)) for row in rows])


def test_a_chat_template_and_a_tokenizer_without_pairs_go_first(model):
    tokenizer = encoder_tokenizer(BertConfig)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert not Turns(tokenizer, chat_template=True, segments=True).segments
    assert Turns(tokenizer, chat_template=False, segments=True).segments
    assert not Turns(tokenizer, chat_template=False).segments
    plain = PreTrainedTokenizerFast(
        tokenizer_object=AutoTokenizer.from_pretrained(model).backend_tokenizer, eos_token="<eos>"
    )
    assert not Turns(plain, chat_template=False, segments=True).segments

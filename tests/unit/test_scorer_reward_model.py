"""The scorer `reward_model`: the learner's own scores, whatever else is in the batch; and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig

from rayalign.api import run_training
from rayalign.build import examples_for, load_tokenizer
from rayalign.config import parse_config
from rayalign.errors import ConfigError, ScoreError
from rayalign.learners.settings import LearnerSettings, LearnerSpec
from rayalign.learners.torch import TorchLearnerConfig
from rayalign.scorers.base import score_groups
from rayalign.scorers.judge import Judge
from rayalign.scorers.reward_model import RewardModelScorer
from rayalign.types import Column, Example
from rayalign.types import Sequence as Row
from tests.parts import tiny_config
from tests.scored import group
from tests.tiny_models import build_tiny_llama, build_tokenizer

ROWS = [
    {
        "prompt": f"write one sentence about film {index}",
        "chosen": "a great film" + " and a happy story" * (index % 4),
        "rejected": "awful" + " I hate it" * (index % 3),
    }
    for index in range(24)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A reward model as a training here writes it: (its config, its checkpoint)."""
    folder = tmp_path_factory.mktemp("reward")
    model = build_tiny_llama(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    changes = {"algorithm": {"name": "reward_model"}, "data": {"examples": str(folder / "pairs.jsonl")}, "scorer": None}
    config = parse_config(tiny_config(folder, model, **changes, train__steps=3, optimizer__lr=1e-2))
    result = run_training(config)
    return config, result.run_dir / "checkpoints" / "step-3"


def scores(checkpoint, groups, **settings):
    score = RewardModelScorer(model=str(checkpoint), **settings).start()
    return [each.scores for each in score_groups(score, groups, who="scorer-0")]


def learned(checkpoint, groups):
    """The values that the learner gives the last tokens of rows of data."""
    config = TorchLearnerConfig(threads=1)
    spec = LearnerSpec(
        "policy", str(checkpoint), dtype="float32", trainable=False, settings=config, network="score", pad_id=0
    )
    learner = config.build([spec], rank=0, world_size=1, address=("127.0.0.1", 0))["policy"]
    rows = [Row(g.prompt.token_ids, completion.token_ids) for g in groups for completion in g.completions]
    found = learner.annotate([Example((row,)) for row in rows], (Column.VALUES,))
    values = iter(float(example.sequences[0].columns["policy/values"][-1]) for example in found)
    return [tuple(next(values) for _ in g.completions) for g in groups]


@pytest.mark.parametrize("budget", [1, 64, 8192])
def test_the_scores_of_a_data_sets_texts_are_the_learners(trained, budget):
    config, checkpoint = trained
    rows = examples_for(config, load_tokenizer(config)).step(0, 8)
    want = torch.tensor(learned(checkpoint, rows))
    got = torch.tensor(scores(checkpoint, rows, micro_batch_tokens=budget))
    assert want.std() > 0.01  # they differ: else any constant would do
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_rows_that_are_too_long_are_cut_as_in_training(trained):
    config, checkpoint = trained
    shorter = config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": 24})})
    rows = examples_for(shorter, load_tokenizer(config)).step(0, 4)
    assert any(c.finish_reason == "length" for g in rows for c in g.completions)
    got = torch.tensor(scores(checkpoint, rows, max_tokens=24))
    torch.testing.assert_close(got, torch.tensor(learned(checkpoint, rows)), atol=1e-5, rtol=0)
    assert not torch.allclose(got, torch.tensor(scores(checkpoint, rows)), atol=1e-3)


def test_without_a_chat_template_as_in_training(trained):
    config, checkpoint = trained
    plain = config.model_copy(update={"data": config.data.model_copy(update={"chat_template": False})})
    rows = examples_for(plain, load_tokenizer(config)).step(0, 4)
    got = torch.tensor(scores(checkpoint, rows, chat_template=False))
    torch.testing.assert_close(got, torch.tensor(learned(checkpoint, rows)), atol=1e-5, rtol=0)
    assert not torch.allclose(got, torch.tensor(scores(checkpoint, rows)), atol=1e-3)


def test_transformers_scores_the_checkpoint_alike(trained):
    _, checkpoint = trained
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = build_tokenizer()
    messages = [{"role": "user", "content": "prompt 0"}, {"role": "assistant", "content": "a good film"}]
    ids = tokenizer(
        tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt", add_special_tokens=False
    )
    with torch.inference_mode():
        want = model(input_ids=ids["input_ids"]).logits.item()
    assert scores(checkpoint, [group(0, "a good film")])[0][0] == pytest.approx(want, abs=1e-5)


def test_in_bfloat16_scores_are_near_and_do_not_round_to_ties(trained):
    _, checkpoint = trained
    groups = [group(0, *(f"a great film {word}" for word in ("", "story", "actor", "opera", "and I love it")))]
    (exact,), (found,) = scores(checkpoint, groups), scores(checkpoint, groups, dtype="bfloat16")
    assert found == pytest.approx(exact, abs=0.05 * max(map(abs, exact)) + 0.02)
    assert all(score != torch.tensor(score).bfloat16().item() for score in found)  # finer than its 8 bits


def test_the_whole_conversation_counts_and_a_text_alone_will_do(trained):
    _, checkpoint = trained
    one = group(0, "good", "")
    before = ({"role": "system", "content": "be kind"}, *one.prompt.messages)
    more = replace(one, prompt=replace(one.prompt, messages=before))
    bare = replace(one, prompt=replace(one.prompt, messages=()))
    found = scores(checkpoint, [one, more, bare])
    assert found[0] == pytest.approx(found[2], abs=1e-6) and abs(found[0][0] - found[1][0]) > 1e-4
    assert found[0][0] != found[0][1]


def test_an_encoder_scores_as_it_does_itself(tmp_path):
    config = BertConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        initializer_range=0.5,
    )
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    texts = ("good film", "a")
    with torch.inference_mode():
        rows = [tokenizer(f"prompt 0{text}<eos>", return_tensors="pt")["input_ids"] for text in texts]
        want = [model(input_ids=row).logits.item() for row in rows]
    (got,) = scores(tmp_path, [group(0, *texts)], chat_template=False)
    assert got == pytest.approx(tuple(want), abs=1e-5) and abs(want[0] - want[1]) > 1e-4


def test_a_training_is_scored_by_one_and_the_reward_is_its_own(trained, tmp_path, model):
    _, checkpoint = trained
    scorer = {"name": "reward_model", "model": str(checkpoint), "threads": 1}
    result = run_training(parse_config(tiny_config(tmp_path, model, scorer=scorer, train__steps=1)))
    samples = [json.loads(line) for line in (result.run_dir / "samples.jsonl").read_text().splitlines()]
    first = [each for each in samples if each["prompt_index"] == samples[0]["prompt_index"]]
    texts = group(0, *(each["completion"] for each in first))
    messages = ({"role": "user", "content": first[0]["prompt"]},)
    asked = replace(texts, prompt=replace(texts.prompt, messages=messages))
    assert len(first) == 4
    assert scores(checkpoint, [asked])[0] == pytest.approx([each["score"] for each in first], abs=1e-4)


def check(path, tmp_path, model, **changes):
    """What a run says before anything is started."""
    scorer = {"name": "reward_model", "model": str(path), **changes}
    with pytest.raises(ConfigError) as raised:
        run_training(parse_config(tiny_config(tmp_path, model, scorer=scorer)))
    assert raised.value.where == "key scorer.model" and raised.value.rule and raised.value.remedy
    assert not (tmp_path / "run").exists()
    return raised.value


def test_a_policy_is_refused(tmp_path, model):
    error = check(model, tmp_path, model)
    assert error.what == "this is no reward model" and error.value == f"{model}: saved as LlamaForCausalLM"


def test_a_classifier_is_refused(tmp_path, model):
    config = AutoConfig.from_pretrained(model)
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
    error = check(tmp_path / "three", tmp_path, model)
    assert error.what == "this is a classifier" and error.value.endswith("three: 3 labels")


def test_a_folder_that_is_not_there_or_holds_nothing(tmp_path, model):
    assert check(tmp_path / "nothing", tmp_path, model).what == "there is no such folder"
    assert check("runs/reward/checkpoints/step-30", tmp_path, model).what == "there is no such folder"
    (tmp_path / "empty").mkdir()
    assert check(tmp_path / "empty", tmp_path, model).what == "this folder holds no model that can be read"


def test_a_reward_model_without_its_head_is_refused_when_it_is_loaded(trained, tmp_path):
    _, checkpoint = trained
    for file in checkpoint.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="it has no scalar head"):
        RewardModelScorer(model=str(tmp_path)).start()


def test_a_checkpoint_that_is_cut_off_is_refused_when_it_is_loaded(trained, tmp_path):
    _, checkpoint = trained
    for file in checkpoint.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes()[: 9 if file.suffix == ".safetensors" else None])
    with pytest.raises(ConfigError, match="the reward model cannot be loaded") as raised:
        RewardModelScorer(model=str(tmp_path)).start()
    assert raised.value.where == "key scorer.model" and "SafetensorError" in raised.value.value


def test_a_model_without_a_chat_template_says_what_to_set(trained, tmp_path):
    _, checkpoint = trained
    for file in checkpoint.iterdir():
        if file.is_file() and file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ScoreError) as raised:
        scores(tmp_path, [group(4, "a")])
    assert raised.value.where == "prompt 4" and "set scorer.chat_template" in raised.value.remedy


def test_it_takes_a_gpu_where_there_is_one_unless_it_is_told_not_to():
    assert RewardModelScorer(model="m").gpus == 1 and RewardModelScorer(model="m", device="cpu").gpus == 0
    assert LearnerSettings().attention == RewardModelScorer(model="m").attention


def test_another_checkpoint_in_the_same_folder_is_another_scorer(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    scorer = RewardModelScorer(model=str(tmp_path))
    judge = Judge(ask={"name": "engine", "model": str(tmp_path)})
    before = scorer.contents(), judge.contents()
    assert scorer.contents() == before[0]
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert scorer.contents()["model"] != before[0]["model"]
    assert judge.contents()["ask.model"] != before[1]["ask.model"]
    assert judge.contents()["template"] == before[1]["template"]
    assert RewardModelScorer(model="a-hub/id").contents() == {}

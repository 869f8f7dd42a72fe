"""The scorer `dpm`: the classifier's own distribution, what it is worth, soft preferences, and contested answers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rayalign.algorithms.online_preference import OnlinePreference
from rayalign.algorithms.pairing import Pairing
from rayalign.checks import check_training
from rayalign.collate import collate
from rayalign.data.labels import record_of, rows_of
from rayalign.errors import ConfigError, ScoreError
from rayalign.learners.merge import weighted_sum
from rayalign.scorers.base import score_groups
from rayalign.scorers.dpm import DpmScorer, beaten
from rayalign.scorers.mix import Mix
from rayalign.types import Judgement, Terms
from tests.scored import group
from tests.tiny_models import build_tokenizer
from tests.unit.test_scorer_reward_model import check

TEXTS = ("a great film", "awful", "a happy story and I love it", "not bad")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    """A classifier of three classes, as anybody's: without weights of the classes."""
    folder = tmp_path_factory.mktemp("dpm")
    config = AutoConfig.from_pretrained(model)
    config.num_labels, config.id2label = 3, {0: "bad", 1: "neutral", 2: "good"}
    torch.manual_seed(4)
    made = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        made.score.weight.mul_(8.0)
    made.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def judged(checkpoint, *groups, **settings):
    score = DpmScorer(model=str(checkpoint), threads=1, **settings).start()
    return score_groups(score, groups or [group(0, *TEXTS)], who="scorer-0")


def own(checkpoint, texts=TEXTS):
    """[K, 3] probabilities of the model's own forward pass."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval(), build_tokenizer()
    found = []
    for text in texts:
        messages = [{"role": "user", "content": "prompt 0"}, {"role": "assistant", "content": text}]
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            found.append(model(input_ids=ids).logits[0].softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize("budget", [1, 64, 8192])
@pytest.mark.parametrize("weights", [None, (0.0, 0.0, -1.0), (1.0, 5.0, 2.0)])
def test_scores_are_the_expected_worth(checkpoint, budget, weights):
    probs = own(checkpoint)
    (found,) = judged(checkpoint, micro_batch_tokens=budget, **({"weights": weights} if weights else {}))
    want = probs @ torch.tensor(weights or (-1.0, 0.0, 1.0))
    assert want.std() > 0.05
    assert found.scores == pytest.approx(want.tolist(), abs=1e-5)
    assert found.preferences is None and found.contested == ()
    assert found.metrics["dpm/entropy"] == pytest.approx(float(-(probs * probs.log()).sum(-1).mean()), abs=1e-5)
    assert found.metrics["dpm/agreement"] == pytest.approx(float((probs**2).sum(-1).mean()), abs=1e-5)
    assert [found.metrics[f"dpm/share_{name}"] for name in ("bad", "neutral", "good")] == pytest.approx(
        probs.mean(0).tolist(), abs=1e-5
    )


def test_the_whole_distribution_can_be_had(checkpoint):
    score = DpmScorer(model=str(checkpoint)).start()
    (found,) = score.distributions([group(0, *TEXTS)])
    assert found.exp().numpy() == pytest.approx(own(checkpoint).numpy(), abs=1e-5) and score.classes[0] == "bad"


def test_weights_of_the_training_are_used_unless_others_are_given(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"class_weights": [0.0, 1.0, 0.0]}))
    assert judged(tmp_path)[0].scores == pytest.approx(own(checkpoint)[:, 1].tolist(), abs=1e-5)
    assert judged(tmp_path, weights=(0.0, 0.0, 1.0))[0].scores == pytest.approx(
        own(checkpoint)[:, 2].tolist(), abs=1e-5
    )


def test_preferences_are_those_of_votes_drawn_apart(checkpoint):
    """Enumerated: each class for one with each class for the other."""
    weights = (0.0, 2.0, 2.0)
    (found,) = judged(checkpoint, weights=weights, preferences=True)
    probs = own(checkpoint).double()
    for i in range(4):
        for j in range(4):
            want = sum(
                float(probs[i, a] * probs[j, b])
                * (1.0 if weights[a] > weights[b] else 0.5 * (weights[a] == weights[b]))
                for a in range(3)
                for b in range(3)
            )
            assert found.preferences[i][j] == pytest.approx(0.5 if i == j else want, abs=1e-5)
    certain = beaten(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([-1.0, 1.0]))
    assert certain == ((0.5, 1.0), (0.0, 0.5))


def test_contested_answers_are_learned_from_in_no_pair_and_no_row(checkpoint):
    agreed = (own(checkpoint) ** 2).sum(-1)
    least = float(agreed.sort().values[1:3].mean())  # two of the four are below
    (found,) = judged(checkpoint, min_agreement=least, preferences=True)
    assert found.contested == tuple((agreed < least).tolist()) and sum(found.contested) == 2
    assert found.metrics["dpm/contested"] == 0.5 and all(score == score for score in found.scores)
    kept = {index for index, out in enumerate(found.contested) if not out}
    pairs, metrics = Pairing("all").of([found])
    assert {(i, j) for _, i, j in pairs} in ({tuple(kept)}, {tuple(kept)[::-1]})
    assert metrics["pairs/dropped"] == 5.0
    soft = OnlinePreference(samples=4, pairs="all", loss="soft")
    assert len(soft.examples([replace(found, completions=group(0, *TEXTS).completions)])[0]) == 1
    rows, left_out = rows_of(record_of(found, TEXTS), "ranked")
    assert left_out["contested answers"] == 2 and set(rows[0]["completions"]) == {TEXTS[index] for index in kept}


def test_answers_count_by_agreement_and_a_pair_as_the_more_contested_of_its_two(checkpoint):
    agreed = (own(checkpoint) ** 2).sum(-1)
    (found,) = judged(checkpoint, weigh=True)
    trust = ((agreed - 1 / 3) * 1.5).tolist()
    assert found.trust == pytest.approx(trust, abs=1e-5) and len(set(trust)) == 4
    assert found.metrics["dpm/trust"] == pytest.approx(sum(trust) / 4, abs=1e-5)
    answered = replace(found, completions=group(0, *TEXTS).completions)
    examples, _ = OnlinePreference(samples=4, pairs="all").examples([answered])
    pairs, _ = Pairing("all").of([answered])
    wanted = [min(trust[i], trust[j]) for _, i, j in pairs]
    batch = collate(examples, pad_id=0)
    assert batch.weight.tolist() == pytest.approx(wanted, abs=1e-5)
    loss = torch.linspace(1, 2, len(examples))
    assert float(weighted_sum(Terms(loss, {}), batch)) == pytest.approx(sum(loss.mul(torch.tensor(wanted)).tolist()))
    assert collate(examples, pad_id=0, weight=[0.0] * len(examples)).weight.tolist() == [0.0] * len(examples)


def test_a_labelling_keeps_the_classes_of_each_answer(checkpoint):
    (found,) = judged(checkpoint)
    record = json.loads(json.dumps(record_of(found, TEXTS)))
    assert torch.tensor(record["shares"]).allclose(own(checkpoint), atol=1e-5) and "trust" not in record


def test_a_mix_trusts_an_answer_as_the_part_that_trusts_it_least(checkpoint):
    part = {"name": "dpm", "model": str(checkpoint), "weigh": True}
    score = Mix(scorers=[{"scorer": part}, {"scorer": {"name": "rules", "rule": "brevity"}}]).start()
    (found,) = score_groups(score, [group(0, *TEXTS)], who="scorer-0")
    assert found.trust == judged(checkpoint, weigh=True)[0].trust
    assert found.shares == judged(checkpoint)[0].shares


@pytest.mark.parametrize("trust", [(1.0,), (1.0, 2.0), (float("nan"), 1.0), (-0.1, 1.0)])
def test_a_trust_that_does_not_fit_is_refused(trust):
    with pytest.raises(ScoreError, match="trust in answers"):
        score_groups(lambda groups: [Judgement((1.0, 2.0), trust=trust)], [group(0, "a", "b")], who="scorer-0")


def test_a_mix_leaves_out_what_one_of_its_parts_finds_contested(checkpoint):
    part = {"name": "dpm", "model": str(checkpoint), "min_agreement": 0.99}
    score = Mix(scorers=[{"scorer": part}, {"scorer": {"name": "rules", "rule": "brevity"}}]).start()
    (found,) = score_groups(score, [group(0, *TEXTS)], who="scorer-0")
    assert found.contested == judged(checkpoint, min_agreement=0.99)[0].contested and any(found.contested)


def test_what_it_refuses(checkpoint, tmp_path, model):
    assert check(model, tmp_path, model, name="dpm").what == "this is no preference model"
    error = check_weights(checkpoint, (1.0, 0.0))
    assert error.where == "key scorer.weights" and "bad, neutral, good" in error.rule
    assert check_weights(checkpoint, (0.0, 0.0, 0.0)).what == "all classes are worth the same"
    with pytest.raises(ConfigError, match="no answer would be contested") as raised:
        DpmScorer(model=str(checkpoint), min_agreement=0.3).check("any")
    assert raised.value.remedy.startswith("set min_agreement=0.67, say")
    DpmScorer(model=str(checkpoint), min_agreement=0.34).check("any")
    config = AutoConfig.from_pretrained(model)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    error = check(tmp_path / "reward", tmp_path, model, name="dpm")
    assert error.what == "this is a reward model" and "reward_model" in error.remedy


def check_weights(checkpoint, weights):
    with pytest.raises(ConfigError) as raised:
        DpmScorer(model=str(checkpoint), weights=weights).check("any")
    return raised.value


@pytest.mark.parametrize(
    ("settings", "refused"),
    [({}, True), ({"loss": {"name": "dpo"}}, False), ({"unrated": "bradley_terry"}, False), ({"ask": True}, False)],
)
def test_a_loss_of_probabilities_wants_those_of_the_classes(make, checkpoint, settings, refused):
    ask = settings.pop("ask", False)
    algorithm = {"name": "online_preference", "samples": 4, "loss": {"name": "soft"}, **settings}
    config = make(algorithm=algorithm, scorer={"name": "dpm", "model": str(checkpoint), "preferences": ask})
    if not refused:
        return check_training(config)
    with pytest.raises(ConfigError, match="scorer is not asked for them") as raised:
        check_training(config)
    assert raised.value.where == "key scorer.preferences"
    return None

"""Training on data sets: no engine, no scorer, the same loop; held-out rows are measured, runs resume exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayalign.api import run_evaluation, run_training
from rayalign.build import examples_for, load_tokenizer
from rayalign.config import parse_config
from rayalign.errors import ConfigError, DataError, TrainingStopped
from tests.loop.conftest import records, timeless
from tests.parts import PowerCut, tiny_config

WORDS = "calm plain green early bright round quiet warm small fresh".split()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    """Rows of each kind, 24 of them; the better answer is the one about tea."""
    prompts = [f"say something {word} about {thing}" for word in WORDS for thing in ("rain", "bread", "chess")][:24]
    answers = [(f"tea is {WORDS[i % 10]}", f"no {WORDS[(i + 3) % 10]} idea at all") for i in range(24)]
    both = list(zip(prompts, answers, strict=True))
    return {
        "completion": write(tmp_path / "sft.jsonl", [{"prompt": p, "completion": a} for p, (a, _) in both]),
        "pair": write(tmp_path / "pairs.jsonl", [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in both]),
        "label": write(
            tmp_path / "labels.jsonl",
            [{"prompt": p, "completion": pair[k], "label": k == 0} for p, pair in both for k in (0, 1)],
        ),
        "ranked": write(
            tmp_path / "ranked.jsonl",
            [{"prompt": p, "completions": [b, a, f"{a} or not"], "ranks": [3, 1, 2]} for p, (a, b) in both],
        ),
    }


@pytest.fixture
def config(tmp_path, model, data):
    """A tiny config of an offline algorithm: no prompts, no scorer, nothing that samples."""

    def build(algorithm, kind, **changes):
        base = tiny_config(tmp_path, model)
        for key in ("scorer", "sampling", "engine"):
            del base[key]
        base |= {
            "algorithm": algorithm,
            "data": {"examples": data[kind], "chat_template": False, "held_out": 0.25, "max_tokens": 48},
            "rollout": {"prompts": 6},
            "optimizer": {"lr": 3e-3},
            "evaluation": {},
            "train": {"steps": 12},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            base[section] = {**base[section], name: value} if name else value
        return parse_config(base)

    return build


CASES = {
    "sft": ({"name": "sft"}, "completion", "held_out/nll", "falls"),
    "sft on pairs": ({"name": "sft"}, "pair", "held_out/nll", "falls"),
    "dpo": ({"name": "preference"}, "pair", "held_out/rewards/margins", "rises"),
    "several losses": (
        {"name": "preference", "loss": {"name": "mix", "losses": ["ipo", "hinge"], "weights": [1, 0.5]}},
        "ranked",
        "held_out/rewards/margins",
        "rises",
    ),
    "orpo": ({"name": "preference", "loss": {"name": "orpo"}}, "pair", "held_out/nll", "falls"),
    "kto": ({"name": "kto"}, "label", "held_out/rewards/accuracies", "rises"),
    "paired kto": ({"name": "kto", "paired": True}, "pair", "held_out/rewards/margins", "rises"),
    "binary cringe": ({"name": "cringe", "variant": "binary"}, "label", "held_out/nll/good", "falls"),
    "pairwise cringe": ({"name": "cringe"}, "pair", "held_out/logps/margins", "rises"),
    "reward model": ({"name": "reward_model"}, "pair", "held_out/rewards/accuracies", "rises"),
    "ranked reward model": (
        {"name": "reward_model", "loss": {"name": "plackett_luce"}},
        "ranked",
        "held_out/rewards/accuracies",
        "rises",
    ),
    "regularised": ({"name": "preference", "kl_weight": 0.01}, "pair", "held_out/rewards/margins", "rises"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_objective_is_learned_from_its_data(config, case):
    algorithm, kind, metric, direction = CASES[case]
    result = run_training(config(algorithm, kind))
    before, after = (result.evaluations[step].metrics[metric] for step in (0, 12))
    assert (after > before) == (direction == "rises"), (before, after)
    last = records(result.run_dir)[-1]
    assert last["step"] == 12 and {"loss", "completion/length_mean", "memory/peak_gib", "padding"} <= last.keys()
    assert "reward/mean" not in last and records(result.run_dir, "samples") == []
    assert (result.run_dir / "report.html").is_file()


@pytest.mark.parametrize("case", ["dpo", "kto", "pairwise cringe", "reward model"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(config, tmp_path, case):
    algorithm, kind, *_ = CASES[case]
    settings = {"checkpoint__every": 1, "checkpoint__keep": 9, "train__steps": 4}
    whole = run_training(config(algorithm, kind, **settings, run_dir=str(tmp_path / "whole"))).run_dir
    killed = {**settings, "run_dir": str(tmp_path / "killed")}
    with pytest.raises(PowerCut):
        run_training(config(algorithm, kind, **killed, trackers=[{"name": "tests.parts:Stop", "step": 3}]))
    resumed = run_training(config(algorithm, kind, **killed, resume=True)).run_dir
    assert [timeless(r) for r in records(resumed)] == [timeless(r) for r in records(whole)]
    assert records(resumed, "evaluations") == records(whole, "evaluations")


def test_cached_log_probs_of_the_reference_are_those_of_a_live_one(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    live = run_training(config({"name": "preference"}, "pair", run_dir=str(tmp_path / "live"))).run_dir
    cached = {"name": "preference", "reference": {"cached": True}}
    for name in ("cached", "again"):  # the second run reads what the first has written
        run_dir = run_training(config(cached, "pair", run_dir=str(tmp_path / name))).run_dir
        for old, new in zip(records(live), records(run_dir), strict=True):
            assert new["loss"] == pytest.approx(old["loss"], abs=1e-6)
        assert not (run_dir / "checkpoints/step-12/trainer/reference/learner.json").exists()
    assert len(list((tmp_path / "home").rglob("*.npz"))) == 1
    monkeypatch.chdir(tmp_path)
    trained = tmp_path / "cached/checkpoints/step-12"
    found = run_evaluation(config(cached, "pair"), model=str(trained)).metrics
    last = records(tmp_path / "cached", "evaluations")[-1]["metrics"]
    assert found["held_out/rewards/margins"] == pytest.approx(last["held_out/rewards/margins"], abs=1e-5)


def test_rows_of_several_passes_are_looked_at_once(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cached = {"name": "preference", "reference": {"cached": True}}
    noise = {"label_noise": {"prob": 0.5}}
    plain = config(cached, "pair")
    settings = config(cached, "pair", data__examples={"path": plain.data.examples[0].path, **noise})
    loaded = examples_for(settings, load_tokenizer(settings))
    passed = [group for part in loaded.once(5) for group in part]
    assert len(passed) == len({group.prompt.index for group in passed}) == 18
    assert {(g.prompt.text, g.texts) for g in passed} == {(g.prompt.text, g.texts) for g in loaded.step(5, 18)}
    live = config({"name": "preference"}, "pair", data=settings.data.model_dump(mode="json"), run_dir=None)
    runs = [
        run_training(each.model_copy(update={"run_dir": str(tmp_path / f"run-{place}")})).run_dir
        for place, each in enumerate((live, settings))
    ]
    for old, new in zip(*map(records, runs), strict=True):
        assert new["loss"] == pytest.approx(old["loss"], abs=1e-6)


def test_a_run_does_not_go_on_with_other_data(config, tmp_path, data):
    first = config({"name": "preference"}, "pair", train__steps=1, run_dir=str(tmp_path / "run"))
    run_training(first)
    again = config({"name": "preference"}, "pair", train__steps=2, run_dir=str(tmp_path / "run"), resume=True)
    file = Path(data["pair"])
    rows = file.read_text()
    file.write_text(rows + json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(ConfigError, match="the data are not those that the run began with") as error:
        run_training(again)
    assert error.value.where == "key data.examples" and "held out" in error.value.rule
    file.write_text(rows)
    assert run_training(again).step == 2


def test_what_a_stream_has_left_out_is_said_at_the_end(config, tmp_path, capsys):
    rows = [{"prompt": f"say {word}", "chosen": "word " * (60 if word == "calm" else 1), "rejected": "no"}
            for word in WORDS]  # fmt: skip
    rows.append({"prompt": "say", "chosen": "no", "rejected": "no"})
    source = {"path": write(tmp_path / "rows.jsonl", rows), "stream": True}
    skipping = {"data__on_bad_row": "skip", "data__held_out": 0, "rollout__prompts": 4, "train__steps": 6}
    run_training(config({"name": "preference"}, "pair", data__examples=source, **skipping))
    told = " ".join(capsys.readouterr().err.split())
    assert "1 skipped (1 × the two answers are the same), 1 cut to 48 tokens" in told


def test_a_short_stream_with_fewer_rows_than_one_step_takes(config, data):
    source = {"path": data["pair"], "stream": True}
    with pytest.raises(ConfigError, match="fewer rows than one step"):
        run_training(config({"name": "preference"}, "pair", data__examples=source, rollout__prompts=30))


def test_undecided_annotators_teach_losses_of_probabilities_alone(config, tmp_path):
    rows = [{"prompt": f"say {w}", "chosen": "tea", "rejected": "no", "votes": [5, 5]} for w in WORDS]
    votes = write(tmp_path / "votes.jsonl", rows)
    for loss in ("soft", "psi_po", {"name": "mix", "losses": ["soft", "psi_po"], "weights": [1, 1]}):
        settings = config({"name": "preference", "loss": loss}, "pair", data__examples=votes)
        (group,) = examples_for(settings, load_tokenizer(settings)).step(0, 1)
        (example,) = settings.algorithm.examples([group])[0]
        assert example.values["prob_chosen"] == 0.5
    for loss in ("dpo", {"name": "mix", "losses": ["soft", "dpo"], "weights": [1, 1]}):
        settings = config({"name": "preference", "loss": loss}, "pair", data__examples=votes)
        with pytest.raises(DataError, match="both answers are equally good"):
            examples_for(settings, load_tokenizer(settings))


@pytest.fixture
def beside_prompts(config, tmp_path, model):
    """The raw config of an algorithm on pairs whose evaluations sample prompts as well."""

    def whole(algorithm, **changes):
        base, raw = tiny_config(tmp_path, model), config({"name": algorithm}, "pair", **changes).to_dict()
        raw |= {key: base[key] for key in ("scorer", "sampling", "engine")}
        raw["data"]["prompts"] = base["data"]["prompts"]
        return raw | {"evaluation": {"prompts": 3, "samples": 2}}

    return whole


def test_prompts_beside_a_data_set_are_sampled_in_evaluations(beside_prompts):
    result = run_training(parse_config(beside_prompts("preference")))
    evaluated = result.evaluations[12]
    assert len(evaluated.samples) == 6 and evaluated.metrics["kl/k3"] > 0
    assert "held_out/rewards/margins" in evaluated.metrics
    assert records(result.run_dir)[-1]["sync/version"] == 12


def test_kl_is_reported_where_the_objective_has_no_reference(beside_prompts, tmp_path):
    whole = beside_prompts("sft")
    without = run_training(parse_config({**whole, "run_dir": str(tmp_path / "without")}))
    assert "kl/k3" not in without.evaluations[12].metrics
    whole["evaluation"]["reference"] = True
    beside = run_training(parse_config({**whole, "run_dir": str(tmp_path / "beside")}))
    assert beside.evaluations[0].metrics["kl/k3"] == 0
    assert beside.evaluations[12].metrics["kl/k3"] > 0
    assert [r["loss"] for r in records(beside.run_dir)] == [r["loss"] for r in records(without.run_dir)]
    checkpoint = str(without.run_dir / "checkpoints/step-12")
    again = run_evaluation(parse_config({**whole, "evaluation": {"prompts": 3, "samples": 2}}), model=checkpoint)
    assert again.metrics["kl/k3"] == pytest.approx(beside.evaluations[12].metrics["kl/k3"], abs=1e-5)


def test_the_temperature_of_evaluations_is_not_that_of_the_objective(beside_prompts, tmp_path):
    losses = []
    for place, temperature in enumerate((1.0, 0.5)):
        whole = beside_prompts("preference", train__steps=2)
        whole |= {"sampling": {"max_tokens": 8, "temperature": temperature}, "run_dir": str(tmp_path / f"run-{place}")}
        result = run_training(parse_config(whole))
        losses.append([record["loss"] for record in records(result.run_dir)])
        assert ("kl/k3" in result.evaluations[2].metrics) == (temperature == 1.0)
    assert losses[0] == losses[1]


def test_a_reward_model_is_a_checkpoint_of_transformers(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_training(config({"name": "reward_model"}, "pair"))
    model = AutoModelForSequenceClassification.from_pretrained(result.run_dir / "checkpoints/step-12")
    assert model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(result.run_dir / "checkpoints/step-12")
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    found = run_evaluation(
        config({"name": "reward_model"}, "pair"), model=str(result.run_dir / "checkpoints/step-12")
    ).metrics
    assert found["held_out/rewards/accuracies"] == pytest.approx(
        result.evaluations[12].metrics["held_out/rewards/accuracies"]
    )


def test_a_reward_model_is_no_policy(config):
    trained = run_training(config({"name": "reward_model"}, "pair", train__steps=1)).run_dir / "checkpoints/step-1"
    with pytest.raises(ConfigError, match="reward model|scalar head|language model"):
        wrong = {"path": str(trained), "dtype": "float32"}
        run_training(config({"name": "preference"}, "pair", model=wrong, run_dir=str(trained / "run")))


def test_fewer_rows_than_one_step_takes(config):
    with pytest.raises(ConfigError, match="fewer rows than one step"):
        run_training(config({"name": "preference"}, "pair", rollout__prompts=20))


def test_answers_that_are_the_same_once_cut_stop_the_run_with_the_reason(config, tmp_path):
    rows = [{"prompt": "say", "chosen": "word " * 90 + "yes", "rejected": "word " * 90 + "no"}] * 12
    settings = config(
        {"name": "preference"}, "pair", data__examples=write(tmp_path / "alike.jsonl", rows), rollout__max_empty=2
    )
    with pytest.raises(TrainingStopped, match="2 steps in which no row left an example") as error:
        run_training(settings)
    assert "raise data.max_tokens" in error.value.remedy and "samples.jsonl" not in str(error.value)
    assert records(tmp_path / "run")[0]["pairs/same_answer"] == 6.0


def test_rows_beyond_the_models_context_are_cut(config, tmp_path):
    long = write(tmp_path / "long.jsonl", [{"prompt": "say", "completion": "word " * 2000}] * 8)
    settings = config({"name": "sft"}, "completion", data__examples=long, data__max_tokens=4096)
    (row,) = examples_for(settings, load_tokenizer(settings)).step(0, 1)
    assert len(row.prompt.token_ids) + len(row.completions[0].token_ids) == 512
    assert row.completions[0].finish_reason == "length"


def test_each_epoch_takes_every_row_once(config, tmp_path):
    settings = config({"name": "sft"}, "completion")
    examples = examples_for(settings, load_tokenizer(settings))
    for epoch in range(2):
        seen = [g.prompt.index for step in range(3) for g in examples.step(3 * epoch + step, 6)]
        assert len(set(seen)) == 18
    assert np.array_equal([g.prompt.index for g in examples.step(4, 6)], [g.prompt.index for g in examples.step(4, 6)])

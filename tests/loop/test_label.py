"""Labelling: shards that survive a kill, rows that are learned from, and what is left out."""

from __future__ import annotations

import json

import pytest

from rayalign.api import run_training
from rayalign.config import parse_config
from rayalign.errors import ConfigError, DataError, ScoreError
from rayalign.label import run_labelling
from tests.loop.conftest import records, timeless
from tests.parts import tiny_config, write_prompts

K4 = {"name": "label", "samples": 4, "shard": 3}


@pytest.fixture
def label(make):
    return lambda **changes: run_labelling(make(**{"algorithm": dict(K4), **changes}))


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_answers_and_scores_of_all_training_prompts(label):
    found = label()
    rows = lines(found.file)
    assert found.rows == len(rows) == 16 and not found.stopped
    assert all(len(row["completions"]) == len(row["scores"]) >= 2 for row in rows)
    shards = sorted((found.run_dir / "labels").iterdir())
    assert [len(lines(shard)) - 1 for shard in shards] == [3, 3, 3, 3, 3, 1]
    whole = [record for shard in shards for record in lines(shard)[1:]]
    scores = [record["scores"] for record in whole]
    best, mean = sum(map(max, scores)) / 16, sum(sum(each) / 4 for each in scores) / 16
    assert found.metrics["best_of_n/reward"] == pytest.approx(best)
    assert found.metrics["best_of_n/gain"] == pytest.approx(best - mean) and best > mean
    assert found.metrics["best_of_n/kl_bound"] == pytest.approx(0.6362943611)  # ln 4 − ¾
    assert [record["step"] for record in records(found.run_dir)] == [1, 2, 3, 4, 5, 6]
    assert (found.run_dir / "report.html").is_file()
    assert not (found.run_dir / "checkpoints").exists()


def test_the_first_line_of_a_shard_says_what_it_was_made_of(label, capsys):
    """A torn shard, and one of something else, are made again; whole ones are not."""
    first = label()
    shards = sorted((first.run_dir / "labels").iterdir())
    whole = [shard.read_text() for shard in shards]
    shards[1].write_text(whole[1][:-20])
    head, _, rest = whole[3].partition("\n")
    shards[3].write_text(json.dumps({**json.loads(head), "fingerprint": "another"}) + "\n" + rest)
    for number, line in ((2, "[1]\n"), (4, '{"scores": []}\n')):
        shards[number].write_text(whole[number].partition("\n")[0] + "\n" + line)
    kept = shards[0].stat().st_mtime_ns
    capsys.readouterr()
    again = label(resume=True)
    assert "in 6 shards; 2 are there already" in " ".join(capsys.readouterr().err.split())
    assert [shard.read_text() for shard in shards] == whole
    aside = [shards[number].with_name(f"{shards[number].name}.set-aside") for number in (1, 2, 3, 4)]
    assert aside[2].read_text().endswith(rest) and all(each.is_file() for each in aside)
    assert shards[0].stat().st_mtime_ns == kept
    assert lines(again.file) == lines(first.file)


def test_what_was_paid_for_is_not_paid_for_again(label, tmp_path):
    broken, log = tmp_path / "broken", tmp_path / "asked"
    broken.touch()
    fragile = {"name": "tests.stage_parts:Fragile", "log": str(log), "broken": str(broken), "after": 7}
    with pytest.raises(ConnectionError, match="the judge is gone"):
        label(scorer=fragile)
    assert len(list((tmp_path / "run/labels").glob("shard-*"))) == 2
    broken.unlink()
    found = label(scorer=fragile, resume=True)
    asked = [int(each) for each in log.read_text().split()]
    assert len(asked) == 16 + 1 and len(set(asked)) == 16  # the one of the shard in hand, again
    whole = run_labelling(_other(found, tmp_path / "whole"))
    assert lines(found.file) == lines(whole.file)
    assert [r["step"] for r in records(found.run_dir)] == [1, 2, 3, 4, 5, 6]


def test_a_hole_is_filled_and_what_stands_behind_it_is_not_forgotten(label):
    """A shard in the middle is gone: metrics and samples of those after it are not asked again, and stay."""
    first = label()
    before = {name: records(first.run_dir, name) for name in ("metrics", "samples")}
    (first.run_dir / "labels" / "shard-0001.jsonl").unlink()
    again = label(resume=True)
    steps = [record["step"] for record in records(again.run_dir)]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert records(again.run_dir, "samples") == before["samples"]
    assert [timeless(r) for r in records(again.run_dir)] == [timeless(r) for r in before["metrics"]]
    assert again.metrics == first.metrics


def test_prompts_that_the_judge_refused_are_counted_and_no_part_of_any_mean(label):
    found = label(scorer={"name": "tests.stage_parts:Refuses", "of": 3}, algorithm={**K4, "write": "best"})
    rows, whole = lines(found.file), [r for s in sorted((found.run_dir / "labels").iterdir()) for r in lines(s)[1:]]
    heard = [record["scores"] for record in whole if record["metrics"]["judge/refused"] < 1]
    assert 0 < len(heard) < len(whole) == 16 and found.rows == len(rows) == len(heard)
    best, mean = (sum(each) / len(heard) for each in (map(max, heard), (sum(each) / 4 for each in heard)))
    assert found.metrics["best_of_n/reward"] == pytest.approx(best)
    assert found.metrics["best_of_n/mean_reward"] == pytest.approx(mean)
    assert found.metrics["judge/refused"] == pytest.approx(1 - len(heard) / 16)  # of all
    left_out = json.loads((found.run_dir / "labels.json").read_text())["left_out"]
    assert left_out["prompts that the judge refused"] == 16 - len(heard)
    for record, shard in zip(records(found.run_dir), sorted((found.run_dir / "labels").iterdir()), strict=True):
        scored = [r["scores"] for r in lines(shard)[1:] if r["metrics"]["judge/refused"] < 1]
        if not scored:  # there is no mean of nothing
            assert not {"reward/mean", "reward/std", "best_of_n/reward"} & record.keys()
            continue
        assert record["reward/mean"] == pytest.approx(sum(map(sum, scored)) / sum(map(len, scored)))
        assert record["best_of_n/reward"] == pytest.approx(sum(map(max, scored)) / len(scored))


def test_a_judge_that_refused_everything_leaves_nothing(label):
    with pytest.raises(DataError, match="no row is left") as error:
        label(scorer={"name": "tests.stage_parts:Refuses", "of": 1})
    assert "16 prompts that the judge refused" in error.value.value


def test_neither_patience_nor_other_rows_make_the_answers_anew(label):
    first = label()
    times = {path: path.stat().st_mtime_ns for path in (first.run_dir / "labels").iterdir()}
    for changes in ({"scorer__deadline_s": 99}, {"algorithm__write": "best"}):
        again = label(resume=True, **changes)
        assert {path: path.stat().st_mtime_ns for path in (first.run_dir / "labels").iterdir()} == times
    assert all("completion" in row for row in lines(again.file))


def _other(found, run_dir):
    """The config of a labelling, for a folder of its own."""
    from rayalign.config import load_config

    return load_config(found.run_dir / "config.yaml", [f"run_dir={run_dir}"])


def test_a_signal_ends_after_the_shard(label, tmp_path):
    import signal

    stop = [{"name": "tests.parts:Stop", "step": 2, "at": "reward/mean", "signal": int(signal.SIGTERM)}]
    found = label(trackers=stop)
    assert found.stopped and len(list((tmp_path / "run/labels").glob("shard-*"))) == 2
    assert not (tmp_path / "run/labels.jsonl").exists()
    assert label(resume=True).rows == 16


def test_a_scorer_that_compares_gives_pairs_with_probabilities(label):
    found = label(scorer={"name": "tests.stage_parts:Compare"})
    rows = lines(found.file)
    assert len(rows) > 16 and all(0.5 < row["probability"] <= 1 for row in rows)
    shard = [r for s in sorted((found.run_dir / "labels").iterdir()) for r in lines(s)[1:]]
    places = {record["prompt"]: record for record in shard}
    for row in rows:
        record = places[row["prompt"]]
        i, j = (record["completions"].index(row[half]) for half in ("chosen", "rejected"))
        assert row["probability"] == pytest.approx(0.5 + (record["scores"][i] - record["scores"][j]) / 2)
    assert found.metrics["judge/asked"] == 16.0
    assert records(found.run_dir)[0]["judge/asked"] == 16.0


ALGORITHMS = {
    "reward_model": {"name": "reward_model"},
    "preference": {"name": "preference"},
    "soft": {"name": "preference", "loss": {"name": "soft"}},
    "ipo on ranked": {"name": "preference", "loss": {"name": "ipo"}, "pairs": "best_worst"},
    "sft": {"name": "sft"},
}


@pytest.mark.parametrize("chat", [True, False])
def test_what_is_written_is_learned_from(label, make, tmp_path, chat):
    compared = label(scorer={"name": "tests.stage_parts:Compare"}, data__chat_template=chat).file
    ranked = label(run_dir=str(tmp_path / "ranked"), data__chat_template=chat).file
    for place, (name, algorithm) in enumerate(ALGORITHMS.items()):
        file = ranked if name in ("sft", "ipo on ranked") else compared
        settings = tiny_config(tmp_path, tmp_path, train__steps=2, run_dir=str(tmp_path / f"learned-{place}"))
        settings["model"] = make().model.model_dump(mode="json")
        settings |= {"algorithm": algorithm, "data": {"examples": str(file), "chat_template": chat}}
        for key in ("scorer", "sampling", "engine"):
            settings.pop(key)
        result = run_training(parse_config(settings))
        assert result.step == 2 and all("loss" in record for record in records(result.run_dir)), name


def test_answers_that_are_there_are_labelled_without_an_engine(make, tmp_path):
    rows = [{"prompt": f"say {i}", "completions": ["a " * (i + 1), "b", f"c{'c' * i}"]} for i in range(10)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}", "chosen": "no", "rejected": "yes it is"}) + "\n" for i in range(10))
    )
    for name, count in (("answers", 3), ("pairs", 2)):
        settings = tiny_config(tmp_path, tmp_path, run_dir=str(tmp_path / name))
        settings["model"] = make().model.model_dump(mode="json")
        settings |= {
            "algorithm": {"name": "label", "samples": 0, "shard": 4},
            "data": {"examples": str(tmp_path / f"{name}.jsonl"), "held_out": 0.2},
            "scorer": {"name": "tests.stage_parts:Length"},
        }
        found = run_labelling(parse_config(settings))
        made = lines(found.file)
        assert found.rows == 8  # two are held out
        assert all(len(row["completions"]) == count for row in made)
        assert all(row["scores"] == [float(len(text)) for text in row["completions"]] for row in made)


def test_the_best_answers_alone(make, tmp_path):
    algorithm = {"name": "label", "samples": 3, "write": "best"}
    found = run_labelling(make(algorithm=algorithm))
    rows = lines(found.file)
    assert len(rows) == 16 and all({"prompt", "completion", "score"} <= row.keys() for row in rows)
    assert {key for row in rows for key in row} <= {"prompt", "completion", "score", "finish_reasons"}
    (shard,) = (found.run_dir / "labels").iterdir()
    assert [row["score"] for row in rows] == [max(record["scores"]) for record in lines(shard)[1:]]


def test_what_the_scorer_failed_on_is_in_no_row_and_in_no_mean(label, tmp_path, monkeypatch):
    """Only every other prompt has a score at all, and failures are added up, as in a run."""
    (tmp_path / "my_half_rewards.py").write_text(
        "def score(prompts, completions):\n    return [float('nan') if '1' in prompt else 5.0 for prompt in prompts]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i % 2}"}) + "\n" for i in range(6)))
    scorer = {"name": "python", "function": "my_half_rewards:score", "on_error": "skip"}
    with pytest.raises(DataError, match="no row is left"):
        label(scorer=scorer, data__prompts=str(path), data__held_out=0)
    said = json.loads((tmp_path / "run" / "labels.json").read_text())
    assert said["metrics"]["best_of_n/mean_reward"] == 5.0 and said["metrics"]["scores/failed"] == 12.0
    assert said["left_out"]["contested answers"] == 12


def test_conversations_stay_conversations(make, tmp_path):
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "?"},
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"prompt": [*talk[:2], {"role": "user", "content": f"{i}?"}]}) + "\n"
                            for i in range(6)))  # fmt: skip
    config = make(algorithm={"name": "label"}, data__prompts=str(path), data__held_out=0)
    rows = lines(run_labelling(config).file)
    assert rows[0]["prompt"] == [*talk[:2], {"role": "user", "content": "0?"}]


def test_any_config_that_samples_can_label(make):
    found = run_labelling(make(rollout__prompts=4))  # online_preference, 4 samples
    assert found.rows == 16
    assert (found.run_dir / "config.yaml").read_text().count("name: label") == 1


def test_what_cannot_be_labelled_is_refused(make, tmp_path):
    label = {"name": "label", "samples": 2}
    with pytest.raises(ConfigError, match="greedy samples of one prompt"):
        run_labelling(make(algorithm=label, sampling__temperature=0))
    with pytest.raises(DataError, match="no row is left to learn from") as error:
        run_labelling(make(algorithm=label, scorer={"name": "tests.parts:SameScore", "ties": 99}))
    assert "16 prompts whose answers are all as good" in error.value.value
    with pytest.raises(ScoreError, match="not a finite number"):
        run_labelling(
            make(
                algorithm=label,
                scorer={"name": "tests.parts:BrokenScore", "kind": "nan"},
                run_dir=str(tmp_path / "nan"),
            )
        )
    rows = tiny_config(tmp_path, tmp_path)
    rows |= {
        "algorithm": {"name": "label", "samples": 0},
        "data": {"examples": str(write_prompts(tmp_path / "a.jsonl"))},
    }
    del rows["scorer"]
    with pytest.raises(ConfigError, match="nothing says which answers are better"):
        run_labelling(parse_config(rows))
    with pytest.raises(ConfigError, match="one answer alone is neither ranked nor a pair"):
        make(algorithm={"name": "label", "samples": 1})


def test_the_model_judges_its_own_answers(make, tmp_path):
    """A judge that asks the policy's engine: nothing is trained, so that it holds the model as it is."""
    judge = {"name": "judge", "ask": {"name": "policy"}, "template": "positive", "min_mass": 0.0, "tie_margin": 0.0}
    config = make(
        algorithm={"name": "label", "samples": 3},
        scorer=judge,
        engine={"name": "transformers", "max_context": 512},
        data__held_out=0.7,
    )
    found = run_labelling(config)
    rows = lines(found.file)
    assert found.rows == len(rows) and 0 < len(rows) <= 6 * 3 and all(row["probability"] > 0.5 for row in rows)
    assert 0 <= found.metrics["judge/order_dependent"] <= 1
    base = {**tiny_config(tmp_path, tmp_path), "model": config.model.model_dump(mode="json"), "scorer": judge}
    base["engine"]["max_context"], base["data"]["examples"] = 512, str(found.file)
    with pytest.raises(ConfigError, match="no policy's engine is there to be asked"):
        run_labelling(parse_config({**base, "algorithm": "preference"}))
    del base["data"]["prompts"]
    with pytest.raises(ConfigError, match="there is no engine that could be asked"):
        parse_config({**base, "algorithm": {"name": "label", "samples": 0}})


def test_the_command_line_labels(make, tmp_path, monkeypatch, capsys):
    import sys

    import yaml

    from rayalign.cli import main

    file = tmp_path / "label.yaml"
    file.write_text(yaml.safe_dump(make(algorithm={"name": "label"}).to_dict()))
    for verb in ("label", "train"):
        monkeypatch.setattr(sys, "argv", ["rayalign", verb, str(file), f"run_dir={tmp_path / verb}"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        told = " ".join(capsys.readouterr().err.split())
        for part in ("labelling 16 prompts × 4 samples, in 1 shards", "shard 1/1 reward", "the best of n scores"):
            assert part in told
    assert lines(tmp_path / "label/labels.jsonl") == lines(tmp_path / "train/labels.jsonl")

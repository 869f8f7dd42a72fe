"""The opponent's answers: each prompt is asked once an iteration, equal ones are counted, shards are whole or not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rayalign.algorithms.spin import SPIN
from rayalign.engines.transformers import TransformersEngineConfig
from rayalign.errors import CheckpointError, TrainingStopped
from rayalign.selfplay.asking import Opponent
from rayalign.selfplay.generations import Generations
from rayalign.selfplay.shards import Answer, Shard
from rayalign.types import Completion, Group, Prompt, Sampling

COUNT = 12
SAMPLING = Sampling(6, stop_token_ids=(1,))


class Rows:
    """Prompts with one answer each, in memory."""

    rows, fingerprint = COUNT, "these rows"

    def __init__(self, answers):
        prompts = [Prompt(n, f"prompt {n}", (2, 30 + n, 3)) for n in range(COUNT)]
        completions = [Completion(str(n), ids, (), "stop", -1) for n, ids in enumerate(answers)]
        self.groups = [Group(p.text, p, (c,), ("",), (1.0,)) for p, c in zip(prompts, completions, strict=True)]

    def row(self, number):
        return self.groups[number]


@pytest.fixture(scope="module")
def engine(model):
    started = TransformersEngineConfig(name="transformers", max_context=32, max_running=4, dtype="float32").build(
        model=str(model), name="engine-0", cores=None, seed=0, trust_remote_code=False
    )
    yield started
    started.close()


class Counting:
    """An engine that counts what it is asked, and how much of it is open at a time."""

    def __init__(self, engine):
        self._engine, self.asked, self.open, self.most = engine, [], 0, 0

    def submit(self, requests):
        self.asked += [request.id for request in requests]
        self.open += len(requests)
        self.most = max(self.most, self.open)
        self._engine.submit(requests)

    def poll(self, timeout_s=1.0):
        done = self._engine.poll(timeout_s)
        self.open -= len(done)
        return done


@pytest.fixture
def play(engine, tmp_path):
    """Generations of some rows, and its engine."""

    def begin(answers=((5, 1),) * COUNT, *, folder="run", room=20, **settings):
        counting = Counting(engine)
        opponent = Opponent(counting, SAMPLING, lambda ids: " ".join(map(str, ids)), 0, room, False, open=5)
        spin = SPIN(**{"iterations": 3, "steps": 2, "shard": 5, **settings})
        said = []
        return Generations(Rows(answers), opponent, spin, tmp_path / folder, count=4, say=said.append), counting, said

    return begin


def answers_of(generations):
    generations.start(0)
    return [generations._answers[0][n] for n in range(COUNT)]


def test_each_prompt_is_asked_once_an_iteration_and_few_are_open(play):
    generations, engine, _ = play()
    for step in range(6):
        generations.start(step)
        assert len(generations.take(step).groups) == 4
    assert sorted(engine.asked) == sorted(f"generation-{t}/{n}" for t in range(3) for n in range(COUNT))
    assert engine.most <= 5
    again, engine, said = play()
    for step in range(4, 6):  # another process: all of it is there
        again.start(step)
    assert engine.asked == [] and "12 of them there already" in said[0]
    assert [again.samples_before(step) for step in range(7)] == [True, False] * 3 + [False]
    assert [generations.milestone(step) for step in range(7)] == [False, False, True, False, True, False, True]


def test_answers_stay_when_the_context_changes(play):
    """Only prompts that had no room are asked again, where the opponent still is what it was."""
    play()[0].start(0)
    again, engine, said = play(room=19)
    again.start(0)
    assert engine.asked == [] and not any("lost" in each for each in said)
    short, engine, _ = play(folder="short", room=2)
    with pytest.raises(TrainingStopped, match="no prompt was answered"):
        short.start(0)
    longer, engine, _ = play(folder="short")
    longer.start(0)
    assert len(longer.take(0).groups) == 4 and len(engine.asked) == COUNT


def test_answers_do_not_depend_on_shards_or_on_what_is_open(play):
    one = answers_of(play()[0])
    other = answers_of(play(folder="other", shard=12)[0])
    assert [tuple(a.token_ids) for a in one] == [tuple(a.token_ids) for a in other]


def test_files_say_what_they_are(play, tmp_path):
    generations, _, _ = play()
    generations.start(0)
    files = sorted((tmp_path / "run/generations/iteration-0").iterdir())
    assert [path.name for path in files] == [f"shard-000{n}.jsonl" for n in range(3)]
    head, *lines = (json.loads(line) for line in files[2].read_text().splitlines())
    assert (head["iteration"], head["version"], head["answers"], head["data"]) == (0, 0, 2, "these rows")
    assert [line["row"] for line in lines] == [10, 11] and {"prompt", "completion", "token_ids"} <= lines[0].keys()


def test_all_answers_equal_to_the_data_end_the_run(play):
    same = [tuple(answer.token_ids) for answer in answers_of(play()[0])]
    generations, _, _ = play(same, folder="same")
    with pytest.raises(TrainingStopped, match="the policy has arrived there") as error:
        generations.start(0)
    assert "12 of 12 answers" in str(error.value)


def test_some_answers_equal_to_the_data_are_counted(play):
    same = [tuple(answer.token_ids) for answer in answers_of(play()[0])]
    generations, _, _ = play([*same[:6], *((5, 1),) * 6], folder="some", mix_previous=False, steps=3)
    kept = dropped = 0
    for step in range(3):
        generations.start(step)
        rollout = generations.take(step)
        if not step:
            assert rollout.metrics()["generation/same_as_data"] == 0.5
        made, counts = SPIN(steps=1).examples(rollout.groups)
        kept, dropped = kept + len(made), dropped + counts["pairs/same_answer"]
    assert (kept, dropped) == (6, 6)


def test_the_datas_answer_comes_first(play):
    generations, _, _ = play()
    generations.start(0)
    answers = answers_of(generations)
    for group in generations.take(0).groups:
        assert group.scores == (1.0, 0.0) and group.completions[0].token_ids == (5, 1)
        assert group.completions[1].token_ids == tuple(answers[group.prompt.index].token_ids)
        assert group.texts[1] == " ".join(map(str, group.completions[1].token_ids))


def shard(tmp_path, **identity):
    return Shard(tmp_path / "shard-0000.jsonl", {"iteration": 0, **identity}, range(3))


ANSWERS = {n: Answer(n, (7, n), f"prompt {n}", f"line\nbreak\u2028{n}", "length", same=n == 1) for n in range(3)}


def test_a_shard_is_read_as_it_was_written(tmp_path):
    shard(tmp_path).finish(ANSWERS)
    found = shard(tmp_path).read()
    assert {n: replace(answer, token_ids=tuple(answer.token_ids)) for n, answer in found.items()} == ANSWERS


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_what_a_kill_leaves_of_a_part_is_read(tmp_path, cut):
    part = shard(tmp_path)
    part.begin([ANSWERS[0]])
    part.add(ANSWERS[2])
    part.add(ANSWERS[1])
    part.close()
    file = tmp_path / "shard-0000.part"
    file.write_bytes(file.read_bytes()[:-cut])
    again = shard(tmp_path)
    assert list(again.read()) == [0, 2] and not again.damage
    assert shard(tmp_path, seed=1).read() == {}  # another one's


def test_nothing_that_was_set_aside_is_written_over(tmp_path):
    for number in range(3):
        shard(tmp_path, seed=number).finish(ANSWERS)
        shard(tmp_path).set_aside()
    kept = {json.loads(each.read_text().split("\n")[0])["seed"] for each in tmp_path.glob("*.set-aside*")}
    assert kept == {0, 1, 2}


@pytest.mark.parametrize("damage", ["half", "no head", "other bytes", "empty"])
def test_damage_is_noticed(tmp_path, damage):
    shard(tmp_path).finish(ANSWERS)
    file = tmp_path / "shard-0000.jsonl"
    whole = file.read_bytes()
    file.write_bytes(
        {
            "half": whole[: len(whole) // 2],
            "no head": whole.split(b"\n", 1)[1],
            "other bytes": whole.replace(b"[7, 2]", b"[7, 3]"),
            "empty": b"",
        }[damage]
    )
    found = shard(tmp_path)
    assert found.read() == {} and "shard-0000.jsonl" in found.damage


def test_a_disk_that_takes_nothing_is_named(tmp_path):
    (tmp_path / "generations").write_text("a file where the folder should be")
    blocked = Shard(tmp_path / "generations/shard-0000.jsonl", {}, range(3))
    with pytest.raises(CheckpointError, match="could not be written; those that were are kept"):
        blocked.begin([])

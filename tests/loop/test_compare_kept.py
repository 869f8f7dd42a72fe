"""What a comparison has paid for is kept as it comes: answers of both sides, and what the scorer said of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from rayalign.compare import run_comparison
from rayalign.engines.transformers import TransformersEngine, TransformersEngineConfig
from rayalign.errors import ConfigError, RayalignError, ScoreError
from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.types import Group, Judgement, Request
from tests.parts import tiny_config
from tests.tiny_models import build_tiny_llama

PROMPTS, SAMPLES = 4, 4
ALL = PROMPTS * SAMPLES


class Counting(TransformersEngineConfig):
    """Notes each request that it is asked."""

    name: str
    asked: str

    def build(self, **arguments: Any) -> CountingEngine:
        engine = CountingEngine(self, **arguments)
        engine.asked = Path(self.asked)
        return engine


class CountingEngine(TransformersEngine):
    asked: Path

    def submit(self, requests: Sequence[Request]) -> None:
        with self.asked.open("a") as file:
            file.writelines(f"{request.id}\n" for request in requests)
        super().submit(requests)


class Costly(ScorerConfig):
    """Compares by tokens, a few pairs at a time, and notes each; it is gone after as many as a file beside says."""

    name: str
    asked: str
    above: int = 100

    def at_once(self, answers: int) -> int:
        return 2

    def start(self) -> ScoreFunction:
        seen, until = 0, int(Path(f"{self.asked}-until").read_text())

        def judge(groups: Sequence[Group]) -> list[Judgement]:
            nonlocal seen
            seen += len(groups)
            if seen > until:
                raise ScoreError("the judge is gone")
            with Path(self.asked).open("a") as file:
                file.writelines(f"{group.id}\n" for group in groups)
            return [self._judged(group) for group in groups]

        return judge

    def _judged(self, group: Group) -> Judgement:
        a, b = (sum(token > self.above for token in c.token_ids) / len(c.token_ids) for c in group.completions)
        prob = 0.5 + (a - b) / 2
        return Judgement((a, b), ((0.5, prob), (1 - prob, 0.5)), {"judge/ties": float(a == b)})


@pytest.fixture
def compared(model, tmp_path, monkeypatch):
    """Compares the tiny model with another, and gives what was found, or the error; the requests that were asked
    since, and the pairs that were judged since."""
    other = build_tiny_llama(tmp_path / "other", seed=3)
    monkeypatch.chdir(tmp_path)

    def build(out: str | None = "out", until: int = 10**9, **changes):
        files = tmp_path / "asked-engine", tmp_path / "asked-scorer"
        for file in files:
            file.write_text("")
        (tmp_path / "asked-scorer-until").write_text(str(until))
        here = "tests.loop.test_compare_kept"
        engine = {"name": f"{here}:Counting", "asked": str(files[0]), "max_context": 64}
        scorer = {"name": f"{here}:Costly", "asked": str(files[1])}
        evaluation = {"prompts": PROMPTS, "samples": SAMPLES}
        said = tiny_config(tmp_path, model, engine=engine, scorer=scorer, evaluation=evaluation)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            said[section] = {**said.get(section, {}), name: value} if name else value
        (tmp_path / "said.yaml").write_text(yaml.safe_dump(said))
        try:
            found = run_comparison(other, model, config=tmp_path / "said.yaml", out=tmp_path / out if out else None)
        except RayalignError as error:
            found = error
        return found, *(file.read_text().split() for file in files)

    return build


@pytest.fixture
def whole(compared):
    """A comparison that nothing cut short."""
    return compared(out="whole")[0]


def same(found, whole) -> bool:
    records = [json.loads(each.file.read_text()) for each in (found, whole)]
    return all(records[0][key] == records[1][key] for key in ("table", "pairs"))


def test_a_judge_that_fails_loses_no_answer_and_no_verdict(compared, whole, tmp_path):
    error, asked, judged = compared(until=6)
    assert isinstance(error, Exception) and "the judge is gone" in str(error)
    assert (len(asked), len(judged)) == (2 * ALL, 6)
    assert not (tmp_path / "out" / "comparison.json").exists()
    found, asked, judged = compared(until=6)
    assert isinstance(found, Exception) and not asked and len(judged) == 6
    found, asked, rest = compared()
    assert not asked and len(rest) == ALL - 12 and not set(rest) & set(judged)
    assert same(found, whole)


def test_what_a_kill_leaves_of_one_side_is_gone_on_with(compared, whole, tmp_path):
    """A file that is not whole, its last line cut: as a kill may leave it."""
    compared()
    out = tmp_path / "out"
    (out / "comparison.json").unlink()
    (out / "verdicts.jsonl").unlink()
    (out / "answers-b.jsonl").unlink()
    head, *lines = (out / "answers-a.jsonl").read_text().split("\n")
    (out / "answers-a.jsonl").unlink()
    (out / "answers-a.part").write_text("\n".join([head, *lines[:5], lines[5][:9]]))
    found, asked, judged = compared()
    assert [sum(f"-{side}/" in each for each in asked) for side in "ab"] == [ALL - 5, ALL]
    assert len(judged) == ALL and same(found, whole)


@pytest.mark.parametrize("change", [{"seed": 7}, {"sampling__temperature": 0.7}, {"data__held_out": 0.3}])
def test_answers_of_other_inputs_are_not_mixed_in(compared, tmp_path, capsys, change):
    compared(until=0)
    kept = (tmp_path / "out" / "answers-a.jsonl").read_bytes()
    found, asked, judged = compared(**change)
    assert len(asked) == 2 * ALL and len(judged) == ALL
    assert "set aside" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out" / "answers-a.jsonl.set-aside").read_bytes() == kept
    assert same(found, compared(out="anew", **change)[0])


def test_another_model_in_its_place_is_another_side(compared, tmp_path):
    compared(until=0)
    build_tiny_llama(tmp_path / "other", seed=4)
    _, asked, _ = compared()
    assert [sum(f"-{side}/" in each for each in asked) for side in "ab"] == [ALL, 0]


def test_another_scorer_judges_the_same_answers_anew(compared, tmp_path):
    """What is changed after a judge has failed is the judge."""
    compared(until=6)
    found, asked, judged = compared(scorer__above=50)
    assert not asked and len(judged) == ALL
    assert same(found, compared(out="anew", scorer__above=50)[0])


def test_without_a_folder_of_its_own_the_same_command_finds_what_it_left(compared, whole, tmp_path):
    compared(out=None, until=6)
    (left,) = Path("runs").iterdir()
    other, asked, _ = compared(out=None, seed=7)
    assert other.file.parent != left and len(asked) == 2 * ALL
    with FileLock(left / ".lock"):  # another process is at it
        apart, asked, _ = compared(out=None)
    assert apart.file.parent != left and len(asked) == 2 * ALL and same(apart, whole)
    found, asked, judged = compared(out=None)
    assert found.file.parent == left and not asked and len(judged) == ALL - 6 and same(found, whole)
    again, asked, _ = compared(out=None)  # one that is over is not gone on with
    assert again.file.parent != left and len(asked) == 2 * ALL


def test_a_folder_that_another_comparison_uses_is_refused(compared, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        error, asked, _ = compared()
    assert isinstance(error, ConfigError) and error.what == "another comparison is using this folder" and not asked

"""Parts that tests name by dotted path, and tiny configs. All of it runs through the real loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayalign.engines.transformers import TransformersEngine, TransformersEngineConfig
from rayalign.errors import EngineLost
from rayalign.record import Record
from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.types import Completion, Group


class SameScore(ScorerConfig):
    """Every answer is as good as every other: all pairs are ties, at prompts `until` and beyond not."""

    name: str
    ties: int = 10**9  # groups that are tied before answers begin to differ
    tied_again: int = 10**9  # groups, 4 of them, that are tied once more after so many

    def start(self) -> ScoreFunction:
        seen = 0

        def score(groups: Sequence[Group]) -> list[list[float]]:
            nonlocal seen
            rows = []
            for group in groups:
                seen += 1
                tied = seen <= self.ties or self.tied_again < seen <= self.tied_again + 4
                rows.append(
                    [0.0 if tied else -float(len(c.token_ids)) - 0.01 * i for i, c in enumerate(group.completions)]
                )
            return rows

        return score


class BrokenScore(ScorerConfig):
    """Gives what a scorer must not give."""

    name: str
    kind: str

    def start(self) -> ScoreFunction:
        rows = {"nan": lambda k: [float("nan")] * k, "short": lambda k: [0.0] * (k - 1)}[self.kind]
        return lambda groups: [rows(len(group.completions)) for group in groups]


class Raises(ScorerConfig):
    """Fails as code of users fails: while it starts, or when it is asked."""

    name: str
    when: str

    def start(self) -> ScoreFunction:
        if self.when == "start":
            raise FileNotFoundError("no lexicon here")
        return lambda groups: {}["missing"]


class FailingOnce(TransformersEngineConfig):
    """An engine whose first poll fails from within; what replaces it works."""

    name: str
    flag: str

    def build(self, **arguments: Any) -> FailingEngine:
        engine = FailingEngine(self, **arguments)
        engine.flag = Path(self.flag)
        return engine


class FailingEngine(TransformersEngine):
    flag: Path

    def poll(self, timeout_s: float = 1.0) -> list[Completion]:
        if not self.flag.exists():
            self.flag.touch()
            raise EngineLost("its state is unknown", where=self.name)
        return super().poll(timeout_s)


class Tokens(ScorerConfig):
    """Likes token ids above a limit: something that a tiny random model learns in a few steps."""

    name: str
    above: int = 100

    def start(self) -> ScoreFunction:
        def score(groups: Sequence[Group]) -> list[list[float]]:
            return [
                [sum(t > self.above for t in c.token_ids) / len(c.token_ids) for c in g.completions] for g in groups
            ]

        return score


class PowerCut(BaseException):
    """Nothing that the run could catch."""


class Stop(Record):
    """A tracker that ends the run while a step or an evaluation is written down: by an error, or by a signal."""

    name: str
    step: int
    at: str = "loss"  # a metric of the record that it ends
    signal: int | None = None

    def start(self, run_dir: Path, first_step: int) -> StopTracker:
        return StopTracker(self)


class StopTracker:
    def __init__(self, config: Stop):
        self.config = config

    def log(self, step: int, metrics: Any) -> None:
        if step != self.config.step or self.config.at not in metrics:
            return
        if self.config.signal is None:
            raise PowerCut("the power went out")
        import os

        os.kill(os.getpid(), self.config.signal)

    def close(self) -> None:
        pass


def write_prompts(path: Path, count: int = 20) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"write one sentence about film {i}"}) + "\n" for i in range(count)))
    return path


def tiny_config(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A whole config for a tiny model, everything in this process. `changes` are keys with __ for dots."""
    config: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"prompts": str(write_prompts(folder / "prompts.jsonl")), "held_out": 0.2},
        "algorithm": {"name": "online_preference", "samples": 4},
        "scorer": {"name": "tests.parts:Tokens"},
        "sampling": {"max_tokens": 8},
        "rollout": {"prompts": 4},
        "train": {"steps": 4},
        "optimizer": {"lr": 1e-3},
        "engine": {"name": "transformers", "max_context": 64},
        "learner": {"name": "torch", "threads": 1},
        "placement": {"name": "local"},
        "evaluation": {"prompts": 0},
        "checkpoint": {"every": 0},
        "trackers": [],
        "run_dir": str(folder / "run"),
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config

"""What a comparison has paid for, on disk as it comes: answers of both sides, and what the scorer said of them.

answers-a.jsonl, answers-b.jsonl   a line that says what they were made of, then an answer a line
verdicts.jsonl                     the same, of pairs of answers
*.part                             what has come of one of these so far; what a kill leaves of it is read again
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from rayalign.build import model_path
from rayalign.protocols import Engine, Scorer
from rayalign.reference_cache import fingerprint
from rayalign.rollouts import Collector, Progress, sample_seed
from rayalign.run_dir import FREE, decides, scorer_files
from rayalign.schema import Config
from rayalign.selfplay.asking import Work
from rayalign.selfplay.contest import Unscored
from rayalign.selfplay.shards import Answer, Shard, settings_of
from rayalign.types import Completion, Group, Prompt, Request, Sampling

Say = Callable[[str], None]
FREE_HERE = tuple(key for key in FREE if key != "url")  # nobody has said that another address is the same service


@dataclass(frozen=True)
class Judged:
    """What the scorer said of one pair of answers, see `types.Group`."""

    left_out: ClassVar[str] = ""
    row: int
    scores: tuple[float, ...] = ()
    preferences: tuple[tuple[float, ...], ...] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Judged:
        """See selfplay.shards.Line."""
        rows = said.get("preferences")
        preferences = None if rows is None else tuple(map(tuple, rows))
        return cls(said["row"], tuple(said["scores"]), preferences, said["metrics"])

    def compact(self) -> Judged:
        return self


class Answers:
    """The answers of one side.

    Args:
        name: "a" or "b".
        model: folder of the weights, or a hub id.
    """

    def __init__(self, name: str, model: str, prompts: Sequence[Prompt], sampling: Sampling, config: Config):
        self._name, self._prompts = name, prompts
        self._sampling, self._seed = [sampling] * config.evaluation.samples, config.seed
        asked = json.dumps([(prompt.index, prompt.token_ids) for prompt in prompts])
        self._identity = {
            "model": fingerprint(hashlib.blake2b(asked.encode(), digest_size=16).hexdigest(), model_path(model)),
            "sampling": settings_of(sampling),
            "samples": len(self._sampling),
            "seed": config.seed,
            "engine": config.engine.name,
            "dtype": config.engine.dtype or config.model.dtype,
        }

    def shard(self, folder: Path) -> Shard[Answer]:
        count = len(self._prompts) * len(self._sampling)
        return Shard(folder / f"answers-{self._name}.jsonl", self._identity, range(count))

    def asked(
        self, engine: Engine | None, work: Work[Answer], decode: Callable[..., str], progress: Progress | None = None
    ) -> tuple[Group, ...]:
        """A group for each prompt. Answers that are there are taken, others asked of the engine, and kept.

        Args:
            engine: None where all of them are there.
        """
        keeping = _Keeping(engine, work, self._prompts, len(self._sampling), decode)
        groups, _, _ = Collector(keeping, Unscored(), decode).collect(  # type: ignore[arg-type]
            self._prompts,
            self._sampling,
            lambda prompt, k: sample_seed(self._seed, "evaluation", prompt, k),
            label=f"compare-{self._name}",
            progress=progress,
        )
        return groups


class _Keeping:
    """An engine that is asked for what is not there yet, and whose answers are kept as they come."""

    def __init__(
        self,
        engine: Engine | None,
        work: Work[Answer],
        prompts: Sequence[Prompt],
        samples: int,
        decode: Callable[..., str],
    ):
        self._engine, self._work, self._prompts = engine, work, prompts
        self._samples, self._decode = samples, decode
        self._there: list[Completion] = []

    def submit(self, requests: Sequence[Request]) -> None:
        known = self._work.answers
        rows = [self._row(request.id) for request in requests]
        missing = [request for request, row in zip(requests, rows, strict=True) if row not in known]
        self._there += [
            replace(known[row].as_completion(0), request_id=request.id)
            for request, row in zip(requests, rows, strict=True)
            if row in known
        ]
        if missing:
            assert self._engine is not None, "what is missing is asked of an engine"
            self._engine.submit(missing)

    def poll(self, timeout_s: float = 1.0) -> list[Completion]:
        if self._there:
            there, self._there = self._there, []
            return there
        assert self._engine is not None, "what is missing is asked of an engine"
        finished = self._engine.poll(timeout_s)
        for each in finished:
            row, ids = self._row(each.request_id), each.token_ids
            prompt = self._prompts[row // self._samples].text
            self._work.add(Answer(row, ids, prompt, self._decode(ids), each.finish_reason, engine=each.engine))
        return finished

    def _row(self, request_id: str) -> int:
        place, sample = request_id.split("/")[-2:]
        return int(place) * self._samples + int(sample)


def said_of(folder: Path, pairs: Sequence[Group], config: Config, model: str) -> Shard[Judged]:
    """What was said of these pairs by this scorer.

    Args:
        config: with the scorer.
        model: that is lent to a scorer that asks the policy; of another it is not looked at.
    """
    texts = json.dumps([(pair.prompt.conversation, pair.texts, _tokens(pair)) for pair in pairs])
    known = scorer_files(config) | ({"lent": fingerprint("", model_path(model))} if config.lends_engine else {})
    identity = {
        "answers": hashlib.blake2b(texts.encode(), digest_size=16).hexdigest(),
        "scorer": decides(config.scorer.model_dump(mode="json"), FREE_HERE),  # type: ignore[union-attr]
        "files": known,
    }
    return Shard(folder / "verdicts.jsonl", identity, range(len(pairs)), Judged)


def _tokens(pair: Group) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in pair.completions]


def judged(scorer: Scorer, pairs: Sequence[Group], work: Work[Judged]) -> None:
    """Asks the scorer for what is not there yet, and keeps what it says as it comes."""
    waiting = {pairs[row].id: row for row in work.missing}
    scorer.submit([pairs[row] for row in work.missing])
    while waiting:
        for group in scorer.poll():
            said = Judged(waiting.pop(group.id), group.scores or (), group.preferences, dict(group.metrics))
            work.add(said)


def with_verdicts(pairs: Sequence[Group], work: Work[Judged]) -> tuple[Group, ...]:
    """The pairs with what was said of each."""
    found = [work.answers[row] for row in range(len(pairs))]
    return tuple(
        replace(pair, scores=said.scores, preferences=said.preferences, metrics=said.metrics)
        for pair, said in zip(pairs, found, strict=True)
    )


@contextmanager
def working(shard: Shard[Any], say: Say) -> Iterator[Work[Any]]:
    """A file while it is filled; what came of it is with the system however this is left."""
    with closing(Work([shard], say)) as work:
        yield work

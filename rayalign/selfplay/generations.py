"""The groups of a self-play run: the data's answer to a prompt, and the one that the opponent wrote.

Iteration t begins with the opponent, which is the policy as it is then, answering all training prompts. The answers
are written as they come (see `shards`), so that an iteration that was cut short goes on where it was, and a whole one
is read. The steps of the iteration walk over the pairs, and over those of iteration t−1 where these are mixed in.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from rayalign.data.files import set_aside
from rayalign.data.order import Passes
from rayalign.errors import TrainingStopped
from rayalign.rollouts import Progress
from rayalign.samples import Rollout
from rayalign.selfplay.asking import Opponent, Rate, Work
from rayalign.selfplay.shards import Answer, Shard, settings_of
from rayalign.types import Group, Metrics

FOLDER = "generations"


class Rows(Protocol):
    """What is answered, see `data.examples.ExampleSet`."""

    rows: int | None
    fingerprint: str

    def row(self, number: int) -> Group | None: ...


class Course(Protocol):
    """What is asked of a self-play algorithm, see `algorithms.spin.SPIN`."""

    mix_previous: bool
    shard: int

    @property
    def total_steps(self) -> int | None: ...
    def iteration(self, step: int) -> int: ...
    def first_step(self, iteration: int) -> int: ...
    def begins(self, step: int) -> bool: ...


@dataclass(frozen=True)
class Played(Rollout):
    """The pairs of one step.

    Attributes:
        more: what belongs to its record besides.
    """

    more: Mapping[str, float] = field(default_factory=dict)

    def metrics(self, *, first_use: bool = True) -> Metrics:
        lengths = [[len(group.completions[k].token_ids) for group in self.groups] for k in (0, 1)]
        names = ("completion/length_data", "completion/length_opponent")
        means = {name: sum(each) / len(each) for name, each in zip(names, lengths, strict=True) if each}
        shared = super().metrics(first_use=first_use) if self.groups else {"completion/length_mean": 0.0}
        return {**shared, **means, **self.more}


class Generations:
    """The methods of `rollouts.Rollouts`, for a run of self-play.

    Args:
        count: pairs of one training step.
        stopped: whether the run was asked to stop; answers that are there are kept.
        identity: what decides an answer besides row, iteration, seed and sampling: the model that the run began with.
    """

    progress: Progress | None

    def __init__(
        self,
        rows: Rows,
        opponent: Opponent,
        course: Course,
        run_dir: Path,
        *,
        count: int,
        identity: str = "",
        progress: Progress | None = None,
        say: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
    ):
        self._rows, self._opponent, self._course, self._count = rows, opponent, course, count
        self._folder, self._identity = run_dir / FOLDER, identity
        self.progress, self._say, self._asked = progress, say, stopped
        self._closed = False
        self._first: int | None = None  # the step that this process began with
        self._answers: dict[int, dict[int, Answer]] = {}  # of the iterations in use
        self._more: Metrics = {}  # of the sampling, for the record of an iteration's first step
        self._total = rows.rows or 0

    # What the loop asks.

    def samples_before(self, step: int) -> bool:
        return self._course.begins(step)

    def milestone(self, step: int) -> bool:
        """An iteration is over: what its opponent wrote was dear, and the next one's is to be kept as well."""
        return step > 0 and (self._course.begins(step) or step == self._course.total_steps)

    def fresh(self, step: int) -> bool:
        """Each step has pairs of its own."""
        return True

    def start(self, step: int) -> None:
        """Have the answers of the step's iteration, and of the one before where it is mixed in, at hand; sample those
        that are missing at the iteration's beginning, where the policy is the opponent."""
        if self._first is None:
            self._first = step
            self._forget_later(step)
        current = self._course.iteration(step)
        wanted = range(max(0, current - 1) if self._course.mix_previous else current, current + 1)
        self._answers = {t: known for t, known in self._answers.items() if t in wanted}
        for t in wanted:
            if t not in self._answers:
                sampled = t == current and self._course.begins(step)
                known = self._sample(t) if sampled else self._read(t)
                if known is not None:
                    self._answers[t] = known

    def ready(self, step: int) -> bool:
        """False where the run was asked to stop before all answers were there."""
        return self._course.iteration(step) in self._answers

    def take(self, step: int) -> Rollout:
        begun = time.perf_counter()
        t = self._course.iteration(step)
        mixed = self._course.mix_previous and t > 0
        passes = Passes((2 if mixed else 1) * self._total, seed=(self._opponent.seed, t))
        groups, missing, previous = [], 0, 0
        first = (step - self._course.first_step(t)) * self._count
        for slot in range(first, first + self._count):
            epoch, place = passes[slot]
            source, row = t - place // self._total, place % self._total
            group = self._pair(source, row, epoch)
            missing, previous = missing + (group is None), previous + (source < t and group is not None)
            groups += [group] if group is not None else []
        more = {"spin/iteration": float(t), "spin/previous": previous / max(1, len(groups)), **self._more}
        if missing:
            more["pairs/without_opponent"] = float(missing)
        self._more = {}
        return Played(step, None, tuple(groups), time.perf_counter() - begun, 0.0, more=more)

    def settle(self) -> None:
        pass

    def state(self) -> list[Rollout]:
        """Answers are in files of their own."""
        return []

    def restore(self, rollouts: Sequence[Rollout]) -> None:
        pass

    def close(self) -> None:
        self._closed = True

    # Answers.

    def _pair(self, iteration: int, row: int, epoch: int) -> Group | None:
        answer = self._answers.get(iteration, {}).get(row)
        if answer is None or answer.left_out:
            return None
        group = self._rows.row(row)
        if group is None:
            return None
        opponent = answer.as_completion(self._course.first_step(iteration))
        return replace(
            group,
            id=f"{iteration}/{epoch}/{row}",
            completions=(group.completions[0], opponent),
            texts=(group.texts[0], self._opponent.decode(opponent.token_ids)),
            scores=(1.0, 0.0),
        )

    def _shards(self, iteration: int) -> list[Shard]:
        folder, size = self._folder / f"iteration-{iteration}", self._course.shard
        identity = {
            "iteration": iteration,
            "version": self._course.first_step(iteration),
            "data": self._rows.fingerprint,
            "sampling": settings_of(self._opponent.sampling),
            "seed": self._opponent.seed,
            "model": self._identity,
        }
        starts = range(0, self._total, size)
        return [
            Shard(folder / f"shard-{n:04d}.jsonl", identity, range(first, min(first + size, self._total)))
            for n, first in enumerate(starts)
        ]

    def _read(self, iteration: int) -> dict[int, Answer]:
        """The answers of an iteration that has begun, or is over: its opponent is gone, and so is what is damaged."""
        found: dict[int, Answer] = {}
        for shard in self._shards(iteration):
            there = {row: answer.compact() for row, answer in shard.read().items()}
            found |= there
            if len(there) < len(shard.rows):
                lost = len(shard.rows) - len(there)
                why = shard.damage or f"{shard.path.name} is not there"
                self._say(f"iteration {iteration}: {lost} answers are lost, and their pairs are left out: {why}")
        return found

    def _sample(self, iteration: int) -> dict[int, Answer] | None:
        """All answers of the policy as it is now: those that are there, and the others. None when asked to stop."""
        work = Work(self._shards(iteration), self._say)
        rate = Rate(len(work.answers), self._total)
        self._say(f"iteration {iteration}: the opponent answers {self._total:,} prompts{rate.already()}")
        try:
            for answer in self._asking(iteration, work):
                work.add(answer)
                if self.progress is not None:
                    self.progress(len(work.answers), self._total)
                if rate.tells(len(work.answers), len(answer.token_ids)):
                    self._say(f"iteration {iteration}: {rate}")
        finally:
            work.close()
        if len(work.answers) < self._total:
            return None
        self._check(iteration, work.answers, rate)
        return work.answers

    def _asking(self, iteration: int, work: Work) -> Iterator[Answer]:
        """The missing answers as they come, in any order. Ends early when the run is to stop."""
        waiting, opponent = iter(work.missing), self._opponent
        open_rows: dict[str, tuple[int, Group]] = {}
        more = True
        while (more or open_rows) and not self._stops():
            asked = []
            while more and len(open_rows) < opponent.open:
                row = next(waiting, None)
                if row is None:
                    more = False
                    break
                group = self._rows.row(row)
                without = opponent.without(row, group)
                if without is not None or group is None:
                    yield without or Answer(row, (), left_out="a bad row")
                    continue
                request = opponent.request(iteration, row, group)
                open_rows[request.id] = (row, group)
                asked.append(request)
            if asked:
                opponent.engine.submit(asked)
            for completion in opponent.engine.poll() if open_rows else ():
                yield opponent.answer(*open_rows.pop(completion.request_id), completion)
        if open_rows and not self._closed:
            opponent.engine.abort(list(open_rows))

    def _stops(self) -> bool:
        return self._closed or self._asked()

    def _check(self, iteration: int, answers: Mapping[int, Answer], rate: Rate) -> None:
        """What the record of the iteration's first step says of its answers. Raises TrainingStopped when there is
        nothing to learn from them."""
        left_out = sum(bool(answer.left_out) for answer in answers.values())
        same = sum(answer.same for answer in answers.values())
        if left_out == len(answers):
            raise TrainingStopped(
                "no prompt was answered",
                where=f"iteration {iteration}",
                value=f"{left_out} prompts, the first left out for {answers[0].left_out}",
                rule=f"prompts of at most {self._opponent.room} tokens (engine.max_context − sampling.max_tokens)",
                remedy="raise engine.max_context, or lower sampling.max_tokens",
            )
        if same == len(answers) - left_out:
            raise TrainingStopped(
                "the opponent's answers are those of the data: the policy has arrived there",
                where=f"iteration {iteration}",
                value=f"{same} of {same} answers the same, token for token",
                rule="SPIN learns from the difference between the two",
                remedy="use the last checkpoint; or other data, or a higher sampling.temperature if that was low",
            )
        if left_out:
            why = Counter(answer.left_out for answer in answers.values() if answer.left_out)
            told = ", ".join(f"{count:,} for {reason}" for reason, count in why.items())
            self._say(f"iteration {iteration}: {left_out:,} prompts left out: {told}")
        self._more = {
            "generation/answers": float(len(answers) - left_out),
            "generation/left_out": float(left_out),
            "generation/same_as_data": same / (len(answers) - left_out),
            "rollout/tokens_per_s": rate.tokens_per_s,
            "time/rollout_s": rate.seconds,
        }

    def _forget_later(self, step: int) -> None:
        """Answers of iterations that begin after this step are of a policy that is trained anew."""
        for folder in sorted(self._folder.glob("iteration-*")):
            number = re.fullmatch(r"iteration-(\d+)", folder.name)
            if number and self._course.first_step(int(number[1])) > step:
                target = set_aside(folder)
                self._say(f"{folder.name} was answered by a later policy than the checkpoint's: moved to {target.name}")

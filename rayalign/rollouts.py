"""Prompts → scored groups, at a depth, and used again as often as the config says.

A set of rollouts is drawn at once and used for `resample_every` training steps, or for the whole run. The steps take
turns with its rollouts: one, used in each of the steps, or `at_once` of them. A set is sampled by the weights that
were current `depth` sets before it is used. So a run is reproducible at any depth: what was sampled by which version
is a matter of counting, never of timing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from rayalign.errors import EngineLost
from rayalign.protocols import Engine, Scorer
from rayalign.record import Record, Unfit
from rayalign.samples import Rollout, as_told
from rayalign.types import Completion, Group, Metrics, Prompt, Request, Sampling

Progress = Callable[[int, int], None]  # completions done, completions asked for
Often = Annotated[int, Field(ge=1)] | Literal["never"]


class RolloutConfig(Record):
    """How many prompts are sampled, and how fresh the samples are."""

    prompts: int = Field(8, ge=1, description="prompts of one training step; offline, rows of data")
    depth: int = Field(0, ge=0, le=8, description="0: on-policy; d: rollout t is sampled by the weights of step t−d")
    resample_every: Often = Field(
        1,
        description="training steps that use one set of samples; never: those of the initial policy are used for the "
        "whole run, as in offline learning",
    )
    at_once: int | None = Field(
        None,
        ge=1,
        description="rollouts of a set, of which the steps that use it take turns: with resample_every of them each "
        "step has prompts of its own. Default 1; with never one a step, as far as the prompts go, and then again",
    )
    monitor: int = Field(4, ge=0, description="prompts of a rollout on whose first completions KL is measured")
    max_empty: int = Field(5, ge=1, description="stop after so many rollouts in a row without a training example")

    @model_validator(mode="after")
    def _set_is_used(self) -> RolloutConfig:
        never = self.resample_every == "never"
        if never and self.depth:
            raise Unfit(
                "nothing is sampled again that could be sampled ahead",
                key="depth",
                rule="0 with resample_every: never",
                remedy="take depth out",
            )
        if not never and self.at_once is not None and self.at_once > self.resample_every:
            raise Unfit(
                "samples would be thrown away unused",
                key="at_once",
                rule=f"at most resample_every={self.resample_every}, the steps that use them",
                remedy=f"lower at_once to {self.resample_every}, or raise resample_every",
            )
        return self

    def set_size(self, prompts: int, steps: int) -> int:
        """Rollouts that are drawn at once, of so many training prompts, in a run of so many steps."""
        if self.resample_every != "never":
            return self.at_once or 1
        return min(self.at_once or steps, max(1, prompts // self.prompts), steps)

    def sets(self, steps: int) -> int:
        """How often a run of so many steps samples."""
        return 1 if self.resample_every == "never" else -(-steps // self.resample_every)


def sample_seed(run_seed: int, rollout: int | str, prompt: int, sample: int) -> int:
    """The seed of one completion: a function of what is asked for, never of who serves it."""
    text = f"{run_seed}/{rollout}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def searched(sampling: Sequence[Sampling]) -> bool:
    """Whether the K completions of a prompt come from one search."""
    search = sampling[0].search if sampling else None
    if search is not None and len(sampling) != search.beams:
        raise ValueError(f"{len(sampling)} completions are asked of a search that gives {search.beams}")
    return search is not None


def candidates_of(found: Completion) -> tuple[Completion, ...]:
    """What a search found as completions, the best score first."""
    return tuple(
        Completion(f"{found.request_id}/{k}", c.token_ids, c.logps, c.finish_reason, found.version, found.engine)
        for k, c in enumerate(found.candidates)
    )


def candidate_metrics(texts: Sequence[str]) -> Metrics:
    """How many candidates of a prompt differ once special tokens and outer spaces are gone, as a scorer sees them."""
    distinct = len({text.strip() for text in texts})
    return {"candidates/distinct": float(distinct), "candidates/same": float(len(texts) - distinct)}


@dataclass
class Collector:
    """Asks an engine for completions and a scorer for scores; a group is scored as soon as it is whole."""

    engine: Engine
    scorer: Scorer
    decode: Callable[[Sequence[int]], str]
    stop: bool = False

    def collect(
        self,
        prompts: Sequence[Prompt],
        sampling: Sequence[Sampling],
        seeds: Callable[[int, int], int],
        *,
        label: str,
        progress: Progress | None = None,
    ) -> tuple[tuple[Group, ...], float, float]:
        """K = len(sampling) completions for each prompt, scored, in the order of the prompts.

        Args:
            seeds: (prompt's index, sample's number) → seed.
            label: goes before request ids.
            progress: called with completions done and asked for.

        Returns:
            groups, seconds of sampling, seconds of scoring.
        """
        ids = [f"{label}/{place}" for place in range(len(prompts))]
        each = sampling[:1] if searched(sampling) else sampling  # one search gives all K
        requests = [
            Request(f"{ids[place]}/{k}", prompt.token_ids, one, seeds(prompt.index, k))
            for place, prompt in enumerate(prompts)
            for k, one in enumerate(each)
        ]
        started, scoring = time.perf_counter(), 0.0
        self.engine.submit(requests)
        done: dict[str, Completion] = {}
        groups: dict[str, Group] = {}
        while len(done) < len(requests):
            self._check()
            finished = self.engine.poll()
            done.update((c.request_id, c) for c in finished)
            begun = time.perf_counter()
            places = sorted({int(c.request_id.split("/")[-2]) for c in finished})
            self.scorer.submit([g for i in places if (g := self._group(ids[i], prompts[i], len(each), done))])
            groups.update((group.id, group) for group in self.scorer.poll(0.0))
            scoring += time.perf_counter() - begun
            if progress is not None and finished:
                progress(len(done) * len(sampling) // len(each), len(prompts) * len(sampling))
        sampled = time.perf_counter()
        while len(groups) < len(prompts):
            self._check()
            groups.update((group.id, group) for group in self.scorer.poll())
        ended = time.perf_counter()
        return tuple(groups[i] for i in ids), sampled - started - scoring, scoring + ended - sampled

    def _group(self, group_id: str, prompt: Prompt, count: int, done: dict[str, Completion]) -> Group | None:
        """The group, if its last completion is there."""
        completions = tuple(done[f"{group_id}/{k}"] for k in range(count) if f"{group_id}/{k}" in done)
        if len(completions) < count:
            return None
        if not completions[0].candidates:
            return Group(group_id, prompt, completions, tuple(self.decode(c.token_ids) for c in completions))
        completions = candidates_of(completions[0])
        texts = tuple(self.decode(c.token_ids) for c in completions)
        return Group(group_id, prompt, completions, texts, metrics=candidate_metrics(texts))

    def _check(self) -> None:
        """Waiting ends when the run does. Deadlines belong to the engines and scorers that are waited for."""
        if self.stop:
            raise EngineLost("sampling was stopped")


class Rollouts:
    """The queue of rollouts. `take(step)` gives the one that a training step uses.

    Args:
        sampling: one entry a completion (K), as the algorithm's `request` gives it.
        depth: sets that are sampled ahead of the one in use.
        resample_every: training steps that use one set, or "never".
        at_once: rollouts of a set.
        useful: whether a scored group leaves something to learn.
        refill: prompts of a rollout that may be sampled besides, in place of those that leave nothing.
    """

    def __init__(
        self,
        collector: Collector,
        prompts: Sequence[Prompt],
        sampling: Sequence[Sampling],
        *,
        seed: int,
        count: int,
        depth: int,
        resample_every: int | str,
        at_once: int = 1,
        progress: Progress | None = None,
        useful: Callable[[Group], bool] = lambda group: True,
        refill: int = 0,
    ):
        self._collector, self._prompts, self._sampling = collector, prompts, sampling
        self._useful, self._refill = useful, refill
        self._baselines = 0 if sampling[0].temperature == 0 else sum(one.temperature == 0 for one in sampling)
        self._seed, self._count, self._depth = seed, count, depth
        self._every, self._at_once = resample_every, at_once
        self.progress = progress
        self._open: dict[int, Future[Rollout]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if depth else None

    def samples_before(self, step: int) -> bool:
        """Whether sampling starts at the beginning of this step, so that fresh weights are needed."""
        return self._set(step)[1] == 0

    def fresh(self, step: int) -> bool:
        """Whether this step (counted from 0) is the first that uses its rollout."""
        return self._set(step)[1] < self._at_once

    def milestone(self, step: int) -> bool:
        """Whether, once so many steps are done, a checkpoint and an evaluation are due of themselves."""
        return False

    def ready(self, step: int) -> bool:
        """Whether the rollout of a step that was started can be taken, however long that takes."""
        return True

    def start(self, step: int) -> None:
        """Begin what is due at the beginning of a step, with the weights that the engine has now."""
        current = self._set(step)[0]
        for index in range(current * self._at_once, (current + self._depth + 1) * self._at_once):
            if index not in self._open:
                self._open[index] = self._submit(index)

    def take(self, step: int) -> Rollout:
        """The rollout of this step, once it is whole, with seeds of this step. What no later one can use is
        forgotten."""
        current, age = self._set(step)
        for old in [i for i in self._open if i < current * self._at_once]:
            del self._open[old]
        rollout = self._open[current * self._at_once + age % self._at_once].result()
        seeds = [sample_seed(self._seed, f"step-{step}", group.prompt.index, 0) for group in rollout.groups]
        groups = tuple(replace(group, seed=seed) for group, seed in zip(rollout.groups, seeds, strict=True))
        return replace(rollout, groups=groups, age=age)

    def _set(self, step: int) -> tuple[int, int]:
        """The number of the set that a step uses, and how many steps have used it before."""
        return (0, step) if self._every == "never" else divmod(step, self._every)

    def settle(self) -> None:
        """Wait until no request is open: an engine takes new weights only then."""
        for rollout in self._open.values():
            rollout.result()

    def state(self) -> list[Rollout]:
        """The rollouts that later steps may still use, for a checkpoint."""
        self.settle()
        return [rollout.result() for rollout in self._open.values()]

    def restore(self, rollouts: Sequence[Rollout]) -> None:
        if self._every == "never" and rollouts:
            self._at_once = len(rollouts)  # as many as the run began with, also when it is to have other steps now
        for rollout in rollouts:
            self._open[rollout.index] = Future()
            self._open[rollout.index].set_result(rollout)

    def close(self) -> None:
        self._collector.stop = True
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, index: int) -> Future[Rollout]:
        if self._thread is not None:
            return self._thread.submit(self._draw, index, self._collector.engine.version)
        future: Future[Rollout] = Future()
        future.set_result(self._draw(index, self._collector.engine.version))
        return future

    def _draw(self, index: int, version: int) -> Rollout:
        prompts = self._prompts_of(index)
        groups, rollout_s, score_s = self._collect(index, prompts, f"rollout-{index}")
        if not self._refill:
            return Rollout(index, version, groups, rollout_s, score_s, baselines=self._baselines)
        filled, sampled, besides = list(groups), list(groups), self._others(index, prompts)
        useless = [place for place, group in enumerate(filled) if not self._useful(group)]
        counts = {"groups/useless": float(len(useless)), "groups/refilled": 0.0, "groups/sampled_besides": 0.0}
        while useless and besides:
            taken, besides = besides[: len(useless)], besides[len(useless) :]
            counts["groups/sampled_besides"] += len(taken)
            more, sampling_s, scoring_s = self._collect(index, taken, f"rollout-{index}-refill-{len(besides)}")
            rollout_s, score_s, sampled = rollout_s + sampling_s, score_s + scoring_s, [*sampled, *more]
            for group in filter(self._useful, more):
                filled[useless.pop(0)] = group
                counts["groups/refilled"] += 1
        trained = {id(group) for group in filled}
        told = tuple(group if id(group) in trained else as_told(group) for group in sampled)
        return Rollout(index, version, tuple(filled), rollout_s, score_s, 0, counts, self._baselines, told)

    def _collect(self, index: int, prompts: Sequence[Prompt], label: str) -> tuple[tuple[Group, ...], float, float]:
        return self._collector.collect(
            prompts,
            self._sampling,
            lambda prompt, k: sample_seed(self._seed, index, prompt, k),
            label=label,
            progress=self.progress,
        )

    def _others(self, index: int, prompts: Sequence[Prompt]) -> list[Prompt]:
        """As many as may be sampled besides these, in an order of this rollout's own: a function of seed and index."""
        taken = {prompt.index for prompt in prompts}
        order = np.random.default_rng((self._seed, index, 1)).permutation(len(self._prompts))
        others = [self._prompts[i] for i in order if self._prompts[i].index not in taken]
        return others[: self._refill]

    def _prompts_of(self, index: int) -> list[Prompt]:
        """Prompts in a new random order every epoch: a function of seed and index alone. What does not fill a
        rollout at an epoch's end is left out of it, so that no rollout has a prompt twice."""
        epoch, place = divmod(index, len(self._prompts) // self._count)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._prompts))
        return [self._prompts[i] for i in order[place * self._count : (place + 1) * self._count]]

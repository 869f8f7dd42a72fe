"""One run: the parts that the training loop works with, and the loop's steps in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from rayalign.checkpoint import CheckpointConfig, Checkpoints, TrainerState, load_state
from rayalign.data.plain import PlainText
from rayalign.errors import TrainingStopped
from rayalign.evaluate import (
    EarlyStop,
    Evaluation,
    EvaluationConfig,
    evaluate,
    fitted_temperature,
    measure,
    measures,
    sequence_kl,
)
from rayalign.interrupt import Interrupt
from rayalign.metrics import FINAL, Recorder, timed
from rayalign.protocols import Algorithm, Roles, Stretch, UpdatePlan, columns_by_role
from rayalign.reading import Reading
from rayalign.record import Record
from rayalign.rollouts import Collector, Progress, RolloutConfig, Rollouts
from rayalign.samples import Rollout
from rayalign.selfplay import Contest, Generations
from rayalign.sync.handshake import push_weights
from rayalign.types import FAILED, Example, Group, Metrics, Prompt, Sampling


class TrainConfig(Record):
    """The length of the run, and the use of one rollout."""

    steps: int = Field(100, ge=1, description="training steps")
    epochs: int = Field(
        1, ge=1, description="passes over the samples of one step; of a data set more passes are more steps"
    )
    minibatches: int = Field(1, ge=1, description="optimiser steps in one pass")
    stop: EarlyStop | None = Field(
        None, description="end before the last step as evaluations get no better, with the best weights"
    )


@dataclass
class Run:
    """Everything that the loop works with, as `build.py` puts it together.

    Attributes:
        collector: none where nothing is sampled: an offline method that is evaluated on held-out rows only.
        held_out: prompts of the evaluations; none: no sampling there.
        held_out_rows: rows of data that are measured in evaluations.
        probe: token ids on which the first push is verified, later ones on fresh samples.
        max_gap: of a push, see `sync.handshake`.
        learner_temperature: at which learners take log-probs.
        turns: engines sleep while learners work, because they share GPUs.
        memory: peak memory of all processes, GiB; asked for while no request is open.
        say, advance: show one line; show the number of steps done and their metrics.
        evaluations: by step; on resume, those that were made before.
        final: of the weights that the run leaves, where they are not the last step's as they are.
        contest: of self-play: the policy against the model that it began with, and the data.
        texts: plain ones that the algorithm mixes into each update.
    """

    algorithm: Algorithm
    collector: Collector | None
    rollouts: Rollouts | Reading | Generations
    roles: Roles
    recorder: Recorder
    checkpoints: Checkpoints
    tokenizer: Any
    sampling: Sampling
    training: TrainConfig
    rollout: RolloutConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    seed: int
    held_out: Sequence[Prompt]
    held_out_rows: Sequence[Group]
    probe: Sequence[tuple[int, ...]]
    max_gap: float
    learner_temperature: float
    turns: bool
    memory: Callable[[], float]
    say: Callable[[str], None]
    advance: Callable[[int, Metrics], None]
    progress: Progress | None = None
    resume: bool = False
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    final: Evaluation | None = None
    interrupt: Interrupt = field(default_factory=Interrupt)
    contest: Contest | None = None
    texts: PlainText | None = None
    peak_gib: float = 0.0

    def restore(self) -> TrainerState:
        """Where the newest checkpoint stands, or the beginning."""
        path = self.checkpoints.newest() if self.resume else None
        if path is None:
            return TrainerState(0)
        state = load_state(path, self.roles)
        self.rollouts.restore(state.rollouts)
        return state

    def push(self, version: int, rollout: Rollout | None = None) -> Metrics:
        """Weights to the engine, verified on the newest samples; and the memory that all of it takes."""
        if self.collector is None:
            self.peak_gib = self.memory()
            return {}
        if self.turns:
            self.collector.engine.wake()
        sampled = rollout is not None and rollout.version is not None
        fresh = rollout.groups[: len(self.probe)] if sampled else ()
        probe = [g.prompt.token_ids + g.completions[0].token_ids for g in fresh] or self.probe
        synced = push_weights(
            self.roles.policy, self.collector.engine, version=version, probe=probe, max_gap=self.max_gap
        )
        self.peak_gib = self.memory()
        return synced

    def annotate(self, examples: list[Example], rollout: Rollout, step: int) -> tuple[list[Example], Metrics]:
        """The columns that the algorithm needs, and KL on completions that no score has selected, where they are new:
        on samples of older weights its estimators estimate something else, and k1 may well be negative. The seconds
        of each role are metrics, time/annotate_s/ROLE."""
        if self.turns and self.collector is not None:
            self.collector.engine.sleep()
        metrics: Metrics = {}
        for role, columns in columns_by_role(self.algorithm.needs).items():
            with timed(metrics, f"time/annotate_s/{role}"):
                examples = self.roles[role].annotate(examples, columns)
        unselected = [replace(g, completions=g.completions[:1]) for g in rollout.unselected[: self.rollout.monitor]]
        another = self.sampling.truncated or (self.sampling.temperature or 1.0) != self.learner_temperature
        sampled = rollout.version == step and not another
        if self.roles.reference is None or not sampled or not unselected:
            return examples, metrics
        with timed(metrics, "time/annotate_s/kl"):
            k1, k3 = np.array(sequence_kl(unselected, self.roles)).T
        return examples, {**metrics, "kl/k1": float(k1.mean()), "kl/k3": float(k3.mean())}

    def credit(self, examples: Sequence[Example], state: TrainerState) -> tuple[Sequence[Example], Metrics]:
        """What each example is worth, as the algorithm works it out of the whole step."""
        return self._algorithm(state).credit(examples)

    def update(self, examples: Sequence[Example], state: TrainerState) -> Metrics:
        """The optimiser steps of one training step: of the critic where there is one, and of the policy. What led to
        numbers that are not finite is kept for inspection."""
        algorithm, training, step, metrics = self._algorithm(state), self.training, state.step, {}
        stretch = algorithm.stretch(step)
        plan = UpdatePlan(step, training.epochs, training.minibatches, seed=self.seed + step, stretch=stretch)
        try:
            if algorithm.critic_algorithm is not None:
                with timed(metrics, "time/update_s/critic"):
                    found = self.roles.critic.update(examples, algorithm.critic_algorithm, plan)
                metrics |= {f"critic/{name}": value for name, value in found.items()}
            if step >= (first := algorithm.policy_from):
                if first and stretch is None:  # its warm-up begins with it, not with the critic's first steps
                    plan = replace(plan, stretch=Stretch(first, training.steps - first))
                if self.texts is not None:
                    plan = replace(plan, texts=self.texts.of_step(step))
                metrics |= algorithm.summarise(self.roles.policy.update(examples, algorithm, plan))
        except TrainingStopped as error:
            texts = [Example((text,)) for text in plan.texts]
            raise self.checkpoints.with_examples(error, step + 1, [*examples, *texts]) from error
        return metrics

    def _algorithm(self, state: TrainerState) -> Algorithm:
        """As it is in the step after this state."""
        return self.algorithm.at(state.step).adapted(state.adaptive, fresh=self.rollouts.fresh(state.step))

    def refresh(self, step: int) -> None:
        """The reference follows the policy when the algorithm says so."""
        decay = self.algorithm.refresh(step)
        if decay is not None and self.roles.reference is not None:
            self.roles.reference.refresh("policy", decay=decay)

    def needs_push(self, step: int) -> bool:
        """Whether the engine needs these weights: for the next rollout, or for an evaluation."""
        return self.rollouts.samples_before(step) or self._evaluation_due(step) or self.collector is None

    def record(self, step: int, metrics: Metrics, rollout: Rollout) -> None:
        """One record a step. What a rollout cost, and its samples, stand in the step that uses it first."""
        first_use = self.rollouts.fresh(step - 1)
        if first_use and rollout.version is not None:
            self.recorder.samples(step, rollout.version, rollout.drawn)
        metrics = {**metrics, **rollout.metrics(first_use=first_use), "memory/peak_gib": self.peak_gib}
        self.recorder.step(step, metrics)
        self.advance(step, metrics)

    def evaluate_when_due(self, step: int) -> None:
        if not self._evaluation_due(step) or step in self.evaluations:
            return
        found, contest = Evaluation(step, ()), self.contest
        if self.held_out:
            self.say(f"evaluating on {len(self.held_out)} held-out prompts × {self.evaluation.samples}")
            found = evaluate(
                self.collector,
                self.roles if contest is None else Roles(self.roles.policy),  # its reference is the policy of late
                self.held_out,
                self.sampling,
                samples=self.evaluation.samples,
                seed=self.seed,
                step=step,
                learner_temperature=self.learner_temperature,
                progress=self.progress,
                further=measures(self.algorithm, self.roles, self.held_out_rows)
                if contest is None
                else partial(contest.metrics, step, self.roles.policy),
            )
        elif contest is not None:
            self.say(f"evaluating on the prompts of {len(contest.prompts)} held-out rows")
            found = replace(found, metrics=contest.metrics(step, self.roles.policy, contest.sample(step)))
        if self.held_out_rows:
            self.say(f"measuring on {len(self.held_out_rows)} held-out rows")
            found = replace(found, metrics=found.metrics | measure(self.held_out_rows, self.algorithm, self.roles))
        self.evaluations[step] = found
        self.recorder.evaluation(step, found.record())

    def save_when_due(self, state: TrainerState) -> None:
        often = self.checkpoint.every > 0 and state.step % self.checkpoint.every == 0
        often = often or self.rollouts.milestone(state.step)
        if often or state.step == self.training.steps:  # before the last evaluation, which may take long
            self.save(state)

    def save(self, state: TrainerState) -> None:
        """Unless this step's checkpoint is there already."""
        if state.step not in self.checkpoints.steps():
            self.say(f"checkpoint {self.checkpoints.save(self._whole(state), self.roles, self.tokenizer)}")

    def _whole(self, state: TrainerState) -> TrainerState:
        return replace(state, rollouts=tuple(self.rollouts.state()))

    def after(self, state: TrainerState, metrics: Metrics, learned: bool) -> TrainerState:
        """The state one step on. A rollout without an example counts once, however often it is used, if another will
        be sampled."""
        fresh = self.rollouts.fresh(state.step) or self.rollout.resample_every == "never"
        adaptive = self._algorithm(state).adapt(state.adaptive, metrics) if learned else state.adaptive
        return TrainerState(state.step + 1, 0 if learned else state.empty_rollouts + fresh, adaptive=adaptive)

    def halted(self, step: int) -> bool:
        """Whether the run was asked to stop while the samples of this step came, before all of them were there."""
        return self.interrupt.requested and not self.rollouts.ready(step)

    def converged(self) -> bool:
        """Whether evaluations say that the run has ended."""
        return self.training.stop is not None and self.training.stop.due(self.evaluations)

    def keep_best(self, state: TrainerState) -> None:
        """A checkpoint of the best evaluation so far, which stays until there is a better one."""
        if self.training.stop is None or not self.evaluations:
            return
        best = self.training.stop.best(self.evaluations)
        if best == state.step > 0:
            self.save(state)
        self.checkpoints.spared = best

    def finish(self, state: TrainerState) -> None:
        """What is done once, after the last step: back to the best weights, and what is fitted on held-out rows. They
        are then what the last checkpoint exports, and are measured; a run that goes on goes on from the last step."""
        if state.step < self.training.steps and not self.converged():
            return
        chosen = self._load_best(state.step)
        fitted = fitted_temperature(self.held_out_rows, self.algorithm.for_held_out(), self.roles, self.say)
        if fitted is not None:
            self.roles.policy.temper(fitted)
        if chosen == state.step and fitted is None:
            return
        self.say(f"checkpoint {self.checkpoints.export(state.step, self.roles, self.tokenizer)}")
        found = self.evaluations.get(chosen, Evaluation(chosen, ()))
        metrics = found.metrics | ({} if fitted is None else {"fitted_temperature": fitted})
        if self.held_out_rows:
            metrics |= measure(self.held_out_rows, self.algorithm, self.roles)
        self.final = Evaluation(state.step, found.samples, metrics)
        self.recorder.evaluation(state.step, {FINAL: True, **self.final.record()})

    def _load_best(self, last: int) -> int:
        """Load the weights that the run leaves; their step."""
        stop = self.training.stop
        best = stop.best(self.evaluations) if stop is not None else None
        if stop is None or best in (None, last):
            return last
        folder = self.checkpoints.at(best)
        if folder is None:
            why = (
                "no step was better than the start" if best == 0 else f"of step {best}, the best, no checkpoint is left"
            )
            self.say(f"{why}, on {stop.metric}: the last weights are left as they are")
            return last
        load_state(folder, self.roles)
        self.say(f"step {best} was the best on {stop.metric}: its weights are what the run leaves")
        return best

    def check_learning(self, state: TrainerState, metrics: Metrics, rollout: Rollout) -> None:
        """Raises TrainingStopped when many rollouts in a row left nothing to learn from.

        Args:
            metrics, rollout: of the last of them, which tells why.
        """
        if state.empty_rollouts < self.rollout.max_empty:
            return
        if self.algorithm.request(self.sampling):
            what, (value, remedy) = "rollouts", self._why_nothing({**rollout.metrics(), **metrics}, rollout)
        else:
            what, value = "steps", "no row left an example: what */dropped and pairs/same_answer in metrics.jsonl count"
            remedy = "answers of a row have to differ, and one has to be better, also once they are cut: "
            remedy += "raise data.max_tokens where answers begin alike, or correct the data"
        raise TrainingStopped(
            f"no training example was left in many {what} in a row",
            where=f"step {state.step}",
            value=f"{state.empty_rollouts} {what} in which {value}",
            rule=f"rollout.max_empty={self.rollout.max_empty}",
            remedy=remedy,
        )

    def _why_nothing(self, metrics: Metrics, rollout: Rollout) -> tuple[str, str]:
        """What became of samples that left no example, and the remedy: most of them were left out one by one, or the
        scorer told them not apart."""
        drops = getattr(self.algorithm, "overlong", "keep") != "keep"
        cut = metrics.get("answers/overlong", 0.0) if drops else 0.0
        name = "answers/left_out" if "answers/left_out" in metrics else FAILED  # the latter where pairs are counted
        unscored = sum(count for key, count in metrics.items() if key.endswith(name))
        total = sum(len(group.completions) for group in rollout.groups)
        if 2 * (cut + unscored) < total:
            value = "no prompt left an example: completions were scored the same, or were the same; */dropped and "
            remedy = "look at samples.jsonl: the scorer has to tell answers apart; or raise sampling.temperature"
            return f"{value}pairs/same_answer in metrics.jsonl count them", remedy
        found = {}
        if cut:
            remedy = "raise sampling.max_tokens, or set algorithm.overlong=keep"
            found[f"{cut:.0f} were cut at max_tokens (answers/overlong)"] = remedy
        if unscored:
            remedy = "look at samples.jsonl: answers have to have a token, and the scorer has to score them"
            found[f"{unscored:.0f} had no score, or no token ({name})"] = remedy
        return f"no prompt left an example: of the last {total} answers {', '.join(found)}", "; ".join(found.values())

    def _evaluation_due(self, step: int) -> bool:
        if not (self.held_out or self.held_out_rows or self.contest is not None):
            return False
        if step == 0:
            return self.evaluation.before
        often = self.evaluation.every > 0 and step % self.evaluation.every == 0
        return often or step == self.training.steps or self.rollouts.milestone(step)

"""What the training loop asks of its parts. A pool satisfies the protocol of its members.

Nothing here names Ray, vLLM or DeepSpeed: the loop, and every algorithm, runs without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rayalign.types import AnyColumn, Batch, Column, Completion, Example, Group, Metrics, Request, Sampling, Terms
from rayalign.types import Sequence as Row


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a push, and where its bytes lie in the chunk."""

    name: str
    dtype: str  # torch's name without "torch.": "bfloat16", "float32"
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the chunk
    nbytes: int


@dataclass(frozen=True)
class Chunk:
    """Some tensors of a push as one flat array of bytes.

    `data` is a uint8 array, or a handle that resolves to one where it is used (an object-store
    reference, say): what moves the bytes is the business of the placement, not of learner or engine.
    """

    specs: tuple[TensorSpec, ...]
    data: Any


@dataclass(frozen=True)
class WeightPush:
    """All weights of a policy at one version, under their Hugging Face names, tied ones once.

    `manifest` (name → checksum of dtype, shape and bytes) is made by the learner from its parameters,
    apart from the chunks, so that a tensor that is corrupted or missing on the way is noticed.
    """

    version: int
    manifest: Mapping[str, str]
    chunks: tuple[Chunk, ...]


@runtime_checkable
class Engine(Protocol):
    """A stream of requests: what is submitted comes back by `poll` when it has finished, in any order."""

    version: int  # of the weights in use; 0 are those of the model's folder

    def submit(self, requests: Sequence[Request]) -> None: ...

    def poll(self, timeout_s: float = 1.0) -> list[Completion]:
        """What has finished since the last poll. Works (or waits) until something has, at most about
        `timeout_s`; an empty list when nothing is open or the time is up."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget these requests; ids that are not open are ignored."""

    def load(self, push: WeightPush) -> None:
        """Take these weights over, whole or with SyncMismatch. No request may be open. Each tensor as
        handed to the model's loader is checksummed against the push; prefix caches are dropped."""

    def logps(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Log-probs (float32, temperature 1) of tokens 1 … n−1 of each sequence, given those before:
        the probe that shows a failed load. No request may be open."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def memory_gib(self) -> float:
        """Peak memory so far, of this engine's process or of all processes of a pool."""

    def close(self) -> None: ...


class Scorer(Protocol):
    """A stream of groups: what is submitted comes back by `poll` with its scores, in any order."""

    def submit(self, groups: Sequence[Group]) -> None: ...

    def poll(self, timeout_s: float = 1.0) -> list[Group]: ...

    def memory_gib(self) -> float: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Stretch:
    """Some steps of a run in a row with a learning-rate schedule of their own, warm-up included.

    Attributes:
        first: its first step, counted from 0.
        steps: how many there are.
        lr_scale: factor of the rate.
    """

    first: int
    steps: int
    lr_scale: float = 1.0


@dataclass(frozen=True)
class UpdatePlan:
    """How one call of `update` walks over its examples.

    Attributes:
        step: the training step, which fixes the learning rate.
        epochs: passes over the examples.
        minibatches: optimiser steps in each pass.
        seed: of the order of the examples in each pass (no shuffle when there is one minibatch).
        stretch: whose schedule the learning rate follows; None: that of the whole run.
        texts: plain ones that the algorithm mixes in; each optimiser step has the same share of them.
    """

    step: int
    epochs: int = 1
    minibatches: int = 1
    seed: int = 0
    stretch: Stretch | None = None
    texts: Sequence[Row] = ()


class Learner(Protocol):
    """One role (policy, reference, …) on one process or on many ranks. A reference has no optimiser."""

    def annotate(self, examples: Sequence[Example], columns: Sequence[AnyColumn]) -> list[Example]:
        """The same examples, in the same order, with "role/column" filled in on each sequence."""

    def update(self, examples: Sequence[Example], algorithm: Algorithm, plan: UpdatePlan) -> Metrics:
        """Train on these examples. Gives loss, lr, grad_norm and the algorithm's own metrics, each
        averaged over the whole step. Raises TrainingStopped when loss or gradient is not finite."""

    def measure(self, examples: Sequence[Example], algorithm: Algorithm) -> Metrics:
        """Loss and metrics of these examples, as `update` would give them, without learning."""

    def logps(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """As `Engine.logps`, from the learner's weights."""

    def push(self, version: int) -> WeightPush: ...

    def refresh(self, source: str, *, decay: float = 0.0) -> None:
        """own ← decay·own + (1−decay)·source, where `source` names a role beside this one."""

    def export(self, path: Path) -> None:
        """Write the weights as a Hugging Face checkpoint (model and config) into an existing folder."""

    def save(self, path: Path) -> None:
        """Write all that `restore` needs to go on as if never stopped, into an existing folder."""

    def restore(self, path: Path) -> None: ...

    def temper(self, temperature: float) -> None:
        """From now on exports divide a classifier's logits by this: its last layer's weights. Training goes on as
        before."""

    def memory_gib(self) -> float: ...

    def close(self) -> None: ...


class Algorithm(Protocol):
    """A few verbs. Frozen and picklable: it is sent to the learners as it is."""

    rows: Sequence[str]  # kinds of data rows that it learns from (see data.examples); empty: from scored samples only
    network: str  # what the policy is: "causal", a language model; "score", one with a head for scores or classes
    needs: Sequence[tuple[str, AnyColumn]]  # (role, column) to annotate before the update
    columns: Sequence[AnyColumn]  # of the policy, with their gradient, in the loss
    # Numbers of the whole step that the loss needs (KTO's reference point, a batch's label mass): None, or a
    # function like `loss` that gives named sums of one micro-batch. The learner adds them up over micro-batches
    # and ranks in a pass of its own, without gradient, before the loss pass.
    statistics: Callable[[Batch, Mapping[str, Any]], Mapping[str, Any]] | None
    # A second stage of them, None or a function of (batch, columns, the sums so far): d-PM's gradient through its
    # batch's label mass, which is known only then.
    further_statistics: Callable[[Batch, Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] | None
    # Names of statistics whose means over rows (NAME/rows is their number) are averaged over steps → the decay of what
    # was. The learner keeps them.
    carries: Mapping[str, float]
    # Rows of an example that the loss looks at; those behind them are the statistics' alone, and no gradient goes
    # through them. None: all rows, for both.
    loss_rows: int | None

    def request(self, sampling: Sampling) -> Sequence[Sampling]:
        """What to sample for one prompt: one entry a completion. Empty for an offline method."""

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """Scored groups → training examples, and what was dropped, as metrics."""

    # Names of metrics of `update` that `enough` is asked about after each optimiser step, as sums over all ranks.
    watched: Sequence[str]
    # Names of metrics of `update` that are those of its first optimiser step alone, by the weights before the update.
    at_first: Sequence[str]
    # What trains the role critic on the same examples, before the policy's update; None: there is no such role.
    critic_algorithm: Algorithm | None
    policy_from: int  # the step, counted from 0, that trains the policy first; those before train the critic alone

    def useful(self, group: Group) -> bool:
        """Whether a scored group leaves anything to learn; another prompt may be sampled in place of one that does
        not."""

    def planned(self, updates: int) -> Algorithm:
        """The algorithm for updates of so many optimiser steps: of several, the later ones are by another policy than
        the samples."""

    def credit(self, examples: Sequence[Example]) -> tuple[Sequence[Example], Metrics]:
        """Annotated examples of the whole step → the same with advantages or weights, and what is to be said of
        them. Most pair losses need nothing. All that spans examples is worked out here, before they are dealt to
        ranks and micro-batches."""

    def enough(self, metrics: Metrics) -> bool:
        """Whether the update ends after this optimiser step, as the watched metrics say."""

    def adapted(self, state: Mapping[str, float], *, fresh: bool = True) -> Algorithm:
        """The algorithm with numbers that follow the training, as `adapt` gave them; {} before the first step. `fresh`:
        whether its step is the first that uses its samples."""

    def adapt(self, state: Mapping[str, float], metrics: Metrics) -> dict[str, float]:
        """These numbers after a step with these metrics; they are kept in checkpoints."""

    def dealt(self, examples: Sequence[Example], texts: Sequence[Row]) -> Sequence[Example]:
        """The examples of one optimiser step, over all ranks and micro-batches, as its loss wants them: with its plain
        texts, and with what depends on the others."""

    def denominator(self, examples: Sequence[Example]) -> float:
        """What the summed loss of all these examples is divided by, over all ranks and micro-batches. Where it is 0,
        nothing is to be learned from them."""

    def loss(self, batch: Batch, columns: Mapping[str, Any], statistics: Mapping[str, Any]) -> Terms:
        """`columns`: "policy/logps" [R, T] and what else `self.columns` names, with gradients; annotated ones
        are in `batch.columns`. `statistics`: the sums over the whole step; empty where none are asked for."""

    def summarise(self, metrics: Metrics) -> Metrics:
        """Metrics of all examples together, as `update` or `measure` gave them → those to be written down."""

    def refresh(self, step: int) -> float | None:
        """After this step (counted from 1): the decay with which the reference follows the policy,
        0.0 to replace it, None to leave it."""

    def at(self, step: int) -> Algorithm:
        """The algorithm as it is in this step (counted from 0): a setting may change in the course of a run."""

    def stretch(self, step: int) -> Stretch | None:
        """The part of the run that this step (counted from 0) belongs to, where each has a schedule of its own."""

    def for_held_out(self) -> Algorithm:
        """The algorithm whose loss and metrics are those of held-out rows."""


def needs_reference(algorithm: Algorithm) -> bool:
    """Whether a reference model stands beside the policy."""
    return any(role == "reference" for role, _ in algorithm.needs) or Column.REFERENCE_KL in algorithm.columns


def columns_by_role(needs: Iterable[tuple[str, AnyColumn]]) -> dict[str, list[AnyColumn]]:
    """What each role is asked for, in one pass."""
    found: dict[str, list[AnyColumn]] = {}
    for role, column in needs:
        found.setdefault(role, []).append(column)
    return found


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Roles:
    """The learners of a run by name. `reference` and `critic` are None where the algorithm needs none; `policy` where
    nothing is trained, as data are labelled."""

    policy: Learner | None
    reference: Learner | None = None
    critic: Learner | None = None

    def items(self) -> list[tuple[str, Learner]]:
        named = [("policy", self.policy), ("reference", self.reference), ("critic", self.critic)]
        return [(name, learner) for name, learner in named if learner is not None]

    def __getitem__(self, role: str) -> Learner:
        return dict(self.items())[role]

"""A plan as data: what would run where, what a step does, what memory it takes, and what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from rayalign.config.source import in_yaml
from rayalign.errors import RayalignError
from rayalign.plan.shapes import Shape
from rayalign.runtime.placement import Node, Place

GIB = 2**30


@dataclass(frozen=True)
class Bytes:
    """Bytes of one role in one place, at its worst moment.

    Attributes:
        activations: what a backward pass needs, and the logits.
        cache: keys and values.
        other: libraries, buffers of reductions, copies in transit.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, more: Bytes) -> Bytes:
        return Bytes(*(getattr(self, field.name) + getattr(more, field.name) for field in fields(self)))


@dataclass(frozen=True)
class RoleMemory:
    """One role of one actor.

    Attributes:
        actor: "engine", "learner", "scorer" or "driver"; there are `count` of them.
        device: on each GPU that the actor has. On a CPU node all of it is in `host`.
        host: in the node's memory, of one actor.
    """

    role: str
    actor: str
    count: int
    device: Bytes
    host: Bytes


@dataclass(frozen=True)
class Load:
    """How full one place gets: a GPU, or a node's memory. `needed` and `has` are GiB; `has` 0 is not known."""

    where: str
    holds: tuple[str, ...]
    needed: float
    has: float
    of_gpu: bool = False

    @property
    def fits(self) -> bool:
        return not self.has or self.needed <= self.has


@dataclass(frozen=True)
class EngineCache:
    """Keys and values of one engine.

    Attributes:
        token_bytes: of one token, all layers and all GPUs of the engine.
        gib: what the engine has for them, over all its GPUs.
        wanted_gib: engine.max_running requests of full length.
        requests: of full length that fit at once.
    """

    token_bytes: float
    gib: float
    wanted_gib: float
    requests: int


@dataclass(frozen=True)
class Rows:
    """Rows of data.examples: measured where model and data are at hand, else bounds.

    Attributes:
        mean, longest: tokens of a prompt with one of its answers.
        answer: tokens of the longest answer.
        scores: of the row with most answers, what its annotators said of each.
        training, held_out: number of rows; None where not known.
        source: in words.
        problem: why no run could read the rows.
        gold: tokens of the longest reference answer; 0 where none is learned from.
    """

    mean: float
    longest: int
    answer: int
    scores: tuple[float, ...]
    training: int | None
    held_out: int | None
    measured: bool
    source: str
    problem: Problem | None = None
    gold: int = 0


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts: measured on the prompt file where it could be read, else bounds.

    Attributes:
        training, held_out: number of prompts; None where not known.
        source: in words.
        problem: why no run could read the prompts.
        rows: what an offline algorithm learns from; None for one that learns from its samples.
        gold: as of rows.
    """

    mean: float
    longest: int
    training: int | None
    held_out: int | None
    skipped: int
    measured: bool
    source: str
    problem: Problem | None = None
    rows: Rows | None = None
    gold: int = 0


@dataclass(frozen=True)
class Batches:
    """From prompts, or rows of data, to optimiser steps. What depends on scores and on lengths is an upper bound.

    Attributes:
        prompts: of one step; offline, rows of data.
        samples: completions sampled for each of them; offline, its answers at most.
        completions: sampled in one step.
        examples: training examples of one step at most (pairs, for a preference loss).
        rows: sequences of one example.
        minibatch: examples of one optimiser step.
        share: examples of one optimiser step on the rank that has most.
        micro_batches: of one optimiser step on each rank, at full length.
        passes: over the training prompts or rows in the whole run; None where their number is not known.
        evaluation_completions, evaluation_rows: that one evaluation samples, and that it measures.
    """

    prompts: int
    samples: int
    completions: int
    examples: int
    rows: int
    minibatches: int
    epochs: int
    minibatch: int
    ranks: int
    share: int
    micro_batches: int
    optimizer_steps: int
    steps: int
    optimizer_steps_in_run: int
    rollouts: int
    passes: float | None
    pushes: int
    evaluations: int
    checkpoints: int
    evaluation_completions: int
    evaluation_rows: int = 0


@dataclass(frozen=True)
class Tokens:
    """Of one step, at most, with completions of full length."""

    prompt: float
    sampled: float
    trained: float
    reference: float
    before: float = 0.0  # by the policy, before it is trained
    critic: float = 0.0  # by the critic: its values, and its training


@dataclass(frozen=True)
class Micro:
    """The largest micro-batch: tokens with padding, longest sequence, completion positions."""

    tokens: int
    longest: int
    positions: int


@dataclass(frozen=True)
class Disk:
    """GiB: one checkpoint, and the most that stands on the disk while the next one is written."""

    checkpoint: float
    most: float


@dataclass(frozen=True)
class Problem:
    """Something that would not work. `remedy` is what to change."""

    what: str
    where: str = ""
    value: str = ""
    rule: str = ""
    remedy: str = ""

    @classmethod
    def of(cls, error: RayalignError) -> Problem:
        value = "" if error.value is None else str(error.value)
        return cls(error.what, error.where, value, error.rule, error.remedy)


@dataclass(frozen=True)
class Change:
    """A change under which everything fits.

    Attributes:
        settings: config keys with their new values.
        nodes: other nodes.
        loads: how full each place gets then.
    """

    settings: tuple[tuple[str, Any], ...] = ()
    nodes: tuple[Node, ...] = ()
    loads: tuple[Load, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """As the command line takes them."""
        return [f"{key}={in_yaml(value)}" for key, value in self.settings]


@dataclass(frozen=True)
class Fit:
    """What one config comes to on some nodes: all that a change of a key can change."""

    places: tuple[Place, ...]
    batches: Batches
    micro: Micro
    memory: tuple[RoleMemory, ...]
    cache: EngineCache | None
    loads: tuple[Load, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Attributes:
        differs: keys whose value is not the default → (value, default); a key without default has None.
        defaults: all other keys of the resolved config → value.
        nodes_from: in words, where the nodes are from.
        data_problems: what is wrong with prompts or rows, which no machine changes.
        advice: the nearest change of config or nodes under which it fits; None where it fits, or none was found.
    """

    model: str
    shape: Shape
    differs: dict[str, tuple[Any, Any]]
    defaults: dict[str, Any]
    nodes: tuple[Node, ...]
    nodes_from: str
    lengths: Lengths
    tokens: Tokens
    disk: Disk
    data_problems: tuple[Problem, ...]
    fit: Fit
    advice: Change | None

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> tuple[Problem, ...]:
        return self.data_problems + self.fit.problems

"""What all learners have in common: from examples to losses and numbers, on one rank or as one of many.

Every rank receives all examples of a step and works out orders, micro-batches and denominators alone; only
gradients, and one sum of the loss, cross between ranks. `update` and `annotate` of the Learner protocol are
the case of a single rank; a group of ranks calls `update_shard` and `annotate_shard` on each of its members
and merges with the functions below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayalign.collate import collate
from rayalign.errors import ConfigError
from rayalign.learners import following, steps
from rayalign.learners.columns import Teacher
from rayalign.learners.lora import Part, export_adapter
from rayalign.learners.merge import Annotation, StepMetrics, merge_annotations, merge_metrics, weighted_sum
from rayalign.learners.models import resolve_dtype
from rayalign.learners.network import Network
from rayalign.learners.settings import LearnerSettings, LearnerSpec, OptimizerConfig, learning_rate
from rayalign.memory import peak_gib
from rayalign.protocols import Algorithm, UpdatePlan, WeightPush
from rayalign.sharding import Plan, lengths_of, positions_of, split
from rayalign.types import AnyColumn, Batch, Column, Example, Metrics
from rayalign.types import Sequence as Row

__all__ = [
    "LearnerSettings",
    "LearnerSpec",
    "OptimizerConfig",
    "RankLearner",
    "learning_rate",
    "merge_annotations",
    "merge_metrics",
    "weighted_sum",
]


class RankLearner(ABC):
    """One role on one rank. Subclasses own the parameters: backward, step, gather, and state on disk.

    Args:
        spec: what to build.
        peers: the learners beside this one by role; it registers itself there, so that `refresh` finds them.
        rank, world_size: its place among the ranks that share this role.

    Attributes:
        part: what this role calls its own in the network: all of it, or an adapter.
        carried: moving averages of an algorithm's statistics, see `learners.statistics`.
        wrap_chunk: called on each finished chunk of a push, for instance to put it into an object store.
    """

    wrap_chunk: Callable[[np.ndarray], Any]
    policy: Network
    part: Part

    def __init__(self, spec: LearnerSpec, peers: dict[str, RankLearner], *, rank: int = 0, world_size: int = 1):
        self.spec, self.settings, self.peers = spec, spec.settings, peers
        self.rank, self.world_size = rank, world_size
        self.wrap_chunk = lambda array: array
        self.refreshed = False
        self.carried: dict[str, Tensor] = {}
        self.dtype = resolve_dtype(spec)
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        torch.manual_seed(spec.seed)
        peers[spec.role] = self

    # What a subclass owns.

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where batches go."""

    @abstractmethod
    def _forward(self, *args: Any) -> dict[str, Tensor]:
        """The network's forward pass, see Network.forward."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss` (over all ranks, its sum) to what this optimiser step has so far."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Clip and step; the global norm before clipping. Must not step where that norm is not finite."""

    @abstractmethod
    def total(self, value: float) -> float:
        """The sum of `value` over all ranks, the same on each."""

    @abstractmethod
    def total_tensor(self, value: Tensor) -> Tensor:
        """As `total`, of a tensor."""

    @abstractmethod
    def _whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        """While it lasts, these parameters are whole. Every rank of the role has to enter."""

    @abstractmethod
    def shares(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of each tensor that is this role's own."""

    @abstractmethod
    def shares_of(self, whole: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, in the order of `shares`, as this rank would hold them."""

    @abstractmethod
    def _blend(self, shares: Iterator[tuple[str, Tensor]], decay: float) -> None:
        """own ← decay·own + (1−decay)·shares, of a role with the same tensors; all ranks together."""

    @abstractmethod
    def save(self, path: Path) -> None: ...

    @abstractmethod
    def restore(self, path: Path) -> None: ...

    # Columns.

    def annotate(self, examples: Sequence[Example], columns: Sequence[AnyColumn]) -> list[Example]:
        """See protocols.Learner. For a role on a single rank."""
        return merge_annotations(examples, [self.annotate_shard(examples, columns)])

    def annotate_shard(self, examples: Sequence[Example], columns: Sequence[AnyColumn]) -> list[Annotation]:
        """ "role/column" arrays for this rank's share of the examples, by index. Every rank has to call it."""
        if not examples or not columns:
            return [(index, tuple({} for _ in example.sequences)) for index, example in enumerate(examples)]
        return self._annotate(examples, columns, self.spec.temperature, self.rank, self.world_size)

    @torch.no_grad()
    def _annotate(
        self, examples: Sequence[Example], columns: Sequence[AnyColumn], temperature: float, rank: int, ranks: int
    ) -> list[Annotation]:
        plan = self.split(examples, ranks)
        found: list[Annotation] = []
        for micro in plan[rank]:
            batch = self.batch(examples, micro, columns=False)
            tensors = {name: values.cpu().numpy() for name, values in self.columns(batch, columns, temperature).items()}
            for place, index in enumerate(micro):
                rows = []
                for offset, row in enumerate(examples[index].sequences):
                    at, count = place * batch.rows + offset, len(row.completion_ids)
                    rows.append(
                        {
                            f"{self.spec.role}/{name}": (
                                values[at] if name == Column.CLASSES.value else values[at, :count]
                            ).copy()
                            for name, values in tensors.items()
                        }
                    )
                found.append((index, tuple(rows)))
        return found

    def split(self, examples: Sequence[Example], ranks: int) -> Plan:
        """Which rank works on which examples, in which micro-batches."""
        settings = self.settings
        return split(
            lengths_of(examples), ranks=ranks, micro_batch_tokens=settings.micro_batch_tokens, packed=settings.packing
        )

    def positions(self, examples: Sequence[Example], plan: Plan) -> tuple[int, int]:
        """Tokens, and positions with padding, of all ranks' micro-batches."""
        return positions_of(lengths_of(examples), plan, packed=self.settings.packing)

    def columns(
        self, batch: Batch, columns: Sequence[AnyColumn], temperature: float | None = None
    ) -> dict[str, Tensor]:
        """One forward pass: column value → [R, T, …]. Default temperature: the rollouts'."""
        inputs = (batch.input_ids, batch.attention_mask, batch.labels, batch.positions, batch.mask)
        settings = (self.spec.temperature if temperature is None else temperature, self.settings.logprob_chunk)
        images = (self.policy.image_inputs(batch.images, self.device),) if batch.images else ()
        teacher = self._teacher(inputs, settings, images) if Column.REFERENCE_KL in columns else None
        return self._forward(*inputs, tuple(columns), *settings, teacher, False, *images)

    @torch.no_grad()
    def _teacher(self, inputs: tuple[Tensor, ...], settings: tuple[float, int], images: tuple[Any, ...]) -> Teacher:
        """The reference's part in the exact KL. Its head is held whole until the backward pass has used it: under
        ZeRO-3 too, where the chunks of ranks that differ in positions could not gather it together."""
        reference = self.peers.get("reference")
        if reference is None:
            raise ConfigError(
                f"the {self.spec.role} learner has no reference beside it",
                where=self.spec.role,
                value=Column.REFERENCE_KL.value,
                rule="a KL to the reference needs the reference model in the same process",
                remedy="build the reference role too, or take the KL out of the loss",
            )
        found = reference._forward(*inputs, (), *settings, None, True, *images)
        scale = reference.policy.head.scale
        return Teacher(found["hidden"], found["weight"], found.get("bias"), scale)

    def _check_peers(self) -> None:
        """Raises ConfigError when a language model beside this one has another vocabulary."""
        own = self.policy.vocabulary
        for role, peer in self.peers.items():
            other = peer.policy.vocabulary
            if None not in (own, other) and own != other:
                raise ConfigError(
                    f"{role} and {self.spec.role} have different vocabularies",
                    where=f"{self.spec.role}.model",
                    value=f"{own} tokens in {self.spec.model}, {other} in {peer.spec.model}",
                    rule="one vocabulary: log-probs of the same tokens are compared",
                    remedy="use models with the same tokenizer and embedding size",
                )

    def batch(self, examples: Sequence[Example], micro: Sequence[int], *, columns: bool = True) -> Batch:
        """A micro-batch on the device; for an empty one, the shortest example of the step with weight 0, which
        keeps the collective calls of all ranks in step."""
        if micro:
            chosen, weight = [examples[index] for index in micro], None
        else:
            whole = [example for example in examples if example.sequences]
            chosen, weight = [min(whole, key=lambda example: sum(map(len, example.sequences)))], [0.0]
        if not columns:
            chosen = [
                replace(example, values={}, sequences=tuple(replace(row, columns={}) for row in example.sequences))
                for example in chosen
            ]
        batch = collate(chosen, pad_id=self.spec.pad_id, weight=weight)
        if not batch.images and any(row.images for example in examples for row in example.sequences):
            batch = replace(batch, images=((),) * len(batch.input_ids))  # other ranks walk through more layers
        return _to(batch, self.device)

    def logps(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """See protocols.Learner. Every rank computes all of them, so that all walk together."""
        longer = [index for index, ids in enumerate(sequences) if len(ids) > 1]
        found = [np.zeros(0, dtype=np.float32) for _ in sequences]
        examples = [Example((Row(tuple(sequences[i][:1]), tuple(sequences[i][1:])),)) for i in longer]
        if examples:
            for index, (columns,) in self._annotate(examples, [Column.LOGPS], 1.0, 0, 1):
                found[longer[index]] = columns[f"{self.spec.role}/logps"]
        return found

    # Training.

    def update(self, examples: Sequence[Example], algorithm: Algorithm, plan: UpdatePlan) -> Metrics:
        """See protocols.Learner. For a role on a single rank."""
        return merge_metrics([self.update_shard(examples, algorithm, plan)])

    def update_shard(self, examples: Sequence[Example], algorithm: Algorithm, plan: UpdatePlan) -> StepMetrics:
        """Train on this rank's share of the examples; every rank has to call it with all of them. See steps.update."""
        return steps.update(self, examples, algorithm, plan)

    def measure(self, examples: Sequence[Example], algorithm: Algorithm) -> Metrics:
        """See protocols.Learner. For a role on a single rank."""
        return merge_metrics([self.measure_shard(examples, algorithm)])

    def measure_shard(self, examples: Sequence[Example], algorithm: Algorithm) -> StepMetrics:
        """This rank's part of the loss and metrics, as `update_shard` gives them, without learning. Every rank has
        to call it with all examples. See steps.measure."""
        return steps.measure(self, examples, algorithm)

    # Weights.

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and full tensors, adapters merged, one at a time, valid until the next is asked for.
        Every rank of the role has to walk through all of them."""
        for weight in self.part.weights():
            with self._whole(weight.parameters):
                yield weight.name, weight.value()

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As `full_tensors`, of what is this role's own: all weights as they are, or those of its adapter."""
        for name, parameter in self.part.own():
            with self._whole([parameter]):
                yield name, parameter.detach()

    @property
    def push_dtype(self) -> torch.dtype:
        """The dtype of pushed and exported weights."""
        return self.dtype

    def push(self, version: int, *, exact: bool = False) -> WeightPush:
        """See protocols.Learner. Ranks other than the first walk along and give an empty push.

        Args:
            exact: each tensor in the dtype that it is held in, for a role elsewhere that follows this one.
        """
        from rayalign.sync.flat import pack

        if self.rank:
            for _ in self.full_tensors():
                pass
            return WeightPush(version, {}, ())
        dtype = None if exact else self.push_dtype
        return pack(self.full_tensors(), version, dtype=dtype, wrap=self.wrap_chunk)

    def refresh(self, source: str, *, decay: float = 0.0) -> None:
        """own ← decay·own + (1−decay)·source. See following.refresh."""
        following.refresh(self, source, decay)

    def take(self, push: WeightPush, *, decay: float = 0.0) -> None:
        """own ← decay·own + (1−decay)·what was pushed. See following.take."""
        following.take(self, push, decay)

    def export(self, path: Path) -> None:
        """See protocols.Learner. The first rank writes."""
        path, lora = Path(path), self.spec.lora
        if lora is None or lora.merge:
            state = self._gathered(self.full_tensors(), self.push_dtype)
            if self.rank == 0:
                self.policy.export(path, state, self.push_dtype)
        if lora is not None:
            state = self._gathered(self.own_tensors())
            if self.rank == 0:
                export_adapter(path, self.policy, self.spec, state)

    def _gathered(self, named: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies in host memory on the first rank; nothing on others, which walk along."""
        state = {}
        for name, tensor in named:
            if self.rank == 0:
                finished = self.policy.finished(name, tensor.detach())
                state[name] = finished.to("cpu", dtype or tensor.dtype, copy=True)
        return state

    def temper(self, temperature: float) -> None:
        """See protocols.Learner."""
        self.policy.temperature = temperature

    def memory_gib(self) -> float:
        """Peak memory of this process: all roles in it."""
        return peak_gib()

    def close(self) -> None:
        """Forget the weights. The learner cannot be used any more."""
        self.peers.pop(self.spec.role, None)


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    nested = {
        name: {key: tensor.to(device) for key, tensor in getattr(batch, name).items()} for name in ("columns", "values")
    }
    return replace(batch, **moved, **nested)

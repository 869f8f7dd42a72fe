"""Bytes of weights, gradients and optimiser that a rank holds, as the learners really hold them.

The stages are those of ZeRO (Rajbhandari et al. 2020): with Ψ parameters and N ranks, mixed precision and Adam,
2Ψ + 2Ψ + 12Ψ bytes without sharding, 12Ψ/N with stage 1, gradients shared out from stage 2 and parameters with
stage 3. What is said here was counted on the live tensors of DeepSpeed 0.19 under each stage, in both dtypes, with
one rank and two and several micro-batches, and a test counts them again. It differs from the paper in these points:

- gradients are accumulated in float32 (4Ψ, not 2Ψ);
- stage 0 in bfloat16 runs as stage 1, which keeps whole gradients twice: bfloat16, and the float32 sum;
- in float32 stages 1 to 3 keep a second copy of the weights as master;
- buckets of at most 200M parameters, four to eight bytes each, are the work space of a reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayalign.plan.records import Bytes
from rayalign.plan.shapes import Shape

SUB_GROUP = 1_000_000_000  # parameters that ZeRO-3 steps at a time (sub_group_size)
LIVE = 1_000_000_000  # parameters that ZeRO-3 may keep gathered (stage3_max_live_parameters)
ALLREDUCE = 500_000_000  # parameters that stage 0 in float32 reduces at a time


@dataclass(frozen=True)
class Zero:
    """What decides who holds what. `bucket` is in parameters; `width` is bytes of a weight."""

    stage: int
    ranks: int
    width: int
    offload: bool
    bucket: int


@dataclass(frozen=True)
class State:
    """Of one rank: what it holds on its device and in host memory, and the work space of a reduction or a step.
    That is added to activations: a large model reduces its first bucket while most of them are still there, and
    the memory that a small one has freed by then stays with the allocator (measured)."""

    device: Bytes
    host: Bytes
    work: float


def trained_state(shape: Shape, zero: Zero) -> State:
    """A role with an optimiser. See the module."""
    size, share, bucket = shape.parameters, shape.parameters / zero.ranks, min(zero.bucket, shape.parameters)
    if zero.stage == 0:  # float32 only: weights, gradients, two moments, no master
        work = 4.0 * min(ALLREDUCE, size)
        return State(Bytes(weights=4.0 * size, gradients=4.0 * size, optimizer=8.0 * size), Bytes(), work)
    optimizer = 12.0 * share  # float32 master and two moments
    if zero.stage == 3:
        gathered = gathered_bytes(shape, zero)
        held = 4.0 * share if not zero.offload else 0.0
        device = Bytes(weights=zero.width * share, gradients=held, other=4.0 * bucket + gathered)
        host = Bytes(gradients=8.0 * share, optimizer=optimizer) if zero.offload else Bytes()
        step = 0.0 if zero.offload else 4.0 * min(SUB_GROUP, share)
        return State(_placed(device, optimizer, zero), host, max(8.0 * bucket, step))
    gradients, work = _gradients(size, share, bucket, zero)
    device = _placed(Bytes(weights=float(zero.width * size), gradients=gradients), optimizer, zero)
    if not zero.offload:
        return State(device, Bytes(), work)
    staging = (2.0 if zero.width == 2 else 8.0 if zero.stage == 2 else 4.0) * share
    host = Bytes(gradients=4.0 * share + staging, optimizer=optimizer, other=2.0 * zero.width * shape.largest)
    return State(device, host, max(work, 4.0 * size) if zero.width == 4 and zero.ranks > 1 else work)


def _gradients(size: float, share: float, bucket: float, zero: Zero) -> tuple[float, float]:
    """(held, work space) of stages 1 and 2."""
    if zero.stage == 1 and zero.width == 2 and not zero.offload:
        return 6.0 * size, 2.0 * size if zero.ranks > 1 else 0.0
    if zero.stage == 1 and zero.width == 2:
        return 4.0 * size + 4.0 * share, 4.0 * bucket
    if zero.stage == 1:
        return 4.0 * size, max(4.0 * share, 4.0 * bucket)
    if zero.width == 2:
        return 4.0 * share, 8.0 * bucket
    return (0.0, 4.0 * bucket) if zero.offload else (4.0 * share, 4.0 * share + 4.0 * bucket)


def _placed(device: Bytes, optimizer: float, zero: Zero) -> Bytes:
    return device if zero.offload else device + Bytes(optimizer=optimizer)


def gathered_bytes(shape: Shape, zero: Zero) -> float:
    """Parameters that ZeRO-3 keeps gathered between their uses, and half as much again on their way."""
    return 1.5 * zero.width * min(LIVE, shape.parameters) if zero.stage == 3 and zero.ranks > 1 else 0.0


def frozen_state(shape: Shape, zero: Zero, *, averaged: bool) -> State:
    """A role without optimiser: whole on each rank, but for stage 3.

    Args:
        averaged: it is a moving average, which in bfloat16 has a float32 master of the same share.
    """
    held = shape.parameters / (zero.ranks if zero.stage == 3 else 1)
    master = 4.0 * held if averaged and zero.width == 2 else 0.0
    return State(Bytes(weights=zero.width * held, optimizer=master, other=gathered_bytes(shape, zero)), Bytes(), 0.0)


def torch_state(shape: Shape, *, trained: bool, autocast: bool) -> State:
    """The torch learner: float32 weights, gradients and two moments; under autocast the weights that a pass
    uses are cast once and kept until its end."""
    size = float(shape.parameters)
    cast = 2 * size if autocast else 0.0
    if not trained:
        return State(Bytes(weights=4 * size), Bytes(), cast)
    return State(Bytes(weights=4 * size, gradients=4 * size, optimizer=8 * size, other=cast), Bytes(), 0.0)

"""Memory of learner ranks: their roles, the largest micro-batch, loading, and the host's part of a push."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rayalign.build import has_cached_reference
from rayalign.plan.activations import hidden_bytes, kl_bytes, layer_bytes, logit_bytes, saved_bytes, working_bytes
from rayalign.plan.records import GIB, Bytes, Micro, RoleMemory
from rayalign.plan.roles import (
    PlannedRole,
    adapter_parameters,
    compute_width,
    largest_bytes,
    planned_roles,
    reference_update,
)
from rayalign.plan.shapes import Shape
from rayalign.protocols import needs_reference
from rayalign.schema import Config
from rayalign.types import Column

__all__ = ["adapter_parameters", "checkpoint_bytes", "compute_width", "learner_memory", "push_bytes"]

# Resident before there is a model, measured on Linux with the locked CPU versions (tests/bench/plan_memory.py).
BASE = 0.6 * GIB  # Python, torch, transformers, DeepSpeed and Ray
ALLOCATOR = 0.05  # of what is held: what an allocator keeps beyond what is asked for
GPU_CONTEXT = 1.0 * GIB  # CUDA context, nccl and kernel libraries: a usual size, not measured here


def learner_memory(
    config: Config, shape: Shape, micro: Micro, *, on_gpu: bool, micros: Mapping[str, Micro] | None = None
) -> tuple[RoleMemory, ...]:
    """The roles of one rank, and its process, for each group of learner actors. The roles of a group work one after
    the other in the same space: that of the one that needs most is counted, with that role.

    Args:
        micros: the largest micro-batch of roles for which it is another one.
    """
    found: list[RoleMemory] = []
    for actor, roles in planned_roles(config, shape).items():
        work = {role.spec.role: _work(config, role, (micros or {}).get(role.spec.role, micro)) for role in roles}
        if actor == "learner":  # frozen roles work before the policy does, and take less
            work |= {role.spec.role: Bytes() for role in roles if not role.spec.trainable}
        busiest = max(work, key=lambda name: work[name].total)
        kept = {role.spec.role: role.state.device for role in roles}
        kept[busiest] += work[busiest]
        for role in roles:
            name = role.spec.role
            head = Bytes(other=_head_copy(config, role)) if name == "reference" else Bytes()
            found.append(RoleMemory(name, actor, role.ranks, kept[name] + head, role.state.host))
        process = _process(config, roles, sum(each.total for each in kept.values()), on_gpu=on_gpu)
        found.append(RoleMemory("process", actor, roles[0].ranks, *process))
    return tuple(found) if on_gpu else tuple(_in_host(each) for each in found)


def _work(config: Config, role: PlannedRole, micro: Micro) -> Bytes:
    """Beside what a role holds: activations and buffers of a training step, or of a pass of a frozen role."""
    width, autocast = compute_width(config)
    if role.spec.trainable:
        return Bytes(
            activations=_activations(config, role, micro, width=width, autocast=autocast), other=role.state.work
        )
    return Bytes(activations=_forward(config, role, micro, width=width, autocast=autocast), other=role.state.work)


def uses_exact_kl(config: Config) -> bool:
    """Whether the loss has the exact KL to the reference in it, over the vocabulary."""
    return Column.REFERENCE_KL in config.algorithm.columns


def _head_copy(config: Config, role: PlannedRole) -> float:
    """The reference's head, which ZeRO-3 would have whole for one call only: the exact KL keeps a copy of it."""
    partitioned = role.zero is not None and role.zero.stage == 3
    whole = float(compute_width(config)[0]) * role.shape.vocabulary * role.shape.hidden
    return whole if partitioned and uses_exact_kl(config) else 0.0


def _in_host(role: RoleMemory) -> RoleMemory:
    return RoleMemory(role.role, role.actor, role.count, Bytes(), role.device + role.host)


def _process(config: Config, roles: Sequence[PlannedRole], kept: float, *, on_gpu: bool) -> tuple[Bytes, Bytes]:
    """(device, host) of what belongs to no role: libraries, the allocator, and what loading takes beyond."""
    allocator = ALLOCATOR * kept
    extra = max(0.0, loading_bytes(config, roles) - kept)
    whole = largest_bytes(config, {"": roles})  # transformers loads all weights into host memory first
    frozen = not any(role.spec.trainable for role in roles)
    pushed = whole if frozen and reference_update(config) != "fixed" else 0.0  # what a reference apart follows
    if on_gpu:
        return Bytes(other=GPU_CONTEXT + allocator + extra), Bytes(other=BASE + max(whole, pushed))
    return Bytes(other=allocator + extra), Bytes(other=BASE + pushed)


def loading_bytes(config: Config, roles: Sequence[PlannedRole]) -> float:
    """The worst moment while roles are built one after the other: each rank loads a whole model, which stage 3
    then shares out, beside what the roles before it hold."""
    width, before, worst = compute_width(config)[0], 0.0, 0.0
    for role in roles:
        whole = float(width * role.shape.parameters) if role.spec.shares is None else 0.0
        worst = max(worst, before + whole)
        held = role.state.device
        before += held.weights + held.optimizer + held.gradients
    return worst


def has_reference(config: Config) -> bool:
    """Whether a reference is a role of each rank: the algorithm needs one, no cached log-probs, or evaluations do."""
    asked = needs_reference(config.algorithm) and not has_cached_reference(config)
    return asked or (config.samples and config.evaluation.reference)


def _activations(config: Config, role: PlannedRole, micro: Micro, *, width: int, autocast: bool) -> float:
    """At the end of the forward pass: what is saved, then the logits of one chunk or one layer's gradients."""
    compute, shape, settings = 2 if autocast else width, role.shape, role.spec.settings
    saved = saved_bytes(
        shape,
        micro.tokens,
        width=compute,
        autocast=autocast,
        longest=micro.longest,
        checkpointing=settings.gradient_checkpointing,
    )
    logits = _logits(config, role, micro, width=compute)
    if uses_exact_kl(config) and role.spec.role == "policy":
        logits += kl_bytes(shape, min(settings.logprob_chunk, micro.positions), width=compute)
        saved += hidden_bytes(shape, micro.positions, width=compute)
    return saved + max(logits, working_bytes(shape, micro.tokens, width=compute))


def _forward(config: Config, role: PlannedRole, micro: Micro, *, width: int, autocast: bool) -> float:
    """Of a pass without gradient: the inner tensors of one layer, or the logits of one chunk beside hidden states."""
    compute = 2 if autocast else width
    layer = layer_bytes(role.shape, width=compute, autocast=autocast, longest=micro.longest) * micro.tokens
    logits = _logits(config, role, micro, width=compute) + hidden_bytes(role.shape, micro.tokens, width=compute)
    return max(layer, logits)


def _logits(config: Config, role: PlannedRole, micro: Micro, *, width: int) -> float:
    """Of one chunk; of a scalar head next to nothing."""
    if role.spec.network != "causal":
        return 0.0
    positions = min(role.spec.settings.logprob_chunk, micro.positions)
    return logit_bytes(role.shape, positions, width=width, temperature=config.sampling.temperature or 1.0)


def shares_gpus(config: Config) -> bool:
    """Whether engine and learner are on the same GPU."""
    if not config.samples:
        return False
    return config.placement.name == "local" or bool(getattr(config.placement, "colocate", False))


def push_bytes(config: Config, shape: Shape) -> float:
    """Weights on their way to the engines: the push in use and the next one, in the compute dtype."""
    width = 2 if (config.learner.dtype or config.model.dtype) == "bfloat16" else 4
    return 2.0 * width * shape.parameters


def checkpoint_bytes(config: Config, shape: Shape) -> float:
    """On disk: the exported policy; the float32 weights (or master) and two moments of each role that is trained, and
    under stages 1 and 2 its weights beside the master; and a reference that has moved."""
    bfloat16 = (config.learner.dtype or config.model.dtype) == "bfloat16"
    size, width = float(shape.parameters), 2 if bfloat16 else 4
    (policy, *others), *apart = planned_roles(config, shape).values()
    others += [role for group in apart for role in group]
    more = sum(_saved(role, width) for role in others if role.spec.trainable)
    if config.model.lora is not None:  # the merged policy, and all of the adapters
        trained = adapter_parameters(config, shape)
        return more + width * (size if config.model.lora.merge else trained) + (12.0 + 2 * width) * trained
    update = "replace" if config.self_play else reference_update(config)
    zero = policy.zero
    moved = 0.0 if update == "fixed" else size * (4 if zero is None else width)
    master = 4.0 * size if update == "average" and zero is not None and bfloat16 else 0.0
    return more + width * size + _saved(policy, width) + moved + master


def _saved(role: PlannedRole, width: int) -> float:
    """The state of a role that is trained."""
    beside = width if role.zero is not None and role.zero.stage in (1, 2) else 0
    return (12.0 + beside) * role.shape.parameters

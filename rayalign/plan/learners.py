"""Memory of a learner rank: its roles, the largest micro-batch, loading, and the host's part of a push."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rayalign.build import has_cached_reference
from rayalign.learners.deepspeed_config import engine_config
from rayalign.learners.settings import LearnerSpec
from rayalign.plan.activations import hidden_bytes, kl_bytes, logit_bytes, saved_bytes, working_bytes
from rayalign.plan.records import GIB, Bytes, Micro, RoleMemory
from rayalign.plan.shapes import Shape
from rayalign.plan.zero import State, Zero, frozen_state, torch_state, trained_state
from rayalign.protocols import needs_reference
from rayalign.schema import Config
from rayalign.types import Column

# Resident before there is a model, measured on Linux with the locked CPU versions (tests/bench/plan_memory.py).
BASE = 0.6 * GIB  # Python, torch, transformers, DeepSpeed and Ray
ALLOCATOR = 0.05  # of what is held: what an allocator keeps beyond what is asked for
GPU_CONTEXT = 1.0 * GIB  # CUDA context, nccl and kernel libraries: a usual size, not measured here


def learner_memory(config: Config, shape: Shape, micro: Micro, *, on_gpu: bool) -> tuple[RoleMemory, ...]:
    """The roles of one rank, and its process. The reference works before the policy does, in the same space."""
    count = config.learner.ranks
    policy, *frozen = _states(config, shape)
    width, autocast = compute_width(config)
    activations = _activations(config, shape, micro, width=width, autocast=autocast)
    update = policy.device + Bytes(activations=activations, other=policy.work)
    roles = [("policy", update, policy.host)]
    head = _head_copy(config, shape, width)
    roles += [("reference", state.device + Bytes(other=head), state.host) for state in frozen]
    process = _process(config, shape, [policy, *frozen], update, on_gpu=on_gpu)
    found = [RoleMemory(role, "learner", count, device, host) for role, device, host in roles]
    found.append(RoleMemory("process", "learner", count, *process))
    return tuple(found) if on_gpu else tuple(_in_host(each) for each in found)


def uses_exact_kl(config: Config) -> bool:
    """Whether the loss has the exact KL to the reference in it, over the vocabulary."""
    return Column.REFERENCE_KL in config.algorithm.columns


def _head_copy(config: Config, shape: Shape, width: int) -> float:
    """The reference's head, which ZeRO-3 would have whole for one call only: the exact KL keeps a copy of it."""
    zero = zero_of(config, shape)
    partitioned = zero is not None and zero.stage == 3
    return float(width) * shape.vocabulary * shape.hidden if partitioned and uses_exact_kl(config) else 0.0


def _in_host(role: RoleMemory) -> RoleMemory:
    return RoleMemory(role.role, role.actor, role.count, Bytes(), role.device + role.host)


def _process(config: Config, shape: Shape, states: list[State], update: Bytes, *, on_gpu: bool) -> tuple[Bytes, Bytes]:
    """(device, host) of what belongs to no role: libraries, the allocator, and what loading takes beyond."""
    width, _ = compute_width(config)
    kept = update.total + sum(state.device.total for state in states[1:])
    loading = loading_bytes(config, shape)
    allocator = ALLOCATOR * kept
    extra = max(0.0, loading - kept)
    whole = float(width * shape.parameters)  # transformers loads all weights into host memory first
    if on_gpu:
        return Bytes(other=GPU_CONTEXT + allocator + extra), Bytes(other=BASE + whole)
    return Bytes(other=allocator + extra), Bytes(other=BASE)


def loading_bytes(config: Config, shape: Shape) -> float:
    """The worst moment while roles are built one after the other: each rank loads a whole model, which stage 3
    then shares out, beside what the roles before it hold."""
    states, width = _states(config, shape), compute_width(config)[0]
    whole, before, worst = float(width * shape.parameters), 0.0, 0.0
    for state in states:
        worst = max(worst, before + whole)
        before += state.device.weights + state.device.optimizer + state.device.gradients
    return worst


def _states(config: Config, shape: Shape) -> list[State]:
    """Of the policy, and of the reference where the algorithm needs one."""
    reference = has_reference(config)
    zero = zero_of(config, shape)
    if config.model.lora is not None:
        # With adapters, the initial policy is in the policy's model already; one that follows is an adapter more.
        moving = getattr(getattr(config.algorithm, "reference", None), "update", "fixed") != "fixed"
        second = float(compute_width(config)[0]) * adapter_parameters(config, shape) if moving else 0.0
        return [_adapted(config, shape, zero)] + ([State(Bytes(second), Bytes(), 0.0)] if reference else [])
    if zero is None:
        autocast = compute_width(config)[1]
        states = [torch_state(shape, trained=True, autocast=autocast)]
        return states + ([torch_state(shape, trained=False, autocast=autocast)] if reference else [])
    averaged = getattr(getattr(config.algorithm, "reference", None), "update", "fixed") == "average"
    return [trained_state(shape, zero)] + ([frozen_state(shape, zero, averaged=averaged)] if reference else [])


def adapter_parameters(config: Config, shape: Shape) -> int:
    """What LoRA trains: rank · (rows + columns) of each weight that it adapts, and a head for scores or classes."""
    lora = config.model.lora
    names = None if lora.targets == "all-linear" else lora.targets
    adapted = [
        rows + columns
        for name, rows, columns in shape.linear
        if names is None or any(f".{name}".endswith(f".{target}") for target in names)
    ]
    return lora.rank * sum(adapted) + _head(shape)


def _head(shape: Shape) -> int:
    """Parameters of a head for scores or classes, which is trained in full."""
    return shape.hidden * shape.labels if shape.network == "score" else 0


def _adapted(config: Config, shape: Shape, zero: Zero | None) -> State:
    """A policy with LoRA: all weights frozen, in the compute dtype; gradients and moments of the adapters alone."""
    trained = adapter_parameters(config, shape)
    small = replace(shape, parameters=trained, largest=min(shape.largest, trained))
    frozen = replace(shape, parameters=shape.parameters - _head(shape))
    if zero is None:
        width = 2 if compute_width(config)[1] else 4
        state = torch_state(small, trained=True, autocast=compute_width(config)[1])
        return replace(state, device=state.device + Bytes(weights=float(width) * frozen.parameters))
    state = trained_state(small, zero)
    return replace(state, device=state.device + frozen_state(frozen, zero, averaged=False).device)


def has_reference(config: Config) -> bool:
    """Whether a reference is a role of each rank: the algorithm needs one, no cached log-probs, or evaluations do."""
    asked = needs_reference(config.algorithm) and not has_cached_reference(config)
    return asked or (config.samples and config.evaluation.reference)


def zero_of(config: Config, shape: Shape) -> Zero | None:
    """What DeepSpeed is really told (`learners.deepspeed_config`); None for the torch learner."""
    if not hasattr(config.learner, "zero_stage"):
        return None
    import torch

    dtype = config.learner.dtype or config.model.dtype
    spec = LearnerSpec("policy", shape.path, dtype=dtype, optimizer=config.optimizer, settings=config.learner)
    told: dict[str, Any] = engine_config(spec, getattr(torch, dtype), config.learner.ranks, shape.parameters)
    told = told["zero_optimization"]
    return Zero(
        stage=int(told["stage"]),
        ranks=config.learner.ranks,
        width=2 if dtype == "bfloat16" else 4,
        offload=told.get("offload_optimizer", {}).get("device", "none") == "cpu",
        bucket=int(told.get("reduce_bucket_size", shape.parameters)),
    )


def compute_width(config: Config) -> tuple[int, bool]:
    """(bytes of a stored weight, whether the pass runs under autocast: float32 weights, bfloat16 products)."""
    bfloat16 = (config.learner.dtype or config.model.dtype) == "bfloat16"
    if hasattr(config.learner, "zero_stage"):
        return (2 if bfloat16 else 4), False
    return 4, bfloat16


def _activations(config: Config, shape: Shape, micro: Micro, *, width: int, autocast: bool) -> float:
    """At the end of the forward pass: what is saved, then the logits of one chunk or one layer's gradients."""
    compute = 2 if autocast else width
    saved = saved_bytes(
        shape,
        micro.tokens,
        width=compute,
        autocast=autocast,
        longest=micro.longest,
        checkpointing=config.learner.gradient_checkpointing,
    )
    positions = min(config.learner.logprob_chunk, micro.positions)
    logits = 0.0  # of a scalar head next to nothing
    if config.algorithm.network == "causal":
        logits = logit_bytes(shape, positions, width=compute, temperature=config.sampling.temperature or 1.0)
    if uses_exact_kl(config):
        logits += kl_bytes(shape, positions, width=compute)
        saved += hidden_bytes(shape, micro.positions, width=compute)
    return saved + max(logits, working_bytes(shape, micro.tokens, width=compute))


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
    """On disk: the exported policy; the learner's float32 weights (or master) and two moments, and under stages 1
    and 2 its weights beside the master; and a reference that has moved."""
    bfloat16 = (config.learner.dtype or config.model.dtype) == "bfloat16"
    size, width = float(shape.parameters), 2 if bfloat16 else 4
    zero = zero_of(config, shape)
    if config.model.lora is not None:  # the merged policy, and all of the adapters
        trained = adapter_parameters(config, shape)
        return width * (size if config.model.lora.merge else trained) + (12.0 + 2 * width) * trained
    state = (12.0 + (width if zero is not None and zero.stage in (1, 2) else 0)) * size
    update = "replace" if config.self_play else getattr(getattr(config.algorithm, "reference", None), "update", "fixed")
    moved = 0.0 if update == "fixed" else size * (4 if zero is None else width)
    master = 4.0 * size if update == "average" and zero is not None and bfloat16 else 0.0
    return width * size + state + moved + master

"""The roles of a run as they would be built, each with its shape and what a rank of it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from rayalign.build import CRITIC, learner_specs, model_path
from rayalign.errors import ConfigError
from rayalign.learners.deepspeed_config import engine_config
from rayalign.learners.settings import LearnerSpec, by_group
from rayalign.plan.records import Bytes
from rayalign.plan.shapes import Shape, read_shape
from rayalign.plan.zero import State, Zero, frozen_state, torch_state, trained_state
from rayalign.schema import Config


@dataclass(frozen=True)
class PlannedRole:
    """One role.

    Attributes:
        state: what one rank of it holds.
        zero: None with the torch learner.
    """

    spec: LearnerSpec
    shape: Shape
    state: State
    zero: Zero | None

    @property
    def ranks(self) -> int:
        return getattr(self.spec.settings, "ranks", 1)


def planned_roles(config: Config, shape: Shape) -> dict[str, list[PlannedRole]]:
    """Roles by the group of actors that they live in, the policy's "learner" first. What is not needed is none.

    Args:
        shape: of the policy.
    """
    specs = learner_specs(config, None, policy=None, train=True)
    shapes = {spec.role: _shape_of(spec, specs[0], shape) for spec in specs}
    return {
        name: [_planned(config, spec, shapes[spec.role], specs[0], shape) for spec in inside]
        for name, inside in by_group(config.learner, specs).items()
    }


def _shape_of(spec: LearnerSpec, policy: LearnerSpec, shape: Shape) -> Shape:
    """Of a checkpoint that is not there yet (a reward model that another stage trains): as the policy's."""
    if (spec.model, spec.network) == (policy.model, policy.network):
        return shape
    here = shape.path if spec.model == policy.model else spec.model
    found = _looked_for(here, spec.network, spec.trust_remote_code)
    return found or _looked_for(shape.path, spec.network, spec.trust_remote_code) or shape


@lru_cache(maxsize=8)  # a plan asks for each change that it tries
def _looked_for(model: str, network: str, trust_remote_code: bool) -> Shape | None:
    try:
        return read_shape(model, network=network, trust_remote_code=trust_remote_code)
    except ConfigError:
        return None


def critic_is_there(config: Config) -> bool:
    """Whether the critic's own checkpoint, if it has one, can be planned as it is."""
    path = getattr(getattr(config.algorithm, "critic", None), "model", None)
    return path is None or _looked_for(model_path(path, CRITIC), "score", config.model.trust_remote_code) is not None


def _planned(config: Config, spec: LearnerSpec, shape: Shape, policy: LearnerSpec, whole: Shape) -> PlannedRole:
    zero = zero_of(config, shape, spec)
    return PlannedRole(spec, shape, _state(config, spec, shape, zero, policy, whole), zero)


def _state(
    config: Config, spec: LearnerSpec, shape: Shape, zero: Zero | None, policy: LearnerSpec, whole: Shape
) -> State:
    if spec.shares is not None:  # in the policy's model already; one that follows is an adapter more
        second = float(compute_width(config)[0]) * adapter_parameters(config, whole)
        return State(Bytes(second if spec.role in policy.adapters else 0.0), Bytes(), 0.0)
    if spec.lora is not None:
        return _adapted(config, shape, zero)
    if zero is None:
        return torch_state(shape, trained=spec.trainable, autocast=compute_width(config)[1])
    if spec.trainable:
        return trained_state(shape, zero)
    return frozen_state(shape, zero, averaged=spec.role == "reference" and reference_update(config) == "average")


def reference_update(config: Config) -> str:
    """How the reference follows the policy."""
    return getattr(getattr(config.algorithm, "reference", None), "update", "fixed")


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


def zero_of(config: Config, shape: Shape, spec: LearnerSpec | None = None) -> Zero | None:
    """What DeepSpeed is really told (`learners.deepspeed_config`), of the policy unless another role is given; None
    for the torch learner."""
    settings: Any = config.learner if spec is None else spec.settings
    if not hasattr(settings, "zero_stage"):
        return None
    import torch

    dtype = config.learner.dtype or config.model.dtype
    usual = LearnerSpec("policy", shape.path, dtype=dtype, optimizer=config.optimizer, settings=settings)
    told: dict[str, Any] = engine_config(spec or usual, getattr(torch, dtype), settings.ranks, shape.parameters)
    told = told["zero_optimization"]
    return Zero(
        stage=int(told["stage"]),
        ranks=settings.ranks,
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


def largest_bytes(config: Config, groups: dict[str, Sequence[PlannedRole]]) -> float:
    """Of the largest model that a rank loads whole."""
    width = compute_width(config)[0]
    return max(float(width * role.shape.parameters) for inside in groups.values() for role in inside)

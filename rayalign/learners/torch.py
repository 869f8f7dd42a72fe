"""A learner in this process, with nothing but torch: the reference that every other learner is measured by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayalign.errors import CheckpointError
from rayalign.learners.base import LearnerSettings, LearnerSpec, RankLearner
from rayalign.learners.lora import load_adapted, part_of, settings_of
from rayalign.learners.network import Network
from rayalign.learners.roles import TorchRole

MARKER, WEIGHTS, OPTIMIZER = "learner.json", "weights.safetensors", "optimizer.pt"


class TorchLearnerConfig(LearnerSettings):
    """One process, no sharding: a laptop, a test, or a small model on one GPU."""

    name: Literal["torch"] = "torch"
    ranks: Literal[1] = Field(1, description="this learner is one process")
    roles: Mapping[str, TorchRole] = Field(
        {},
        description="by role (critic, reference): in what it differs from the policy, and whether it lives apart",
        examples=[{"reference": {"apart": True}}],
    )

    def build(
        self, specs: Sequence[LearnerSpec], *, rank: int, world_size: int, address: tuple[str, int]
    ) -> dict[str, TorchLearner]:
        """One learner for each role, beside each other in this process."""
        peers: dict[str, TorchLearner] = {}
        for spec in specs:
            TorchLearner(spec, peers)
        return peers


class TorchLearner(RankLearner):
    """Parameters in float32 (autocast when the dtype is bfloat16, for frozen roles too, so that policy and
    reference are one function of their weights), and AdamW. In float32 a restored run is the same bit for bit."""

    def __init__(self, spec: LearnerSpec, peers: dict[str, RankLearner]):
        super().__init__(spec, peers)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = self._network(spec)
        self.part = part_of(spec, self.policy)
        self._check_peers()
        self._trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self._optimizer = None
        if spec.trainable:
            self._optimizer = torch.optim.AdamW(
                self._trained,
                lr=spec.optimizer.lr,
                betas=spec.optimizer.betas,
                eps=spec.optimizer.eps,
                weight_decay=spec.optimizer.weight_decay,
                fused=True,
            )

    def _network(self, spec: LearnerSpec) -> Network:
        if spec.shares is not None:
            return self.peers[spec.shares].policy
        if spec.lora is None:
            return load_adapted(spec, torch.float32).to(self._device)
        # What is frozen needs no float32 copy; adapters, and a head that is trained, do.
        network = load_adapted(spec, self.dtype).to(self._device)
        for name, parameter in network.named_weights():
            if ".lora_" in name or parameter.requires_grad:
                parameter.data = parameter.data.float()
        return network

    @property
    def device(self) -> torch.device:
        return self._device

    def _forward(self, *args: Any) -> dict[str, Tensor]:
        with (
            self.part.active(),
            torch.autocast(self._device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16),
        ):
            return self.policy(*args)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, self.spec.optimizer.max_grad_norm))
        if norm < float("inf"):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def total(self, value: float) -> float:
        return value

    def total_tensor(self, value: Tensor) -> Tensor:
        return value

    def _whole(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager:
        return nullcontext()

    def shares(self) -> Iterator[tuple[str, Tensor]]:
        return self.own_tensors()

    def shares_of(self, whole: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return whole

    @torch.no_grad()
    def _blend(self, shares: Iterator[tuple[str, Tensor]], decay: float) -> None:
        for (_, own), (_, other) in zip(self.shares(), shares, strict=True):
            own.copy_(other) if decay == 0.0 else own.lerp_(other.to(own), 1.0 - decay)

    def save(self, path: Path) -> None:
        """Weights, optimiser and random state; of a frozen role that is still the checkpoint's, a marker only."""
        path = Path(path)
        changed = self.spec.trainable or self.refreshed
        marker = {"learner": "torch", "role": self.spec.role, "weights": changed, "lora": settings_of(self.spec)}
        (path / MARKER).write_text(json.dumps(marker))
        if changed:
            save_file({name: tensor.cpu().contiguous() for name, tensor in self._saved_tensors()}, path / WEIGHTS)
        if self._optimizer is not None:
            state = {
                "optimizer": self._optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "carried": self.carried,
            }
            torch.save(state, path / OPTIMIZER)

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Raises CheckpointError when the folder is not one that this learner saved."""
        path = Path(path)
        marker = read_marker(path, learner="torch", role=self.spec.role, lora=settings_of(self.spec))
        self.refreshed = marker["weights"] and not self.spec.trainable
        if marker["weights"]:
            weights = load_file(path / WEIGHTS)
            own = dict(self._saved_tensors())
            check_names(
                path / WEIGHTS,
                {name: tuple(t.shape) for name, t in weights.items()},
                {name: tuple(t.shape) for name, t in own.items()},
            )
            for name, tensor in own.items():
                tensor.copy_(weights[name])
        if self._optimizer is not None:
            state = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
            self._optimizer.load_state_dict(state["optimizer"])
            self.carried = state.get("carried", {})
            torch.set_rng_state(state["rng"])
            if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["cuda_rng"])

    def _saved_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.own_tensors()
        yield from ((name, parameter.detach()) for name, parameter in self.policy.extra_weights())

    def close(self) -> None:
        super().close()
        self.policy, self.part, self._trained, self._optimizer = None, None, [], None


def read_marker(path: Path, *, learner: str, role: str, lora: dict[str, Any] | None = None) -> dict:
    """What `save` wrote beside the weights. Raises CheckpointError when it is missing, of another learner, or of
    other adapters."""
    try:
        marker = json.loads((path / MARKER).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no state of the {role} learner can be read here",
            where=str(path / MARKER),
            value=f"{type(error).__name__}: {error}",
            remedy="restore from another checkpoint",
        ) from None
    if marker.get("learner") != learner or marker.get("role") != role:
        raise CheckpointError(
            "this state is of another learner",
            where=str(path / MARKER),
            value=f"{marker.get('learner')} {marker.get('role')}",
            rule=f"{learner} {role}",
            remedy="resume with the learner and roles that wrote the checkpoint",
        )
    if marker.get("lora") != lora:
        raise CheckpointError(
            "this state was written with other adapters",
            where=str(path / MARKER),
            value=f"{_adapters(marker.get('lora'))} in the checkpoint, {_adapters(lora)} in the config",
            rule="the rank, alpha and targets that the run began with",
            remedy="resume with the model.lora that wrote the checkpoint, or start anew from exported weights",
        )
    return marker


def _adapters(lora: dict[str, Any] | None) -> str:
    return "no lora" if lora is None else ", ".join(f"{key} {value}" for key, value in lora.items())


def check_names(path: Path, found: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    """Raises CheckpointError unless both have the same names and shapes."""
    if found != wanted:
        wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise CheckpointError(
            "these weights are of another model",
            where=str(path),
            value=f"{len(wrong)} tensors differ: {', '.join(wrong[:3])}",
            rule="the names and shapes of the model in the config",
            remedy="resume with the model that wrote the checkpoint",
        )

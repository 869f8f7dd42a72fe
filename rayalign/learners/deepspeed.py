"""A learner rank on DeepSpeed: ZeRO stages 0–3, one role of which is this rank's share."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rayalign.learners import deepspeed_state as state
from rayalign.learners.base import LearnerSettings, LearnerSpec, RankLearner
from rayalign.learners.deepspeed_config import OWNED, engine_config, init_process
from rayalign.learners.lora import load_adapted, part_of
from rayalign.learners.roles import DeepSpeedRole
from rayalign.record import Unfit

__all__ = ["DeepSpeedLearner", "DeepSpeedLearnerConfig", "init_process"]


class DeepSpeedLearnerConfig(LearnerSettings):
    """DeepSpeed ranks, each a process: one GPU (or some CPU cores) a rank."""

    name: Literal["deepspeed"] = "deepspeed"
    ranks: int = Field(1, ge=1, description="data-parallel processes")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="what the ranks share out: 0 nothing, 1 optimiser state, 2 and gradients, 3 and parameters"
    )
    offload: Literal["none", "cpu"] = Field("none", description="where optimiser state lives (stages 1 to 3)")
    roles: Mapping[str, DeepSpeedRole] = Field(
        {},
        description="by role (critic, reference): in what it differs from the policy, and whether it lives apart",
        examples=[{"critic": {"ranks": 2, "zero_stage": 3}}],
    )
    config: dict[str, Any] = Field({}, description="merged into DeepSpeed's own config, for what is not said here")

    @field_validator("config")
    @classmethod
    def _not_owned(cls, config: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(OWNED & set(config))
        if taken:
            raise Unfit(
                f"rayalign sets {', '.join(taken)} itself",
                rule="keys of DeepSpeed's config that do not follow from a key of ours",
                remedy="take it out; see optimizer.*, model.dtype, learner.micro_batch_tokens and learner.zero_stage",
            )
        return config

    def build(
        self, specs: Sequence[LearnerSpec], *, rank: int, world_size: int, address: tuple[str, int] | None
    ) -> dict[str, DeepSpeedLearner]:
        """One rank of each role, beside each other in this process. `address` is where the ranks meet."""
        host, port = address or (None, None)
        init_process(rank, world_size, host, port, timeout_s=self.deadline_s)
        peers: dict[str, DeepSpeedLearner] = {}
        for spec in specs:
            DeepSpeedLearner(spec, peers, rank=rank, world_size=world_size)
        return peers


class DeepSpeedLearner(RankLearner):
    """One role on one rank. Every public method has to be called on all ranks, in the same order.

    A trainable role is a DeepSpeed engine. A frozen one is a plain copy on each rank, or under ZeRO-3 an engine
    without optimiser whose parameters are partitioned. In bfloat16 the master weights and the accumulation and
    reduction of gradients are float32.

    Args:
        spec: its `settings` are a DeepSpeedLearnerConfig.
    """

    def __init__(self, spec: LearnerSpec, peers: dict[str, RankLearner], *, rank: int = 0, world_size: int = 1):
        super().__init__(spec, peers, rank=rank, world_size=world_size)
        self.stage = self.settings.zero_stage
        init_process(rank, world_size)
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        # The role whose model, and engine, this one shares; None: it has its own.
        self._host: DeepSpeedLearner | None = None if spec.shares is None else peers[spec.shares]
        self.policy = load_adapted(spec, self.dtype).to(self._device) if self._host is None else self._host.policy
        self.part = part_of(spec, self.policy)
        self._check_peers()
        if self._host is None:
            self.engine = self._initialize() if spec.trainable or self.stage == 3 else None
        else:
            self.engine = self._host.engine
        # float32 copy of this rank's share of a bfloat16 moving average: without it, small changes round away.
        self.master: dict[str, Tensor] = {}

    def _initialize(self):
        import deepspeed

        size = sum(parameter.numel() for _, parameter in self.policy.named_weights())
        config = engine_config(self.spec, self.dtype, self.world_size, size)
        optimizer = None
        if self.spec.trainable:
            wanted = self.spec.optimizer
            optimizer = torch.optim.AdamW(
                self._trained(),
                lr=wanted.lr,
                betas=wanted.betas,
                eps=wanted.eps,
                weight_decay=wanted.weight_decay,
                fused=True,
            )
        with contextlib.redirect_stdout(io.StringIO()):  # some of its optimisers print memory tables
            return deepspeed.initialize(
                model=self.policy, optimizer=optimizer, config=config, dist_init_required=False
            )[0]

    @property
    def device(self) -> torch.device:
        return self._device

    def _forward(self, *args: Any) -> dict[str, Tensor]:
        with self.part.active():
            return (self.policy if self.engine is None else self.engine)(*args)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over the ranks; losses here are parts of one sum. Undone here and only here.
        self.engine.backward(loss * self.world_size)

    def step(self, lr: float) -> float:
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = lr
        if self.engine.optimizer is self.engine.basic_optimizer:  # stage 0 in float32: DeepSpeed keeps no norm
            norm = float(torch.nn.utils.clip_grad_norm_(self._trained(), self.spec.optimizer.max_grad_norm))
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return norm
            self.engine.step()
            return norm
        self.engine.step()  # takes no step when the norm is not finite
        norm = self.engine.get_global_grad_norm()
        skipped = norm is None or float(norm) < 0 or getattr(self.engine.optimizer, "overflow", False)
        return math.inf if skipped else float(norm)

    def total(self, value: float) -> float:
        if self.world_size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(total)
        return float(total)

    def total_tensor(self, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def _whole(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager:
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))

    def shares(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of each parameter that is this role's own: all of it, or its flat partition under
        ZeRO-3."""
        for name, parameter in self.part.own():
            if self.stage == 3:
                if not self.spec.trainable and parameter.ds_status.name == "AVAILABLE":
                    parameter.partition()  # so that the next forward gathers what is written below
                yield name, parameter.ds_tensor.data
            else:
                yield name, parameter.data

    def shares_of(self, whole: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for (name, parameter), (_, tensor) in zip(self.part.own(), whole, strict=True):
            if self.stage == 3:
                size = parameter.ds_tensor.numel()  # the last rank's may end in padding
                tensor = tensor.reshape(-1)[self.rank * size : (self.rank + 1) * size]
            yield name, tensor

    @torch.no_grad()
    def _blend(self, shares: Iterator[tuple[str, Tensor]], decay: float) -> None:
        keep_master = decay > 0.0 and self.dtype is not torch.float32
        if not keep_master:
            self.master = {}
        for (name, own), (_, other) in zip(self.shares(), shares, strict=True):
            if own.shape != other.shape:
                own = own[: other.numel()]  # without padding
            if decay == 0.0:
                own.copy_(other)
            elif keep_master:
                master = self.master.setdefault(name, own.float())
                own.copy_(master.lerp_(other.to(master), 1.0 - decay))
            else:
                own.lerp_(other.to(own), 1.0 - decay)

    def save(self, path: Path) -> None:
        """Raises CheckpointError when DeepSpeed cannot write."""
        state.save(self, Path(path))

    def restore(self, path: Path) -> None:
        """Raises CheckpointError for a folder of another learner, stage, dtype or number of ranks."""
        state.restore(self, Path(path))

    def close(self) -> None:
        super().close()
        if self.engine is not None and self._host is None:
            self.engine.destroy()
        self.policy, self.part, self.engine, self.master, self._host = None, None, None, {}, None

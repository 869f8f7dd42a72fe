"""What one rank does in test_vision_deepspeed: two steps on rows with images, by DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rayalign.algorithms.mdpo import MDPO
from rayalign.algorithms.preference import Preference
from rayalign.learners.deepspeed import DeepSpeedLearnerConfig
from rayalign.types import Group
from tests.contract.algorithms_rank import specs, two_steps
from tests.contract.learner_cases import weights
from tests.vision_cases import group

STAGES = (0, 2, 3)
CASES: dict[str, tuple[Any, list[Group], dict[str, Any]]] = {
    "mdpo": (MDPO(kl_weight=0.05), [group(row) for row in range(3)], {}),
    "mdpo, what sees learns": (MDPO(), [group(row) for row in range(3)], {"train_vision": True}),
    # One rank has rows with images, the other for a time only some without.
    "dpo, some with images": (Preference(), [group(row, images=(2, 0, 0, 0)[row]) for row in range(4)], {}),
}


def main(rank: int, world_size: int, port: int, model: str, out: str) -> None:
    torch.set_num_threads(1)
    for stage in STAGES:
        for name, (algorithm, groups, settings) in CASES.items():
            config = DeepSpeedLearnerConfig(
                zero_stage=stage, dtype="float32", deadline_s=120, micro_batch_tokens=24, **settings
            )
            roles = config.build(
                specs(model, algorithm, config), rank=rank, world_size=world_size, address=("127.0.0.1", port)
            )
            metrics = two_steps(roles, algorithm, groups, everywhere=lambda value: _everywhere(value, world_size))
            tensors = weights(roles["policy"])
            again = tensors
            if name == "mdpo":
                again = _resumed(roles, algorithm, config, rank, world_size, port, model, Path(out) / f"{name}-{stage}")
            _close(roles)
            if rank == 0:
                found = {"metrics": metrics, "weights": tensors, "restored": again}
                torch.save(found, Path(out) / f"{name}-{stage}.pt")
    torch.distributed.barrier()


def _resumed(
    roles: Any, algorithm: Any, config: Any, rank: int, world_size: int, port: int, model: str, folder: Path
) -> dict[str, torch.Tensor]:
    """The policy's weights once saved, forgotten, built anew and restored."""
    if rank == 0:
        folder.mkdir()
    torch.distributed.barrier()
    roles["policy"].save(folder)
    _close(roles)
    roles = config.build(specs(model, algorithm, config), rank=rank, world_size=world_size, address=("", port))
    roles["policy"].restore(folder)
    found = weights(roles["policy"])
    _close(roles)
    return found


def _close(roles: dict[str, Any]) -> None:
    for learner in list(roles.values()):
        learner.close()


def _everywhere(value: Any, world_size: int) -> list[Any]:
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, value)
    return found

"""The state of a DeepSpeed learner on disk, in a folder that all ranks share."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from rayalign.errors import CheckpointError
from rayalign.learners.lora import settings_of
from rayalign.learners.torch import MARKER, check_names, read_marker

if TYPE_CHECKING:
    from rayalign.learners.deepspeed import DeepSpeedLearner

TAG = "engine"


def save(learner: DeepSpeedLearner, path: Path) -> None:
    """A trainable role by DeepSpeed; a refreshed frozen one as the shares of its ranks; else a marker only."""
    if learner.spec.trainable:
        client = {"rng": torch.get_rng_state(), "carried": learner.carried}
        # Frozen weights are those of the model's own checkpoint.
        if not learner.engine.save_checkpoint(
            str(path), tag=TAG, client_state=client, save_latest=False, exclude_frozen_parameters=True
        ):
            raise CheckpointError("DeepSpeed could not write its checkpoint", where=str(path))
    elif learner.refreshed and (learner.stage == 3 or learner.rank == 0):
        shares = {f"own/{name}": share.cpu().contiguous() for name, share in learner.shares()}
        shares |= {f"master/{name}": share.cpu() for name, share in learner.master.items()}
        save_file(shares, _shares_file(learner, path))
    if learner.rank == 0:
        (path / MARKER).write_text(json.dumps(_marker(learner)))
    torch.distributed.barrier()  # no rank goes on, and publishes the folder, before all have written


@torch.no_grad()
def restore(learner: DeepSpeedLearner, path: Path) -> None:
    """Raises CheckpointError when the folder was written by another learner, stage, dtype or number of ranks."""
    lora = settings_of(learner.spec)
    marker = read_marker(path, learner="deepspeed", role=learner.spec.role, lora=lora)
    wanted = _marker(learner)
    for key, name in (("zero_stage", "ZeRO stage"), ("ranks", "number of ranks"), ("dtype", "dtype")):
        if marker.get(key) != wanted[key]:
            raise CheckpointError(
                f"this state was written with another {name}",
                where=str(path),
                value=f"{name} {marker.get(key)} in the checkpoint, {wanted[key]} in the config",
                rule="state is sharded by ranks and stage and is read back the same way",
                remedy=f"resume with {name} {marker.get(key)}, or start anew from exported weights",
            )
    learner.refreshed = bool(marker["refreshed"])
    if learner.spec.trainable:
        _restore_engine(learner, path)
    elif learner.refreshed:
        _restore_shares(learner, path)


def _restore_engine(learner: DeepSpeedLearner, path: Path) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            loaded, client = learner.engine.load_checkpoint(
                str(path),
                tag=TAG,
                load_lr_scheduler_states=False,
                load_module_strict=all(each.requires_grad for each in learner.policy.parameters()),
            )
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(
            "DeepSpeed cannot read this checkpoint",
            where=str(path),
            value=f"{type(error).__name__}: {error}",
            remedy="resume with the model that wrote it, or from another checkpoint",
        ) from error
    if loaded is None:
        raise CheckpointError(
            "DeepSpeed found no checkpoint here", where=str(path), remedy="restore from another checkpoint"
        )
    torch.set_rng_state(client["rng"].cpu())
    learner.carried = client.get("carried", {})


def _restore_shares(learner: DeepSpeedLearner, path: Path) -> None:
    file = _shares_file(learner, path)
    found = load_file(file)
    own = dict(learner.shares())
    stored = {name.removeprefix("own/"): share for name, share in found.items() if name.startswith("own/")}
    check_names(
        file,
        {name: tuple(share.shape) for name, share in stored.items()},
        {name: tuple(share.shape) for name, share in own.items()},
    )
    for name, share in own.items():
        share.copy_(stored[name])
    learner.master = {
        name.removeprefix("master/"): share.to(learner.device)
        for name, share in found.items()
        if name.startswith("master/")
    }


def _marker(learner: DeepSpeedLearner) -> dict[str, Any]:
    return {
        "learner": "deepspeed",
        "role": learner.spec.role,
        "zero_stage": learner.stage,
        "ranks": learner.world_size,
        "dtype": str(learner.dtype).removeprefix("torch."),
        "refreshed": learner.refreshed,
        "lora": settings_of(learner.spec),
    }


def _shares_file(learner: DeepSpeedLearner, path: Path) -> Path:
    return path / f"shares-{learner.rank if learner.stage == 3 else 0}.safetensors"

"""What DeepSpeed is told, and the process group that it needs."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import torch

from rayalign.learners.settings import LearnerSpec

# Keys of DeepSpeed's config that follow from ours.
OWNED = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "managed_gradient_accumulation",
        "optimizer",
        "scheduler",
        "gradient_clipping",
        "bf16",
        "bfloat16",
        "fp16",
        "amp",
        "torch_autocast",
        "prescale_gradients",
        "gradient_predivide_factor",
    }
)


def init_process(
    rank: int,
    world_size: int,
    master_addr: str | None = None,
    master_port: int | None = None,
    *,
    timeout_s: float = 1800.0,
) -> None:
    """Join the process group of the ranks, once a process: gloo on CPUs, nccl on GPUs.

    Args:
        master_addr, master_port: of rank 0. Default: MASTER_ADDR and MASTER_PORT of the environment, and for a
            single rank this machine and any free port.
        timeout_s: after which a collective call that a rank does not join is an error on the others.
    """
    if torch.distributed.is_initialized():
        return
    gpu = torch.cuda.is_available()
    if master_addr is not None:
        os.environ.update(MASTER_ADDR=master_addr, MASTER_PORT=str(master_port))
    elif world_size == 1 and "MASTER_PORT" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    # Ray shows each rank its own GPU only, which is then number 0.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu else "cpu")

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # It would compile an all-reduce for inference here, which training never calls: half a minute, a C++ compiler,
    # and a lock file that waits for ever for a build that was killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that torch is about to retire; nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        "nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s)
    )


def engine_config(spec: LearnerSpec, dtype: torch.dtype, world_size: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's config for one role.

    Args:
        parameters: of the model; no communication bucket needs to be larger.
    """
    settings = spec.settings
    bfloat16 = dtype is torch.bfloat16
    # Stage 0 would accumulate gradients in bfloat16. With one rank, stage 1 is the same plus float32 accumulation;
    # with more, it also shares out the master weights.
    stage = 1 if settings.zero_stage == 0 and bfloat16 else settings.zero_stage
    bucket = min(200_000_000, parameters)
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3 and not spec.trainable:
        zero["stage3_param_persistence_threshold"] = 0  # small parameters would stay gathered, out of a refresh's reach
    if settings.offload == "cpu" and stage and spec.trainable:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        # The number of micro-batches varies from step to step: the learner says which one is the last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW; DeepSpeed's is compiled at run time
        "steps_per_print": 2**31,
    }
    if bfloat16:
        config |= {
            "bf16": {"enabled": True},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    if spec.trainable and stage:
        config["gradient_clipping"] = spec.optimizer.max_grad_norm
    return merged(config, settings.config)


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`extra` laid over `base`, mapping by mapping."""
    out = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else value
    return out


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

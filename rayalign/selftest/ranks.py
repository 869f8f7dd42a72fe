"""Two learner ranks that train together: nccl between GPUs, gloo on a CPU.

Run as a child: `python -m rayalign.selftest.ranks`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rayalign.selftest.devices import Gpu, learner_dtype
from rayalign.selftest.stage import RANKS, stage

WORLD = 2
DEADLINE_S = 120.0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rayalign.selftest.ranks")
    parser.add_argument("model", type=Path)
    parser.add_argument("--gpus", type=Gpu.parse, nargs="*", default=[])
    options = parser.parse_args(arguments)
    remedy = "NCCL_DEBUG=INFO shows which way nccl took; in a container, give it more /dev/shm" if options.gpus else ""
    with stage(RANKS, remedy) as note:
        import transformers.models.llama.modeling_llama  # noqa: F401  once, before the ranks are forked
        from torch.distributed.elastic.utils.distributed import get_free_port
        from torch.multiprocessing import start_processes

        import rayalign.learners.deepspeed  # noqa: F401

        arguments_of_all = (get_free_port(), str(options.model), options.gpus)
        method = "spawn" if options.gpus else "fork"  # what was begun with a GPU does not survive a fork
        start_processes(train_on_rank, arguments_of_all, nprocs=WORLD, start_method=method)  # raises what a rank raises
        note.found = f"an update over {'nccl' if options.gpus else 'gloo'}, and the same log-probs on both"
    return 0


def train_on_rank(rank: int, port: int, model: str, gpus: list[Gpu]) -> None:
    """One update of a DPO policy, after which both ranks have to hold the same, other weights."""
    os.environ["LOCAL_RANK"] = str(rank if gpus else 0)
    import numpy as np
    import torch

    from rayalign.algorithms.online_preference import OnlinePreference
    from rayalign.learners.deepspeed import DeepSpeedLearnerConfig
    from rayalign.learners.settings import LearnerSpec, OptimizerConfig
    from rayalign.protocols import UpdatePlan
    from rayalign.types import Column, Example, Sequence

    settings = DeepSpeedLearnerConfig(ranks=WORLD, zero_stage=2, dtype=learner_dtype(gpus), deadline_s=DEADLINE_S)
    spec = LearnerSpec("policy", model, optimizer=OptimizerConfig(lr=1e-2), settings=settings)
    policy = settings.build([spec], rank=rank, world_size=WORLD, address=("127.0.0.1", port))["policy"]

    def row(first: int) -> Sequence:
        tokens = tuple(range(first, first + 8))
        return Sequence((40, 41), tokens, columns={f"reference/{Column.LOGPS.value}": np.zeros(8, np.float32)})

    probe = tuple(range(40, 60))
    before = policy.logps([probe])[0]
    dpo: Any = OnlinePreference()
    policy.update_shard([Example((row(40 + i), row(80 + i))) for i in range(4)], dpo, UpdatePlan(0))
    found: list[Any] = [None] * WORLD
    torch.distributed.all_gather_object(found, policy.logps([probe])[0])
    if not np.abs(found[0] - before).max() > 0:
        raise RuntimeError("the update changed nothing")
    if not np.array_equal(*found):
        raise RuntimeError("the ranks hold different weights after one update")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What one rank does in test_deepspeed_equality: everything that can be checked in one process, in one go.

Each case writes what rank 0 found to a file; the test compares. Cases that hold on every rank assert here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from rayalign.errors import CheckpointError, TrainingStopped
from rayalign.learners.base import merge_annotations, merge_metrics
from rayalign.learners.deepspeed import DeepSpeedLearnerConfig
from rayalign.protocols import UpdatePlan
from rayalign.sync.flat import unpack
from rayalign.types import Column
from tests.contract.learner_cases import DPO, PROBES, Broken, Centred, Compared, Distilled, pairs, specs, train, weights
from tests.ranks import free_port, spawn

TRAINING = {  # name → settings, examples, plan
    "whole": ({}, 5, {}),
    "split": ({"micro_batch_tokens": 40, "logprob_chunk": 4}, 5, {}),
    "alone": ({"micro_batch_tokens": 1, "gradient_checkpointing": True}, 5, {"epochs": 2, "minibatches": 2, "seed": 3}),
    "one": ({}, 1, {}),
    "statistics": ({"micro_batch_tokens": 40}, 5, {"algorithm": Centred()}),
    "statistics of one": ({}, 1, {"algorithm": Centred()}),
    "distilled": ({"micro_batch_tokens": 40, "logprob_chunk": 4}, 5, {"algorithm": Distilled()}),
    "distilled of one": ({}, 1, {"algorithm": Distilled()}),
    "packed": ({"micro_batch_tokens": 40, "packing": True}, 5, {"algorithm": Distilled()}),
    "score": ({"micro_batch_tokens": 40, "network": "score"}, 5, {"algorithm": Compared()}),
    "score of one": ({"network": "score", "packing": True}, 1, {"algorithm": Compared()}),
}
OFFLOAD = {"offloaded": ({"offload": "cpu", "micro_batch_tokens": 60}, 5, {})}


def main(rank: int, world_size: int, port: int, stages: list[int], model: str, out: str) -> None:
    """All cases of some stages, as rank `rank`."""
    torch.set_num_threads(1)
    for stage in stages:
        ranks = Ranks(rank, world_size, port, stage, Path(model), Path(out) / f"stage{stage}")
        for name, case in (TRAINING | (OFFLOAD if stage else {})).items():
            ranks.training(name, *case)
        ranks.weights_travel()
        ranks.scores_travel()
        ranks.resumed("float32")
        ranks.resumed("bfloat16")
        ranks.moving_average_in_bfloat16()
        ranks.not_finite()
    torch.distributed.barrier()


class Ranks:
    def __init__(self, rank: int, world_size: int, port: int, stage: int, model: Path, out: Path):
        self.rank, self.world_size, self.port = rank, world_size, port
        self.stage, self.model, self.out = stage, model, out
        out.mkdir(parents=True, exist_ok=True)

    def build(self, dtype: str = "float32", stage: int | None = None, network: str = "causal", **settings):
        config = DeepSpeedLearnerConfig(
            zero_stage=self.stage if stage is None else stage, dtype=dtype, deadline_s=120, **settings
        )
        return config.build(
            specs(self.model, config, network),
            rank=self.rank,
            world_size=self.world_size,
            address=("127.0.0.1", self.port),
        )

    def everywhere(self, value) -> list:
        found = [None] * self.world_size
        torch.distributed.all_gather_object(found, value)
        return found

    def annotate(self, learner, examples, columns):
        shards = self.everywhere(learner.annotate_shard(examples, columns))
        assert sorted(index for shard in shards for index, _ in shard) == list(range(len(examples)))
        return merge_annotations(examples, shards)

    def update(self, learner, examples, algorithm, plan):
        return merge_metrics(self.everywhere(learner.update_shard(examples, algorithm, plan)))

    def train(self, roles, examples, **plan):
        return train(roles, examples, annotate=self.annotate, update=self.update, **plan)

    def write(self, name: str, **found) -> None:
        if self.rank == 0:
            torch.save(found, self.out / f"{name}.pt")

    def training(self, name: str, settings: dict, count: int, plan: dict) -> None:
        roles = self.build(**settings)
        metrics = self.train(roles, pairs(count), **plan)
        annotated = self.annotate(roles["reference"], pairs(count), [Column.LOGPS])
        measured = roles["policy"].measure_shard(annotated, plan.get("algorithm", DPO))
        metrics.append(merge_metrics(self.everywhere(measured)))
        self.write(name, metrics=metrics, weights=weights(roles["policy"]))
        close(roles)

    def weights_travel(self) -> None:
        """Refresh, push, export and log-probs."""
        roles = self.build(micro_batch_tokens=40)
        policy, reference = roles["policy"], roles["reference"]
        found = {"first": weights(reference)}
        self.train(roles, pairs(3))
        found["policy"] = weights(policy)
        reference.refresh("policy", decay=0.75)
        found["averaged"] = weights(reference)
        reference.refresh("policy")
        found["replaced"] = weights(reference)
        found["policy_logps"], found["reference_logps"] = policy.logps(PROBES), reference.logps(PROBES)
        self.train(roles, pairs(3), start=2, steps=1)  # the partitions still serve after being written to
        policy.wrap_chunk = lambda array: array.copy()
        push = policy.push(4)
        assert self.rank == 0 or (not push.manifest and not push.chunks)
        found["pushed"] = {name: tensor.clone() for chunk in push.chunks for name, tensor in unpack(chunk)}
        found["last"], found["last_logps"] = weights(policy), policy.logps(PROBES)
        export = self.out / "export"
        export.mkdir(exist_ok=True)
        policy.export(export)
        self.write("travel", version=push.version, **found)
        close(roles)

    def scores_travel(self) -> None:
        """A score network's values, those of one that was restored, and an export."""
        roles = self.build(network="score")
        self.train(roles, pairs(3), algorithm=Compared())
        saved, export = self.out / "scores", self.out / "reward"
        for folder in (saved, export):
            folder.mkdir(exist_ok=True)
        roles["policy"].save(saved)
        roles["policy"].export(export)
        values = self.annotate(roles["policy"], pairs(4), [Column.VALUES])
        close(roles)
        roles = self.build(network="score")
        roles["policy"].restore(saved)
        self.write("scores", values=values, again=self.annotate(roles["policy"], pairs(4), [Column.VALUES]))
        close(roles)

    def resumed(self, dtype: str) -> None:
        """Saved, built anew, restored, and trained on: next to a run that was never interrupted."""

        def prepared():
            roles = self.build(dtype)
            self.train(roles, pairs(4))
            roles["reference"].refresh("policy", decay=0.5)
            return roles

        roles, folder = prepared(), self.out / f"saved-{dtype}"
        for role, learner in roles.items():
            (folder / role).mkdir(parents=True, exist_ok=True)
            learner.save(folder / role)
        want = self.train(roles, pairs(4, seed=9), start=2)
        straight = {role: weights(learner) for role, learner in roles.items()}
        close(roles)
        again = self.build(dtype)
        for role, learner in again.items():
            learner.restore(folder / role)
        got = self.train(again, pairs(4, seed=9), start=2)
        self.write(
            f"resumed-{dtype}",
            want=want,
            got=got,
            straight=straight,
            again={role: weights(learner) for role, learner in again.items()},
        )
        close(again)
        if dtype == "float32":
            self.other_shapes_are_refused(folder)

    def other_shapes_are_refused(self, folder: Path) -> None:
        stage = (self.stage + 1) % 4
        roles = self.build(stage=stage)
        for role, learner in roles.items():
            with pytest.raises(CheckpointError) as caught:
                learner.restore(folder / role)
            assert f"ZeRO stage {self.stage} in the checkpoint, {stage} in the config" in caught.value.value
        close(roles)
        roles, edited = self.build(), self.out / f"edited-{self.rank}"
        shutil.copytree(folder / "policy", edited)
        marker = json.loads((edited / "learner.json").read_text()) | {"ranks": 7}
        (edited / "learner.json").write_text(json.dumps(marker))
        with pytest.raises(CheckpointError, match="another number of ranks") as caught:
            roles["policy"].restore(edited)
        assert "7" in caught.value.value and str(self.world_size) in caught.value.value
        close(roles)

    def moving_average_in_bfloat16(self) -> None:
        """Many small moves towards the policy, each below what bfloat16 resolves."""
        roles = self.build("bfloat16")
        metrics = self.train(roles, pairs(4), steps=3)
        metrics += self.train(roles, pairs(4), start=3, steps=1, algorithm=Distilled(), epochs=2)
        assert all(np.isfinite(value) for step in metrics for value in step.values())
        first = weights(roles["reference"])
        for _ in range(30):
            roles["reference"].refresh("policy", decay=0.98)
        self.write("average", first=first, policy=weights(roles["policy"]), averaged=weights(roles["reference"]))
        close(roles)

    def not_finite(self) -> None:
        """One rank's loss, or a gradient: every rank stops, and none has stepped."""
        for dtype in ("float32", "bfloat16"):
            for where, message in (("loss", "the loss"), ("gradient", "the gradient norm")):
                roles = self.build(dtype)
                before = weights(roles["policy"])
                stopped = pytest.raises(TrainingStopped, match=message)
                with stopped:
                    roles["policy"].update_shard(pairs(5), Broken(where), UpdatePlan(step=1))
                assert all(torch.equal(tensor, before[name]) for name, tensor in weights(roles["policy"]).items())
                close(roles)


def close(roles: dict) -> None:
    for learner in list(roles.values()):
        learner.close()
    assert not roles


def launch(world_size: int, stages: list[int], model: Path, out: Path, timeout: timedelta) -> None:
    """Spawn the ranks and wait. Raises what a rank raised, or TimeoutError when they hang."""
    import time

    port = free_port()
    target: Callable = main
    context = spawn(target, (world_size, port, stages, str(model), str(out)), world_size, join=False)
    end = time.monotonic() + timeout.total_seconds()
    while not context.join(timeout=5):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"the ranks of stages {stages} hang")

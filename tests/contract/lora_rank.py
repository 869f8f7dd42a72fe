"""What one rank does in test_lora_deepspeed, and what one process with torch does: the same story of a run.

Rank 0 writes what was found to a file; the test compares. What holds on every rank is asserted here.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from rayalign.errors import CheckpointError
from rayalign.learners.base import LearnerSpec, merge_annotations, merge_metrics
from rayalign.learners.deepspeed import DeepSpeedLearnerConfig
from rayalign.learners.settings import LoraConfig
from rayalign.sync.flat import unpack
from rayalign.types import Column
from tests.contract.learner_cases import OPTIMIZER, PROBES, Compared, Distilled, pairs, train, weights
from tests.ranks import free_port, spawn

LORA = LoraConfig(rank=4, alpha=8)


def specs(model: Path, settings, *, follows: bool = False, network: str = "causal", lora: LoraConfig | None = LORA):
    """A policy with adapters, and a reference in the same model: without adapter, or with one that follows."""
    common = dict(settings=settings, total_steps=5, temperature=0.8, seed=3)
    adapters = ("reference",) if follows else ()
    found = [
        LearnerSpec("policy", str(model), optimizer=OPTIMIZER, network=network, lora=lora, adapters=adapters, **common)
    ]
    if network == "causal":
        found.append(LearnerSpec("reference", str(model), trainable=False, shares="policy", **common))
    return found


def own(learner) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().float().cpu().clone() for name, tensor in learner.own_tensors()}


class Story:
    """Runs that are told in the same way on one process and on many ranks."""

    def __init__(self, out: Path, model: Path):
        self.out, self.model = out, model
        out.mkdir(parents=True, exist_ok=True)

    # One process; ranks say otherwise.

    def build(self, **kinds):
        from rayalign.learners.torch import TorchLearnerConfig

        settings = TorchLearnerConfig(dtype=kinds.pop("dtype", "float32"))
        return settings.build(specs(self.model, settings, **kinds), rank=0, world_size=1, address=("", 0))

    def annotate(self, learner, examples, columns):
        return learner.annotate(examples, columns)

    def update(self, learner, examples, algorithm, plan):
        return learner.update(examples, algorithm, plan)

    def write(self, name: str, **found) -> None:
        torch.save(found, self.out / f"{name}.pt")

    # The story.

    def train(self, roles, examples, **plan):
        return train(roles, examples, annotate=self.annotate, update=self.update, **plan)

    def tell(self) -> None:
        self.off()
        self.followed()
        self.scored()
        self.resumed("float32")
        self.resumed("bfloat16")
        self.exported()

    def off(self) -> None:
        """The reference is the model without its adapter, in a loss and in the exact KL."""
        roles = self.build()
        first = weights(roles["policy"])
        metrics = self.train(roles, pairs(5))
        metrics += self.train(roles, pairs(4, seed=1), start=2, algorithm=Distilled())
        metrics += self.train(roles, pairs(1), start=4, steps=1)  # fewer examples than ranks
        assert all(torch.equal(tensor, first[name]) for name, tensor in weights(roles["reference"]).items())
        found = self.annotate(roles["reference"], pairs(4), [Column.LOGPS])
        self.write("off", metrics=metrics, own=own(roles["policy"]), reference=found, first=first)
        close(roles)

    def followed(self) -> None:
        """The reference is a second adapter: averaged, trained against, replaced."""
        roles = self.build(follows=True)
        same = own(roles["reference"])
        assert all(torch.equal(tensor, same[name]) for name, tensor in own(roles["policy"]).items())
        metrics = self.train(roles, pairs(4))
        roles["reference"].refresh("policy", decay=0.75)
        averaged = own(roles["reference"])
        metrics += self.train(roles, pairs(4, seed=1), start=2, algorithm=Distilled())
        logps = roles["reference"].logps(PROBES)
        roles["reference"].refresh("policy")
        found = dict(replaced=own(roles["reference"]), same=roles["reference"].logps(PROBES))
        metrics += self.train(roles, pairs(4, seed=2), start=4, steps=1)
        self.write(
            "followed",
            metrics=metrics,
            own=own(roles["policy"]),
            averaged=averaged,
            logps=logps,
            policy=roles["policy"].logps(PROBES),
            **found,
        )
        close(roles)

    def scored(self) -> None:
        """A score network: its head is trained in full."""
        roles = self.build(network="score")
        metrics = [self.update_scores(roles, step) for step in range(2)]
        values = self.annotate(roles["policy"], pairs(4), [Column.VALUES])
        export = self.out / "reward"
        export.mkdir(exist_ok=True)
        roles["policy"].export(export)
        self.write("scored", metrics=metrics, own=own(roles["policy"]), values=values)
        close(roles)

    def update_scores(self, roles, step: int):
        from rayalign.protocols import UpdatePlan

        return self.update(roles["policy"], pairs(4), Compared(), UpdatePlan(step=step))

    def resumed(self, dtype: str) -> None:
        """Saved, built anew, restored, and trained on: next to a run that was never interrupted."""
        roles, folder = self.build(follows=True, dtype=dtype), self.out / f"saved-{dtype}"
        self.train(roles, pairs(4))
        roles["reference"].refresh("policy", decay=0.5)
        for role, learner in roles.items():
            (folder / role).mkdir(parents=True, exist_ok=True)
            learner.save(folder / role)
        want = self.train(roles, pairs(4, seed=9), start=2)
        straight = {role: own(learner) for role, learner in roles.items()}
        close(roles)
        roles = self.build(follows=True, dtype=dtype)
        for role, learner in roles.items():
            learner.restore(folder / role)
        got = self.train(roles, pairs(4, seed=9), start=2)
        again = {role: own(learner) for role, learner in roles.items()}
        self.write(f"resumed-{dtype}", want=want, got=got, straight=straight, again=again)
        close(roles)
        for other, said in ((LoraConfig(rank=8, alpha=8), "rank 4"), (None, "no lora")):
            roles = self.build(lora=other, dtype=dtype)
            with pytest.raises(CheckpointError, match="other adapters") as caught:
                roles["policy"].restore(folder / "policy")
            assert said in caught.value.value and "rank 4" in caught.value.value
            close(roles)

    def exported(self) -> None:
        """Pushed and exported: merged, and the adapter beside it, or the adapter alone."""
        for merge in (True, False):
            roles = self.build(lora=LORA.model_copy(update={"merge": merge}))
            self.train(roles, pairs(3))
            roles["policy"].wrap_chunk = lambda array: array.copy()
            push = roles["policy"].push(4)
            found = {name: tensor.clone() for chunk in push.chunks for name, tensor in unpack(chunk)}
            export = self.out / ("merged" if merge else "adapter")
            export.mkdir(exist_ok=True)
            roles["policy"].export(export)
            logps = roles["policy"].logps(PROBES)
            base = {name: p.shape for name, p in roles["policy"].policy.named_weights()}
            self.write(export.name, pushed=found, weights=weights(roles["policy"]), logps=logps, base=list(base))
            close(roles)


class Ranks(Story):
    """The same on DeepSpeed, as one of the ranks."""

    def __init__(self, out: Path, model: Path, rank: int, world_size: int, port: int, stage: int):
        super().__init__(out, model)
        self.rank, self.world_size, self.port, self.stage = rank, world_size, port, stage

    def build(self, **kinds):
        dtype = kinds.pop("dtype", "float32")
        settings = DeepSpeedLearnerConfig(zero_stage=self.stage, dtype=dtype, deadline_s=120, micro_batch_tokens=60)
        return settings.build(
            specs(self.model, settings, **kinds),
            rank=self.rank,
            world_size=self.world_size,
            address=("127.0.0.1", self.port),
        )

    def everywhere(self, value) -> list:
        found = [None] * self.world_size
        torch.distributed.all_gather_object(found, value)
        return found

    def annotate(self, learner, examples, columns):
        return merge_annotations(examples, self.everywhere(learner.annotate_shard(examples, columns)))

    def update(self, learner, examples, algorithm, plan):
        return merge_metrics(self.everywhere(learner.update_shard(examples, algorithm, plan)))

    def write(self, name: str, **found) -> None:
        if self.rank == 0:
            super().write(name, **found)


def close(roles: dict) -> None:
    for learner in list(roles.values()):
        learner.close()
    assert not roles


def main(rank: int, world_size: int, port: int, stages: list[int], model: str, out: str) -> None:
    torch.set_num_threads(1)
    for stage in stages:
        Ranks(Path(out) / f"stage{stage}", Path(model), rank, world_size, port, stage).tell()
    torch.distributed.barrier()


def launch(world_size: int, stages: list[int], model: Path, out: Path, timeout: timedelta) -> None:
    """Spawn the ranks and wait. Raises what a rank raised, or TimeoutError when they hang."""
    port = free_port()
    arguments = (world_size, port, stages, str(model), str(out))
    context = spawn(main, arguments, world_size, join=False)
    end = time.monotonic() + timeout.total_seconds()
    while not context.join(timeout=5):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"the ranks of stages {stages} hang")

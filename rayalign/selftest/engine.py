"""vLLM in this process: start, a push of weights, sleep and wake.

Run as a child: `python -m rayalign.selftest.engine`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayalign.selftest.stage import CHECKPOINT, PUSH, PUSH_TP, START, START_TP, WAKE, Note, stage
from rayalign.selftest.training import MAX_GAP, dtype_for, engine_settings
from rayalign.types import Completion, Request, Sampling

GIB = 2**30
PROBE = tuple(range(40, 72))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rayalign.selftest.engine")
    parser.add_argument("model", type=Path)
    parser.add_argument("--weights", type=Path, help="checkpoint whose weights are pushed; none: only the start")
    parser.add_argument("--ranks", type=int, default=1, help="tensor parallel")
    parser.add_argument("--gpus-gib", type=float, nargs="*", default=[])
    options = parser.parse_args(arguments)
    tried = Engine(options.model, options.ranks, options.gpus_gib)
    with stage(START if options.ranks == 1 else START_TP, "without vLLM there is engine.name=transformers") as note:
        tried.start(note)
    if tried.engine is None:
        return 1
    try:
        if options.weights is not None:
            learner = None
            with stage(CHECKPOINT) as note:
                learner = tried.learner(options.weights, note)
            if learner is not None:
                with stage(PUSH if options.ranks == 1 else PUSH_TP) as note:
                    tried.push(learner, note)
            if options.ranks == 1:
                with stage(WAKE) as note:
                    tried.sleep_and_wake(note)
    finally:
        tried.engine.close()
    return 0


class Engine:
    """One engine, and what is tried on it."""

    def __init__(self, model: Path, ranks: int, gpus_gib: list[float]):
        self.model, self.ranks, self.gpus_gib = model, ranks, gpus_gib
        self.dtype = dtype_for(gpus_gib)
        self.engine: Any = None

    def start(self, note: Note) -> None:
        from rayalign.engines.vllm import VLLMEngineConfig

        settings = engine_settings(self.gpus_gib)
        config = VLLMEngineConfig(**settings, dtype=self.dtype, tensor_parallel=self.ranks)
        engine = config.build(model=str(self.model))
        self.engine = engine
        tokens = sum(len(completion.token_ids) for completion in self.sample())
        note.found = f"{tokens} tokens sampled in {self.dtype} on {'a GPU' if self.gpus_gib else 'the CPU'}"

    def sample(self) -> list[Completion]:
        """Six completions, always of the same prompts and seeds."""
        requests = [Request(f"r{i}", PROBE[: 4 + i], Sampling(16), seed=i) for i in range(6)]
        self.engine.submit(requests)
        done: dict[str, Completion] = {}
        while len(done) < len(requests):
            done |= {completion.request_id: completion for completion in self.engine.poll()}
        return [done[request.id] for request in requests]

    def learner(self, weights: Path, note: Note) -> Any:
        """The checkpoint that the training left, loaded by transformers."""
        from rayalign.learners.settings import LearnerSpec
        from rayalign.learners.torch import TorchLearnerConfig

        settings = TorchLearnerConfig(dtype=self.dtype)
        spec = LearnerSpec("policy", str(weights), trainable=False, settings=settings)
        note.found = f"transformers loads {weights.name}"
        return settings.build([spec], rank=0, world_size=1, address=("127.0.0.1", 0))["policy"]

    def push(self, learner: Any, note: Note) -> None:
        """The weights arrive, change what the engine computes, and a corrupted push is noticed."""
        from rayalign.errors import SyncMismatch
        from rayalign.sync.handshake import push_weights

        before = self.engine.logps([PROBE])[0]
        push_weights(learner, self.engine, version=1, probe=[PROBE], max_gap=MAX_GAP[self.dtype])
        moved = float(abs(self.engine.logps([PROBE])[0] - before).max())
        if not moved:
            raise RuntimeError("log-probs are the same before and after a push of other weights")
        if {completion.version for completion in self.sample()} != {1}:
            raise RuntimeError("samples do not carry the version that was pushed")
        push = learner.push(2)
        data = push.chunks[0].data.copy()
        data[push.chunks[0].specs[0].offset] ^= 1
        try:
            self.engine.load(replace(push, chunks=(replace(push.chunks[0], data=data), *push.chunks[1:])))
        except SyncMismatch:
            pass
        else:
            raise RuntimeError("a push with a wrong bit was taken for a good one")
        gap = push_weights(learner, self.engine, version=3, probe=[PROBE], max_gap=MAX_GAP[self.dtype])
        note.found = (
            f"{len(push.manifest)} tensors checksummed, a wrong bit noticed, "
            f"log-prob gap {gap['sync/logp_gap_mean']:.1e}"
        )

    def sleep_and_wake(self, note: Note) -> None:
        """The same samples afterwards, and on a GPU memory that was free meanwhile."""
        before, free = self.sample(), self.free_gib()
        self.engine.sleep()
        asleep = self.free_gib()
        self.engine.wake()
        after = self.sample()
        if [completion.token_ids for completion in after] != [completion.token_ids for completion in before]:
            raise RuntimeError("samples with the same seeds differ after waking")
        if not self.gpus_gib:
            note.found = "called in order, the same samples after waking; on a CPU there is no memory to free"
            return
        if asleep - free < 0.5:
            raise RuntimeError(f"{free:.2f} GiB of the GPU were free before and {asleep:.2f} GiB during sleep")
        note.found = (
            f"{asleep - free:.1f} GiB of the GPU freed ({free:.1f} → {asleep:.1f} GiB free), "
            f"{self.free_gib():.1f} GiB free and the same samples after waking"
        )

    def free_gib(self) -> float:
        import torch

        return torch.cuda.mem_get_info()[0] / GIB if self.gpus_gib else 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

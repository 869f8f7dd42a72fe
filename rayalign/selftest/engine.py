"""vLLM in this process: start, a push of weights, sleep and wake; then, where asked for, the same tensor parallel.

Run as a child: `python -m rayalign.selftest.engine`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayalign.selftest.devices import MAX_GAP, Gpu, engine_dtype, engine_settings, learner_dtype
from rayalign.selftest.stage import PUSH, PUSH_TP, START, START_TP, WAKE, Note, stage
from rayalign.types import Completion, Request, Sampling

GIB = 2**30
PROBE = tuple(range(40, 72))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rayalign.selftest.engine")
    parser.add_argument("model", type=Path)
    parser.add_argument("--weights", type=Path, help="checkpoint whose weights are pushed; none: only the start")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="tensor parallel, one engine for each")
    parser.add_argument("--gpus", type=Gpu.parse, nargs="*", default=[])
    options = parser.parse_args(arguments)
    started = [_try(Engine(options.model, ranks, options.gpus), options.weights) for ranks in options.ranks]
    return 0 if all(started) else 1


def _try(tried: Engine, weights: Path | None) -> bool:
    """All stages of one engine; whether it started."""
    single = tried.ranks == 1
    with stage(START if single else START_TP, "without vLLM there is engine.name=transformers") as note:
        tried.start(note)
    if tried.engine is None:
        return False
    try:
        if weights is not None:
            with stage(PUSH if single else PUSH_TP) as note:
                tried.push(weights, note)
            if single:
                with stage(WAKE) as note:
                    tried.sleep_and_wake(note)
    finally:
        tried.engine.close()
    return True


class Engine:
    """One engine, and what is tried on it."""

    def __init__(self, model: Path, ranks: int, gpus: list[Gpu]):
        self.model, self.ranks, self.gpus = model, ranks, gpus
        self.engine: Any = None

    def start(self, note: Note) -> None:
        from rayalign.engines.vllm import VLLMEngineConfig

        config = VLLMEngineConfig(**engine_settings(self.gpus), tensor_parallel=self.ranks)
        self.engine = config.build(model=str(self.model))
        tokens = sum(len(completion.token_ids) for completion in self.sample())
        note.found = f"{tokens} tokens sampled in {config.dtype} on {'a GPU' if self.gpus else 'the CPU'}"

    def sample(self) -> list[Completion]:
        """Six completions, always of the same prompts and seeds."""
        requests = [Request(f"r{i}", PROBE[: 4 + i], Sampling(16), seed=i) for i in range(6)]
        self.engine.submit(requests)
        done: dict[str, Completion] = {}
        while len(done) < len(requests):
            done |= {completion.request_id: completion for completion in self.engine.poll()}
        return [done[request.id] for request in requests]

    def learner(self, weights: Path) -> Any:
        from rayalign.learners.settings import LearnerSpec
        from rayalign.learners.torch import TorchLearnerConfig

        settings = TorchLearnerConfig(dtype=learner_dtype(self.gpus))
        spec = LearnerSpec("policy", str(weights), trainable=False, settings=settings)
        return settings.build([spec], rank=0, world_size=1, address=("127.0.0.1", 0))["policy"]

    def push(self, weights: Path, note: Note) -> None:
        """The weights arrive, change what the engine computes, and a corrupted push is noticed."""
        from rayalign.errors import SyncMismatch
        from rayalign.sync.handshake import push_weights

        learner, max_gap = self.learner(weights), MAX_GAP[engine_dtype(self.gpus)]
        before = self.engine.logps([PROBE])[0]
        push_weights(learner, self.engine, version=1, probe=[PROBE], max_gap=max_gap)
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
        gap = push_weights(learner, self.engine, version=3, probe=[PROBE], max_gap=max_gap)
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
        if not self.gpus:
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

        return torch.cuda.mem_get_info()[0] / GIB if self.gpus else 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

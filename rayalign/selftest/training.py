"""The real path: `rayalign train` on a tiny model, with Ray actors, vLLM and DeepSpeed, and what it has to leave."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml
from safetensors import safe_open

from rayalign.selftest.child import Child
from rayalign.selftest.devices import MAX_GAP, Gpu, engine_dtype, engine_settings, learner_dtype
from rayalign.selftest.stage import CHECKPOINT, OBJECT_STORE, TRAINING, Stage, Stages

DEADLINE_S = 300.0
STEPS = 2


def training_stages(model: Path, folder: Path, *, gpus: Sequence[Gpu]) -> Stages:
    """Two steps of online DPO in `folder`/run; then what the run's files say about steps, pushes and checkpoint."""
    started = perf_counter()
    config, run = write_config(model, folder, gpus=gpus), folder / "run"
    child = Child(["rayalign.cli", "train", str(config)], deadline_s=DEADLINE_S, log=folder / "training.log")
    with closing(child.lines()) as lines:
        yield from (None for _ in lines)
    seconds = perf_counter() - started
    if trouble := child.trouble():
        yield Stage(TRAINING, "failed", trouble, f"see {child.log} and {run / 'log'}", seconds)
        for name in (OBJECT_STORE, CHECKPOINT):
            yield Stage(name, "skipped", "not tried: the training did not end well")
        return
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]

    def judged(name: str, problem: str, found: str, seconds: float = 0.0) -> Stage:
        if problem:
            return Stage(name, "failed", problem, f"see {run}", seconds)
        return Stage(name, "passed", found, seconds=seconds)

    losses = " → ".join(f"{step.get('loss', math.nan):.3f}" for step in steps)
    found = f"{STEPS} steps of online DPO: vLLM, rules scorer, DeepSpeed; loss {losses}"
    yield judged(TRAINING, training_problem(steps), found, seconds)
    gap = max((step.get("sync/logp_gap_mean", math.nan) for step in steps), default=math.nan)
    found = f"{STEPS} pushes checksummed, samples carry their versions, log-prob gap {gap:.1e}"
    yield judged(OBJECT_STORE, push_problem(steps, samples, max_gap=MAX_GAP[engine_dtype(gpus)]), found)
    found = f"step-{STEPS} holds each tensor of the model, in its shape"
    yield judged(CHECKPOINT, checkpoint_problem(model, written_checkpoint(folder)), found)


def written_checkpoint(folder: Path) -> Path | None:
    """What the training in `folder` left, None when it left none."""
    path = folder / "run" / "checkpoints" / f"step-{STEPS}"
    return path if (path / "model.safetensors").is_file() else None


def checkpoint_problem(model: Path, written: Path | None) -> str:
    """What is wrong with the checkpoint of a training that began from `model`, or an empty string."""
    if written is None:
        return f"the training left no checkpoint of step {STEPS}"
    began, ended = _shapes(model), _shapes(written)
    differing = sorted(name for name in began.keys() | ended.keys() if began.get(name) != ended.get(name))
    return f"{len(differing)} tensors are not those of the model, as {differing[0]}" if differing else ""


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "np") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def training_problem(steps: Sequence[dict[str, Any]]) -> str:
    """What is wrong with a run's metrics, or an empty string."""
    if len(steps) != STEPS:
        return f"{len(steps)} steps were recorded, not {STEPS}"
    losses = [step.get("loss", math.nan) for step in steps]
    if not all(map(math.isfinite, losses)):
        return f"losses {losses} are not all finite numbers"
    # At the first step policy and reference are equal, so DPO's loss is log 2: what moves it is the update.
    return "the loss did not move after an update" if abs(losses[1] - losses[0]) < 1e-6 else ""


def push_problem(steps: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]], *, max_gap: float) -> str:
    """What is wrong with a run's pushes, or an empty string: each step samples from the weights pushed before."""
    pushed = [step.get("sync/version") for step in steps]
    if pushed != list(range(1, STEPS + 1)):
        return f"versions {pushed} were pushed, not 1 to {STEPS}"
    sampled = {(sample["step"], sample["version"]) for sample in samples}
    if sampled != {(step, step - 1) for step in range(1, STEPS + 1)}:
        return f"samples have (step, version) {sorted(sampled)}; a step samples from the weights of the step before"
    gaps = [step.get("sync/logp_gap_mean", math.nan) for step in steps]
    if not all(gap <= max_gap for gap in gaps):  # a NaN is a mismatch as well
        return f"log-prob gaps {gaps} between learner and engine, not all at most {max_gap:g}"
    return ""


def write_config(model: Path, folder: Path, *, gpus: Sequence[Gpu]) -> Path:
    """The config of the run. On a single GPU engine and learner take turns, which is sleep and wake as well."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"one sentence about film {i}"}) + "\n" for i in range(8)))
    config = {
        "model": {"path": str(model), "dtype": learner_dtype(gpus)},
        "data": {"prompts": str(prompts), "chat_template": False},
        "algorithm": {"name": "online_preference", "samples": 4},
        "scorer": {"name": "rules", "rule": "brevity"},
        "sampling": {"max_tokens": 24},
        "rollout": {"prompts": 4},
        "train": {"steps": STEPS},
        "optimizer": {"lr": 1e-3},
        "engine": {"name": "vllm", **engine_settings(gpus)},
        "learner": {"name": "deepspeed", "zero_stage": 2, "deadline_s": DEADLINE_S},
        "placement": {"name": "ray", "object_store_gib": 0.1, "colocate": len(gpus) == 1},
        "sync": {"max_gap": MAX_GAP[engine_dtype(gpus)]},
        "evaluation": {"prompts": 0},
        "trackers": [],
        "run_dir": str(folder / "run"),
    }
    path = folder / "selftest.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path

"""The real path: `rayalign train` on a tiny model, with Ray actors, vLLM and DeepSpeed, and what it has to leave."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml

from rayalign.selftest.child import Child
from rayalign.selftest.stage import OBJECT_STORE, TRAINING, Stage

DEADLINE_S = 300.0
STEPS = 2
MAX_GAP = {"float32": 1e-3, "bfloat16": 0.15}  # nats a token, as the training itself holds it


def training_stages(model: Path, folder: Path, *, gpus_gib: Sequence[float]) -> Iterator[Stage]:
    """Two steps of online DPO in `folder`/run; then what the run's files say about steps and pushes."""
    started = perf_counter()
    config = write_config(model, folder, gpus_gib=gpus_gib)
    child = Child(["rayalign.cli", "train", str(config)], deadline_s=DEADLINE_S, log=folder / "training.log")
    for _ in child.lines():
        pass
    seconds = perf_counter() - started
    if trouble := child.trouble():
        yield Stage(TRAINING, "failed", trouble, f"see {child.log} and {folder / 'run' / 'log'}", seconds)
        yield Stage(OBJECT_STORE, "skipped", "not tried: the training did not end well")
        return
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    log = f"see {folder / 'run'}"
    problem = training_problem(steps)
    found = problem or "{} steps of online DPO: vLLM, rules scorer, DeepSpeed; loss {:.3f} → {:.3f}".format(
        STEPS, *(step["loss"] for step in steps)
    )
    yield Stage(TRAINING, "failed" if problem else "passed", found, log if problem else "", seconds)
    problem = push_problem(steps, samples, max_gap=MAX_GAP[dtype_for(gpus_gib)])
    gap = max(step.get("sync/logp_gap_mean", math.nan) for step in steps)
    found = problem or f"{STEPS} pushes checksummed, samples carry their versions, log-prob gap {gap:.1e}"
    yield Stage(OBJECT_STORE, "failed" if problem else "passed", found, log if problem else "")


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


def write_config(model: Path, folder: Path, *, gpus_gib: Sequence[float]) -> Path:
    """The config of the run. On a single GPU engine and learner take turns, which is sleep and wake as well."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"one sentence about film {i}"}) + "\n" for i in range(8)))
    config = {
        "model": {"path": str(model), "dtype": dtype_for(gpus_gib)},
        "data": {"prompts": str(prompts), "chat_template": False},
        "algorithm": {"name": "online_preference", "samples": 4},
        "scorer": {"name": "rules", "rule": "brevity"},
        "sampling": {"max_tokens": 24},
        "rollout": {"prompts": 4},
        "train": {"steps": STEPS},
        "optimizer": {"lr": 1e-3},
        "engine": {"name": "vllm", **engine_settings(gpus_gib)},
        "learner": {"name": "deepspeed", "zero_stage": 2, "deadline_s": DEADLINE_S},
        "placement": {"name": "ray", "object_store_gib": 0.1, "colocate": len(gpus_gib) == 1},
        "evaluation": {"prompts": 0},
        "trackers": [],
        "run_dir": str(folder / "run"),
    }
    path = folder / "selftest.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def dtype_for(gpus_gib: Sequence[float]) -> str:
    return "bfloat16" if gpus_gib else "float32"  # attention kernels of GPUs have no float32


def engine_settings(gpus_gib: Sequence[float]) -> dict[str, Any]:
    """Of a tiny engine: about 3 GiB of a GPU, so that it fits beside others."""
    share = min(0.9, max(0.05, 3 / min(gpus_gib))) if gpus_gib else 0.85
    return {
        "max_context": 128,
        "max_running": 16,
        "kv_cache_gib": 0.1,
        "gpu_memory": round(share, 3),
        "deadline_s": 120,
    }

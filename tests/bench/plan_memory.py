"""Estimated against measured peak memory of a learner rank: `python tests/bench/plan_memory.py [MODEL]`.

Each setting runs in a process of its own: policy and reference of the demo's model, examples of full length,
reference log-probs, and two updates. Measured is the highest resident set of that process; estimated is what
`rayalign plan` says for it. Takes some minutes on two cores, and up to 6 GiB.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from rayalign.algorithms.online_preference import OnlinePreference  # noqa: E402
from rayalign.config import load_config  # noqa: E402
from rayalign.plan.batches import count_batches  # noqa: E402
from rayalign.plan.learners import learner_memory  # noqa: E402
from rayalign.plan.records import GIB, Lengths  # noqa: E402
from rayalign.plan.shapes import read_shape  # noqa: E402
from rayalign.protocols import UpdatePlan  # noqa: E402
from rayalign.run_dir import versions  # noqa: E402
from rayalign.types import Column, Example  # noqa: E402
from rayalign.types import Sequence as Row  # noqa: E402

PROMPT = 88
SHORT = ["sampling.max_tokens=40"]
HALF = [*SHORT, "learner.micro_batch_tokens=1024"]
SETTINGS = {
    "bf16, stage 0": ["learner.zero_stage=0", *SHORT],
    "bf16, stage 2": ["learner.zero_stage=2", *SHORT],
    "bf16, stage 3": ["learner.zero_stage=3", *HALF],
    "bf16, stage 2, offload": ["learner.zero_stage=2", "learner.offload=cpu", *HALF],
    "bf16, stage 0, small micro-batch": ["learner.zero_stage=0", "learner.micro_batch_tokens=256", *SHORT],
    "bf16, stage 0, recomputed": ["learner.zero_stage=0", "learner.gradient_checkpointing=true", *SHORT],
    "float32, stage 0": ["learner.zero_stage=0", "model.dtype=float32", *HALF],
    "float32, stage 2": ["learner.zero_stage=2", "model.dtype=float32", "learner.micro_batch_tokens=512", *SHORT],
    "torch, float32": ["learner={name: torch}", "model.dtype=float32", *HALF],
    "torch, bf16": ["learner={name: torch}", *SHORT],
}


def prepared(model: str, overrides: list[str]) -> tuple[Any, Any, Any]:
    """(config, shape, micro-batch) as a plan has them."""
    config = load_config(ROOT / "configs/demo.yaml", [f"model.path={model}", *overrides])
    shape = read_shape(model)
    lengths = Lengths(PROMPT, PROMPT, 192, 48, 0, True, "")
    return config, shape, count_batches(config, lengths)[1]


def estimate(model: str, overrides: list[str]) -> float:
    config, shape, micro = prepared(model, overrides)
    return sum(role.host.total for role in learner_memory(config, shape, micro, on_gpu=False)) / GIB


def measure(model: str, overrides: list[str]) -> float:
    """Peak of this process in GiB, after two updates on examples of full length."""
    import ray  # noqa: F401  (a learner lives in one of Ray's processes)
    import torch

    from rayalign.build import learner_specs, load_tokenizer

    config, _, _ = prepared(model, overrides)
    torch.set_num_threads(2)
    specs = learner_specs(config, load_tokenizer(config), policy=None, train=True)
    roles = config.learner.build(specs, rank=0, world_size=1, address=("127.0.0.1", 29571))
    steps, prompt = config.sampling.max_tokens, tuple(range(100, 100 + PROMPT))
    rows = [tuple((7 * i + j) % 4000 + 100 for j in range(steps)) for i in range(2 * config.rollout.prompts)]
    examples = [Example((Row(prompt, a), Row(prompt, b))) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    examples = roles["reference"].annotate(examples, (Column.LOGPS,))
    for step in range(2):
        roles["policy"].update(examples, OnlinePreference(), UpdatePlan(step, 1, 1, seed=step))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], json.loads(sys.argv[3]))))
        return
    model = sys.argv[1] if len(sys.argv) > 1 else "~/.cache/rayalign/models/SmolLM2-135M-Instruct"
    model = str(Path(model).expanduser())
    print(f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}; {model}")
    print(", ".join(f"{name} {number}" for name, number in versions().items()))
    print(f"{'setting':<34} {'estimated':>9} {'measured':>9} {'ratio':>6}")
    for name, overrides in SETTINGS.items():
        command = [sys.executable, __file__, "--one", model, json.dumps(overrides)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name:<34} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        measured, estimated = float(done.stdout.strip().splitlines()[-1]), estimate(model, overrides)
        print(f"{name:<34} {estimated:>9.2f} {measured:>9.2f} {estimated / measured:>6.2f}", flush=True)


if __name__ == "__main__":
    main()

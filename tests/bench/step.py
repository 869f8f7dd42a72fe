"""Where the time of a training step goes, from the metrics.jsonl of real runs: `python tests/bench/step.py`.

  python tests/bench/step.py                              online DPO, PPO and GRPO of configs/, some steps of each
  python tests/bench/step.py configs/ppo.yaml --steps 8   one config
  python tests/bench/step.py --of runs/my-run             a run that is there already; nothing is started
  python tests/bench/step.py --tiny                       a tiny random model in one process, to see that it works

Shares are of the time of the steps, medians of the seconds over steps without the first, which loads and compiles.
`idle` is what nobody accounts for: bookkeeping of the driver. Where rollouts run ahead (rollout.depth above 0) sampling
overlaps the update, and the parts add up to more than a step.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rayalign.api import run_training  # noqa: E402
from rayalign.config import load_config, parse_config  # noqa: E402
from rayalign.metrics import read_records  # noqa: E402
from rayalign.run_dir import versions  # noqa: E402

CONFIGS = ("configs/demo.yaml", "configs/ppo.yaml", "configs/grpo.yaml")
STEP = "time/step_s"
WHOLE = ("rollout", "score", "read", "annotate", "update", "sync")  # in the order of a step
NAMES = {"sync": "push"}
SHOWN = ("torch", "transformers", "vllm", "ray", "deepspeed")


def parts(record: Mapping[str, float]) -> dict[str, float]:
    """Seconds of one step by part; what is annotated and updated by role. They add up to the step, but for overlap."""
    found: dict[str, float] = {}
    for name in WHOLE:
        seconds = record.get(f"time/{name}_s")
        if seconds is None:
            continue
        inside = {key.rpartition("/")[2]: value for key, value in record.items() if key.startswith(f"time/{name}_s/")}
        rest = max(0.0, seconds - sum(inside.values()))
        found |= {f"{name}: {role}": value for role, value in inside.items()}
        if name == "update":
            found["update: policy"] = rest
        else:
            found[f"{name}: rest" if inside else NAMES.get(name, name)] = rest
    found["idle"] = max(0.0, record[STEP] - sum(found.values()))
    return found


def table(records: Sequence[Mapping[str, float]]) -> str:
    """Medians over the steps, without the first where there are more."""
    steps = list(records)[1:] or list(records)
    rows = [parts(record) for record in steps]
    whole = median(record[STEP] for record in steps)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| part | seconds | share |", "|---|---|---|"]
    for name in names:
        seconds = median(row.get(name, 0.0) for row in rows)
        lines.append(f"| {name} | {seconds:.2f} | {seconds / whole:.0%} |")
    return "\n".join([*lines, f"| whole step, median of {len(steps)} | {whole:.2f} | 100% |"])


def machine() -> str:
    """Processor, cores, GPUs and versions."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    has = [model or platform.processor(), f"{len(os.sched_getaffinity(0))} cores", ", ".join(gpus) or "no GPU"]
    known = versions()
    return "; ".join([*has, ", ".join(f"{name} {known[name]}" for name in SHOWN if name in known)])


def run(path: str, steps: int, overrides: Sequence[str], out: Path) -> Path:
    """A short run of this config, without evaluations; its folder."""
    fixed = [f"train.steps={steps}", "evaluation.prompts=0", "checkpoint.every=0", "trackers=[]"]
    config = load_config(ROOT / path, [*fixed, f"run_dir={out / Path(path).stem}", *overrides])
    return run_training(config).run_dir


def run_tiny(algorithm: dict[str, Any], steps: int, out: Path) -> Path:
    from tests.parts import tiny_config
    from tests.tiny_models import build_tiny_llama

    out.mkdir(parents=True)
    return run_training(parse_config(tiny_config(out, build_tiny_llama(out / "model"), algorithm=algorithm,
                                                 train__steps=steps))).run_dir  # fmt: skip


TINY: dict[str, dict[str, Any]] = {
    "online DPO": {"name": "online_preference", "samples": 4},
    "PPO": {"name": "ppo", "samples": 4},
    "GRPO": {"name": "policy_gradient", "advantage": "grpo", "samples": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=list(CONFIGS), metavar="CONFIG_OR_KEY=VALUE")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--of", type=Path, help="the folder of a run")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    overrides = [each for each in arguments.configs if "=" in each]
    configs = [each for each in arguments.configs if "=" not in each] or list(CONFIGS)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.of:
            folders = [(str(arguments.of), lambda: arguments.of)]
        elif arguments.tiny:
            folders = [
                (
                    name,
                    lambda algorithm=algorithm, name=name: run_tiny(algorithm, arguments.steps, Path(scratch) / name),
                )
                for name, algorithm in TINY.items()
            ]
        else:
            folders = [
                (path, lambda path=path: run(path, arguments.steps, overrides, Path(scratch))) for path in configs
            ]
        for name, make in folders:
            print(f"\n{name}\n\n{table(read_records(make() / 'metrics.jsonl'))}", flush=True)


if __name__ == "__main__":
    main()

"""Where algorithms end on actors: two engines, two DeepSpeed ranks, samples one step old, all on this machine.

A language model whose answers can be enumerated, as in tests/loop/test_exact_optimum.py and test_exact_preferences.py,
by the same settings, but for twice the prompts a step and twice the steps, as samples one step old come with more
noise; here on Ray, and with rollout.depth=1 (SPIN, whose opponents are sampled once an iteration, has none, and the
same steps). The table: total variation from the closed-form optimum, at the start and at the end. In one process each
is held below 0.02 by tests; RLOO on actors, too.

  python tests/bench/exact_actors.py                    all rows, one or two minutes each on two cores
  python tests/bench/exact_actors.py --only ppo spin    these
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.exact import build_model, distribution, optimum, preference_optimum, run, variation  # noqa: E402
from tests.loop import test_exact_optimum as gradients  # noqa: E402
from tests.loop import test_exact_preferences as preferences  # noqa: E402

ACTORS = {
    "engine": {"count": 2},
    "learner": {"name": "deepspeed", "zero_stage": 2, "ranks": 2, "threads": 1, "deadline_s": 300},
    "placement": {"name": "ray", "object_store_gib": 0.2},
}
TIMES = 2
OLD = {"importance_cap": 5.0}  # of samples one step old
ROWS = ("rloo", "dr_grpo", "ppo", "online dpo, soft", "online dpo, drawn labels", "online ipo", "spin")


def row(name: str, tiny: Path, folder: Path) -> tuple[float, float]:
    """Total variation from the optimum, at the start and at the end."""
    if name == "spin":
        policy, wanted = preferences.play(folder, tiny, rows=4000, **preferences.LONG, more=ACTORS)
        return variation(distribution(tiny, (1, 2), 2), wanted), variation(policy, wanted)
    length, algorithm, changes = settings(name)
    rollout, train = changes.get("rollout", {}), changes.get("train", {"steps": 60})
    changes = {
        **changes,
        **ACTORS,
        "rollout": {"monitor": 0, **rollout, "prompts": TIMES * rollout.get("prompts", 8), "depth": 1},
        "train": {**train, "steps": TIMES * train["steps"]},
    }
    policy, _ = run(folder, tiny, algorithm, length=length, **changes)
    start = distribution(tiny, (1, 2), length)
    ipo = algorithm.get("loss", {}).get("name") == "ipo"
    wanted = preference_optimum(start, preferences.TAU) if ipo else optimum(start, length)
    return variation(start, wanted), variation(policy, wanted)


def settings(name: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Tokens of an answer, the algorithm, and what differs in the config."""
    if name in gradients.CASES:
        length, algorithm, changes = gradients.CASES[name]
        return length, {**algorithm, **OLD}, {**changes, "optimizer": gradients.RATE}
    algorithm, changes = {
        "online dpo, soft": (preferences.SOFT, preferences.FAST),
        "online dpo, drawn labels": (preferences.DPO, preferences.SLOW),
        "online ipo": (preferences.IPO, preferences.SLOW),
    }[name]
    return 1, algorithm, changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="ROW", choices=ROWS, default=ROWS, help="these rows")
    arguments = parser.parse_args()
    from rayalign.run_dir import versions

    print("| algorithm | total variation, start | end | min |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tiny = build_model(Path(folder) / "model")
        for place, name in enumerate(arguments.only):
            begun = time.time()
            first, last = row(name, tiny, Path(folder) / str(place))
            print(f"| {name} | {first:.3f} | {last:.4f} | {(time.time() - begun) / 60:.1f} |", flush=True)
    print(f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}; {versions()}")


if __name__ == "__main__":
    main()

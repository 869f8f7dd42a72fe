"""SPIN, measured: what iterations do to a small model, and what generation costs.

1. SmolLM2-135M-Instruct is fine-tuned on 192 film reviews (configs/data/review_sft.jsonl), and then plays against
   itself: iterations 0–3. On 48 held-out rows, after each: the win rate over the fine-tuned model (by VADER, the same
   seeds, 95 % bootstrap interval over prompts), the gap between the log-probs of the data's answers and of the policy's
   own, and the data's negative log-likelihood. Beside it, more fine-tuning for as many steps.
2. One and two engines, each on one core, answer the same prompts: answers a second, as the run's record says.
   Beyond, a simulation that is stated with its numbers.

  python tests/bench/spin.py                    all that is not there yet (about 40 minutes on two cores)
  python tests/bench/spin.py --only spin-0.1    these rows
  python tests/bench/spin.py --table            what has been measured so far

Rows are folders of --out: one that ended is not run again, one that was cut short goes on where it was.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MODEL = "~/.cache/rayalign/models/SmolLM2-135M-Instruct"
DATA = ROOT / "configs/data/review_sft.jsonl"
LONGEST = 40  # tokens of an answer
SLOTS = 32  # requests that an engine works on at a time
ENGINES = (1, 2, 4, 8, 16, 64)
COUNTS = (192, 2_000, 50_000, 200_000)  # prompts, of the simulation


def rows(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name → what differs from the shared config. All but the first begin with what the first wrote."""
    steps, iterations = arguments.steps, arguments.iterations
    play = {"name": "spin", "iterations": iterations, "steps": steps, "shard": 64}
    first = {"algorithm": "sft", "train": {"steps": 2 * steps}, "optimizer": {"lr": 3.0e-5}}
    found: dict[str, dict[str, Any]] = {"sft": first}
    for lam in arguments.lam:
        found[f"spin-{lam:g}"] = {"algorithm": {**play, "lam": lam}}
    more = {"algorithm": "sft", "train": {"steps": iterations * steps}, "evaluation": {"every": steps}}
    return found | {"more-sft": more}


def shared(arguments: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    return {
        "model": {"path": arguments.model, "dtype": "bfloat16"},
        "data": {"examples": {"path": str(DATA), "limit": arguments.limit}, "max_tokens": 128},
        "rollout": {"prompts": arguments.batch},
        "optimizer": {"lr": arguments.lr, "warmup_steps": 2},
        "engine": {"name": "vllm", "max_context": 128, "max_running": SLOTS, "kv_cache_gib": 0.5},
        "learner": {"name": "deepspeed", "zero_stage": 0},
        "placement": {"name": "ray", "object_store_gib": 1.0},
        "evaluation": {"prompts": 48, "samples": 4, "show": 0},
        "checkpoint": {"keep": 1},
        "trackers": [],
        "run_dir": str(run_dir),
        "resume": (run_dir / "config.yaml").is_file(),
    }


def run(name: str, row: dict[str, Any], out: Path, arguments: argparse.Namespace) -> None:
    """As `rayalign train` would, in a process of its own."""
    run_dir = out / name
    if (run_dir / "done").is_file():
        return
    config = shared(arguments, run_dir)
    for key, value in row.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    if name != "sft" and not name.startswith("engines"):
        newest = sorted((out / "sft/checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
        config["model"] = {**config["model"], "path": str(newest[-1])}
    if isinstance(config["algorithm"], dict):
        config |= {"sampling": {"max_tokens": LONGEST}, "scorer": {"name": "rules", "rule": "vader"}}
    import yaml

    run_dir.parent.mkdir(parents=True, exist_ok=True)
    file = out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    begun = time.time()
    command = [sys.executable, "-m", "rayalign.cli", "train", str(file)]
    with (out / f"{name}.log").open("a") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
    took = f"{(time.time() - begun) / 60:.1f} min"
    if done.returncode == 0:
        (run_dir / "done").write_text(took)
    print(f"{name}: {took}" if done.returncode == 0 else f"{name}: failed after {took}, see {log.name}", flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def table(out: Path, arguments: argparse.Namespace) -> str:
    """One line an iteration. gap: log π of the data's answer less that of the policy's own, in nats an answer."""
    columns = ("row", "after", "win rate over SFT", "reward", "gap, nats", "gap a token", "held-out NLL")
    columns = (*columns, "sampling, s", "training, s")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in rows(arguments):
        steps = read(out / name / "metrics.jsonl")
        before = 0
        for record in read(out / name / "evaluations.jsonl"):
            step, m = record["step"], record["metrics"]
            part = [r for r in steps if before < r["step"] <= step]
            sampling = sum(r.get("time/rollout_s", 0.0) for r in part)
            training = sum(r["time/step_s"] for r in part) - sampling
            numbers = [_number(m, key) for key in ("win_rate", "reward", "gap", "gap_per_token", "held_out/nll")]
            times = [f"{sampling:.0f}" if sampling else "", f"{training:.0f}" if part else ""]
            lines.append(f"| {name} | step {step} | {' | '.join([*numbers, *times])} |")
            before = step
    return "\n".join(lines)


def _number(metrics: dict[str, float], key: str) -> str:
    if key not in metrics:
        return ""
    low, high = metrics.get(f"{key}/low"), metrics.get(f"{key}/high")
    interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    return f"{metrics[key]:.3f}{interval}"


# What generation costs.


def engine_row(count: int) -> dict[str, Any]:
    """Engines of one core each, one training step behind their answers."""
    return {
        "algorithm": {"name": "spin", "iterations": 1, "steps": 1, "shard": 64},
        "engine": {"count": count, "threads": 1},
        "rollout": {"prompts": 4},
        "evaluation": {"prompts": 0, "rows": 0},
        "data": {"held_out": 0.0},
    }


def measured(out: Path, count: int) -> tuple[float, float, list[int]] | None:
    """Answers a second, tokens a second, and the lengths of the answers."""
    found = read(out / f"engines-{count}" / "metrics.jsonl")
    if not found:
        return None
    lengths = []
    for shard in sorted((out / f"engines-{count}/generations/iteration-0").glob("shard-*.jsonl")):
        lengths += [len(answer["token_ids"]) for answer in read(shard)[1:]]
    seconds = found[0]["time/rollout_s"]
    return len(lengths) / seconds, sum(lengths) / seconds, lengths


def simulate(lengths: Sequence[int], prompts: int, engines: int, step_s: float, slots: int = SLOTS) -> float:
    """Seconds in which all prompts are answered. What is assumed: an engine works on up to `slots` requests, each gets
    a token every `step_s` whatever else is in the batch; a request goes to the engine with the fewest open, and
    2 × engines × slots are open at a time, as in `selfplay`. The wait for weights, the same for any number of prompts,
    and the driver are left out."""
    rng = random.Random(0)
    waiting = [rng.choice(lengths) * step_s for _ in range(prompts)]
    busy: list[list[float]] = [[] for _ in range(engines)]  # of each engine, when its running requests end
    queued: list[list[float]] = [[] for _ in range(engines)]
    loads = [(0, engine) for engine in range(engines)]
    opened = [0] * engines
    ends: list[tuple[float, int]] = []
    now, given = 0.0, 0

    def begin(engine: int) -> None:
        while queued[engine] and len(busy[engine]) < slots:
            end = now + queued[engine].pop(0)
            busy[engine].append(end)
            heapq.heappush(ends, (end, engine))

    while given < prompts or ends:
        while given < prompts and sum(opened) < 2 * engines * slots:
            _, engine = min((opened[e], e) for _, e in loads)
            queued[engine].append(waiting[given])
            opened[engine] += 1
            given += 1
            begin(engine)
        now, engine = heapq.heappop(ends)
        busy[engine].remove(now)
        opened[engine] -= 1
        begin(engine)
    return now


def scaling(out: Path) -> str:
    lines = ["| engines | prompts | answers/s | tokens/s | seconds | |", "|---|---|---|---|---|---|"]
    one = measured(out, 1)
    for count in (1, 2):
        found = measured(out, count)
        if found:
            n = len(found[2])
            lines.append(f"| {count} | {n} | {found[0]:.2f} | {found[1]:.0f} | {n / found[0]:.0f} | measured |")
    if one is None:
        return "\n".join(lines)
    rate, tokens, lengths = one
    ideal = simulate(lengths, len(lengths), 1, 1.0)
    step_s = len(lengths) / rate / ideal  # so that the simulation of one engine takes as long as it was measured
    alone = simulate(lengths, 2_000, 1, step_s) / 2_000  # seconds of an answer by one engine that is busy
    for prompts in COUNTS:
        for engines in ENGINES:
            if prompts < 4 * engines * SLOTS and engines > 2:
                continue
            seconds = simulate(lengths, prompts, engines, step_s)
            lines.append(
                f"| {engines} | {prompts:,} | {prompts / seconds:.1f} | {prompts / seconds * tokens / rate:,.0f} "
                f"| {seconds:,.0f} | simulated, {alone * prompts / engines / seconds:.0%} of linear |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/spin"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="of an iteration")
    parser.add_argument("--lr", type=float, default=2.0e-5, help="of all rows but sft, which has 3e-5")
    parser.add_argument("--batch", type=int, default=24, help="pairs of a step")
    parser.add_argument("--lam", type=float, nargs="*", default=[0.1, 1.0])
    parser.add_argument("--limit", type=int, default=240, help="rows of the data")
    parser.add_argument("--only", nargs="*", metavar="ROW", help="these rows, and engines-1, engines-2")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    wanted = rows(arguments) | {f"engines-{count}": engine_row(count) for count in (1, 2)}
    if unknown := set(arguments.only or ()) - wanted.keys():
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(wanted)}")
    if not arguments.table:
        for name in arguments.only or wanted:
            run(name, wanted[name], out, arguments)
    print(table(out, arguments))
    print(scaling(out))
    from rayalign.run_dir import versions

    print(f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}; {versions()}")


if __name__ == "__main__":
    main()

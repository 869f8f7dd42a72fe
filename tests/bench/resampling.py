"""Online DPO with the same compute, sampling anew every 1, 4 and 16 steps and never.

Each row takes the same number of steps on pairs of the same number of new prompts, samples as many answers, and
differs from the others only in how old the weights are that sampled them: `rollout.resample_every: n` with as many
rollouts at once, and `never`, which is offline DPO on samples of the initial policy. Two halves:

- exact: a policy whose every answer can be enumerated (resampling_exact.py). True reward, KL, the probability mass
  outside of what was ever sampled, and how much of the mass that moved went there: all without an estimator, means over
  seeds with their 95 % interval (normal).
- SmolLM2-135M writes film reviews, ranked by the sentiment rule VADER (the true reward). On held-out prompts: reward,
  KL to the start (k3), and two measures of how far the last policy has left the samples that it last learned from,
  whose sampler are the weights at the beginning of the last set:
  * share outside: of fresh samples of the last policy, how many the sampler finds less likely (mean log-prob a token)
    than 95 % of its own samples. 5 % where nothing has moved; share − 5 % is, but for sampling error, a lower bound of
    the total variation distance between the two policies.
  * KL to the sampler: mean of log π(y) − log π_sampler(y) over the same samples (k1), nats a completion.

  python tests/bench/resampling.py --exact             the exact half, some minutes
  python tests/bench/resampling.py                     both; SmolLM2 takes some minutes a row
  python tests/bench/resampling.py --only never        one row of both
  python tests/bench/resampling.py --table             what has been measured so far
  python tests/bench/resampling.py --tiny --steps 6    the whole of it with a tiny random model, in some minutes

Rows are files and folders of --out: what ended is not run again, a run that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MODEL = "~/.cache/rayalign/models/SmolLM2-135M-Instruct"
PROMPTS = str(ROOT / "configs/prompts/film_reviews.jsonl")
ROWS: dict[str, dict[str, Any]] = {
    "every 1": {"resample_every": 1},
    "every 4": {"resample_every": 4, "at_once": 4},
    "every 16": {"resample_every": 16, "at_once": 16},
    "never": {"resample_every": "never"},
}
EXACT = ("reward", "kl", "outside", "moved", "moved_outside")
QUANTILE = 0.05


def last_set(settings: dict[str, Any], steps: int) -> int:
    """The version of the weights that sampled what the last step learned from."""
    every = settings["resample_every"]
    return 0 if every == "never" else (steps - 1) // every * every


# The exact half


def run_exact(name: str, out: Path, steps: int, seeds: int) -> None:
    import torch

    from tests.bench.resampling_exact import run

    torch.set_num_threads(1)
    (out / "exact").mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        file = _exact_file(out, name, steps, seed)
        if not file.is_file():
            records = run(ROWS[name], seed=seed, steps=steps, every=max(1, steps // 12))
            file.with_suffix(".writing").write_text(json.dumps(records))
            file.with_suffix(".writing").replace(file)
            end = records[-1]
            print(f"exact, {name}, seed {seed}: reward {end['reward']:.3f}, outside {end['outside']:.3f}", flush=True)


def _exact_file(out: Path, name: str, steps: int, seed: int) -> Path:
    return out / "exact" / f"{name.replace(' ', '_')}-{steps}-{seed}.json"


def exact_curves(out: Path, name: str, steps: int, seeds: int) -> dict[str, np.ndarray] | None:
    """Key → [seeds, times]; None where nothing is measured."""
    files = [_exact_file(out, name, steps, seed) for seed in range(seeds)]
    found = [json.loads(file.read_text()) for file in files if file.is_file()]
    keys = found[0][0] if found else ()
    return {key: np.array([[record[key] for record in run] for run in found]) for key in keys} or None


def exact_table(out: Path, steps: int, seeds: int) -> str:
    head = "| resampling | true reward | KL, nats | mass outside the samples | mass moved | of it, outside |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name in ROWS:
        if curves := exact_curves(out, name, steps, seeds):
            ends = {key: curves[key][:, -1] for key in EXACT}
            cells = [_spread(ends["reward"], "{:+.3f}"), *(_spread(ends[key], "{:.3f}") for key in EXACT[1:4])]
            lines.append(f"| {name} | {' | '.join(cells)} | {_spread(ends['moved_outside'], '{:.3f}')} |")
    return "\n".join(lines)


def _spread(values: np.ndarray, form: str) -> str:
    """Mean over seeds with its 95 % interval."""
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{form.format(values.mean())} ± {half:.3f}"


# The half with a language model


def config_of(name: str, run_dir: Path, steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    every = max(1, arguments.steps // 2)
    config: dict[str, Any] = {
        "model": {"path": arguments.model, "dtype": "bfloat16"},
        "data": {"prompts": PROMPTS, "held_out": 0.2},
        "algorithm": {"name": "online_preference", "samples": 4, "loss": {"name": "dpo", "beta": 0.1}},
        "scorer": {"name": "rules", "rule": "vader"},
        "sampling": {"max_tokens": 40},
        "rollout": {"prompts": 4, **ROWS[name]},
        "train": {"steps": steps},
        "optimizer": {"lr": 3.0e-5, "warmup_steps": 5},
        "engine": {"name": "vllm", "max_context": 128, "max_running": 64, "kv_cache_gib": 0.5},
        "learner": {"name": "deepspeed", "zero_stage": 0},
        "placement": {"name": "ray", "object_store_gib": 1.0},
        "evaluation": {"prompts": 40, "samples": 4, "every": every, "show": 0},
        "checkpoint": {"every": 0, "keep": 2},
        "run_dir": str(run_dir),
        "resume": (run_dir / "metrics.jsonl").is_file(),
    }
    if arguments.tiny:
        small = {
            "model": {"path": arguments.model, "dtype": "float32"},
            "engine": {"name": "transformers", "max_context": 256},
            "learner": {"name": "torch", "threads": 1},
            "placement": {"name": "local"},
            "sampling": {"max_tokens": 12},
            "trackers": [],
            "evaluation": {"prompts": 4, "samples": 4, "every": every, "show": 0},
            "optimizer": {"lr": 1.0e-3},
        }
        config |= small
    return config


def run_row(name: str, out: Path, arguments: argparse.Namespace) -> None:
    """Train up to where the last set is sampled, keep those weights, train to the end; then look at both."""
    run_dir = out / "rows" / name.replace(" ", "_")
    if (run_dir / "support.json").is_file():
        return
    begun = time.time()
    for steps in sorted({last_set(ROWS[name], arguments.steps), arguments.steps} - {0}):
        if not (run_dir / "checkpoints" / f"step-{steps}").is_dir() and not _train(name, run_dir, steps, arguments):
            return
    found = support(name, run_dir, arguments)
    for state in run_dir.glob("checkpoints/*/trainer"):
        shutil.rmtree(state)  # ten times as large as the weights, and this run has ended
    (run_dir / "support.json").write_text(json.dumps(found))
    print(f"{name}: {(time.time() - begun) / 60:.1f} min", flush=True)


def _train(name: str, run_dir: Path, steps: int, arguments: argparse.Namespace) -> bool:
    import yaml

    run_dir.parent.mkdir(parents=True, exist_ok=True)
    file = run_dir.parent / f"{run_dir.name}.yaml"
    file.write_text(yaml.safe_dump(config_of(name, run_dir, steps, arguments)))
    log = file.with_suffix(".log").open("a")
    command = [sys.executable, "-m", "rayalign.cli", "train", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        print(f"{name}: failed, see {log.name}", flush=True)
    return done.returncode == 0


def support(name: str, run_dir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """How far the last policy has left what it last learned from; see the top of this file."""
    from rayalign.evaluate import bootstrap_interval

    sampler = last_set(ROWS[name], arguments.steps)
    folders = [run_dir / "checkpoints" / f"step-{step}" for step in (arguments.steps, sampler)]
    models = [str(folders[0]), str(folders[1]) if sampler else str(Path(arguments.model).expanduser())]
    fresh, _ = _samples(models[0], [], run_dir, arguments)
    sequences = [(g.prompt.token_ids, c.token_ids) for g in fresh for c in g.completions]
    own, under = _samples(models[1], sequences, run_dir, arguments)
    typical = np.quantile([np.mean(c.logps) for g in own for c in g.completions], QUANTILE)
    shape = (len(fresh), -1)
    outside = (np.array([row.mean() for row in under]) < typical).astype(float).reshape(shape).mean(1)
    logps = [sum(c.logps) for g in fresh for c in g.completions]
    kl = (np.array(logps) - np.array([row.sum() for row in under])).reshape(shape).mean(1)
    return {
        key: [float(values.mean()), *bootstrap_interval(values, seed=0)]
        for key, values in (("outside", outside), ("kl_to_sampler", kl))
    } | {"sampler": sampler, "quantile": QUANTILE, "typical": float(typical)}


def _samples(
    model: str, sequences: list[tuple[tuple[int, ...], ...]], run_dir: Path, arguments: argparse.Namespace
) -> tuple[tuple[Any, ...], list[np.ndarray]]:
    """A model's samples of the held-out prompts, and its log-probs of the answers of other sequences."""
    from rayalign.build import decoder, load_tokenizer, prompts_for
    from rayalign.config import load_config
    from rayalign.rollouts import Collector, sample_seed
    from rayalign.selfplay.contest import Unscored

    config = load_config(run_dir / "config.yaml")
    tokenizer = load_tokenizer(config)
    held_out = prompts_for(config, tokenizer).held_out[: config.evaluation.prompts]
    settings = config.engine.model_copy(update={"dtype": config.model.dtype})
    engine = settings.build(model=model, name="engine-0", cores=None, seed=0, trust_remote_code=False)
    groups, _, _ = Collector(engine, Unscored(), decoder(tokenizer)).collect(
        held_out,
        [config.sampling.sampling()] * config.evaluation.samples,
        lambda prompt, k: sample_seed(0, "support", prompt, k),
        label="support",
    )
    whole = engine.logps([prompt + answer for prompt, answer in sequences]) if sequences else []
    engine.close()
    return groups, [row[len(prompt) - 1 :] for row, (prompt, _) in zip(whole, sequences, strict=True)]


def evaluations(out: Path, name: str) -> dict[int, dict[str, float]]:
    file = out / "rows" / name.replace(" ", "_") / "evaluations.jsonl"
    return {r["step"]: r["metrics"] for r in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}


def model_table(out: Path, steps: int) -> str:
    times = sorted({max(1, steps // 2), steps})
    rewards = " | ".join(f"reward, step {step}" for step in times)
    head = f"| resampling | {rewards} | KL (k3), nats | share outside | KL to the sampler |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for name in ROWS:
        found, file = evaluations(out, name), out / "rows" / name.replace(" ", "_") / "support.json"
        if steps not in found or not file.is_file():
            continue
        left = json.loads(file.read_text())
        cells = [_mean(found[step], "reward") if step in found else "" for step in times]
        cells += [_mean(found[steps], "kl/k3")]
        cells += ["{:.3f} [{:.3f}, {:.3f}]".format(*left[key]) for key in ("outside", "kl_to_sampler")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if start := next((evaluations(out, name) for name in ROWS if 0 in evaluations(out, name)), None):
        lines.insert(2, f"| the start | {_mean(start[0], 'reward')} |" + " |" * (head.count("|") - 3))
    return "\n".join(lines)


def _mean(metrics: dict[str, float], key: str) -> str:
    return f"{metrics[key]:.3f} [{metrics[f'{key}/low']:.3f}, {metrics[f'{key}/high']:.3f}]"


def figure(out: Path, arguments: argparse.Namespace) -> Path:
    """Above the exact half, below the language model: what there is of them."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(2, 2, figsize=(10, 7.5))
    for place, name in enumerate(ROWS):
        colour = f"C{place}"
        if curves := exact_curves(out, name, arguments.exact_steps, arguments.seeds):
            for axis, key in ((axes[0][0], "reward"), (axes[0][1], "outside")):
                mean, spread = curves[key].mean(0), curves[key].std(0)
                axis.plot(curves["step"][0], mean, color=colour, label=name, lw=1.5)
                axis.fill_between(curves["step"][0], mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
        found = sorted(evaluations(out, name).items())
        if len(found) > 1:
            axes[1][0].plot([step for step, _ in found], [m["reward"] for _, m in found], "o-", ms=3, color=colour)
            kl, reward = [m["kl/k3"] for _, m in found], [m["reward"] for _, m in found]
            axes[1][1].plot(kl, reward, "o-", ms=3, color=colour, label=name)
    labels = (
        ("exact: true reward", "step"),
        ("exact: mass outside of what was sampled", "step"),
        ("SmolLM2: reward (VADER), held-out prompts", "step"),
        ("SmolLM2: reward against KL to the start (k3)", "nats a completion"),
    )
    for axis, (title, below) in zip(axes.flat, labels, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(below)
        axis.grid(alpha=0.3)
    axes[0][0].legend(title="resampling", fontsize=8)
    drawn.tight_layout()
    drawn.savefig(out / "resampling.svg")
    return out / "resampling.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/resampling"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--steps", type=int, default=48, help="of the language model; 48 steps take its prompts once")
    parser.add_argument("--exact", action="store_true", help="only the exact half")
    parser.add_argument("--exact-steps", type=int, default=192)
    parser.add_argument("--seeds", type=int, default=8, help="of the exact half")
    parser.add_argument("--only", nargs="*", metavar="ROW", choices=list(ROWS), help="these rows")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model in this process, to try it all")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.tiny:
        from tests.tiny_models import build_tiny_llama

        arguments.model = str(out / "tiny")
        if not (out / "tiny" / "config.json").is_file():
            build_tiny_llama(out / "tiny")
    if not arguments.table:
        for name in arguments.only or ROWS:
            run_exact(name, out, arguments.exact_steps, arguments.seeds)
            if not arguments.exact:
                run_row(name, out, arguments)
    steps, seeds = arguments.exact_steps, arguments.seeds
    print(f"exact, {steps} steps, mean ± 95 % over {seeds} seeds\n{exact_table(out, steps, seeds)}")
    print(f"\n{arguments.model}, {arguments.steps} steps, 95 % bootstrap over held-out prompts")
    print(f"{model_table(out, arguments.steps)}\n")
    from rayalign.run_dir import versions

    print(f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}; {versions()}")
    print(f"figure: {figure(out, arguments)}")


if __name__ == "__main__":
    main()

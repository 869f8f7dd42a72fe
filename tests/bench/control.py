"""The control experiment: every objective at equal tokens, offline on the same labelled samples, and online.

SmolLM2-135M-Instruct writes four film reviews for each training prompt; the sentiment rule VADER ranks them (the true
reward, between −1 and 1). Each row of the table is a run of `rayalign train` on those answers, and differs from the
others in its algorithm only: 16 answers a step, the same number of steps, the same learning rate schedule. Held-out
prompts are sampled in the middle and after (the first row: before as well): reward, and KL to the start, with
bootstrap intervals.

Online rows (online-dpo, ppo, grpo) sample 16 answers to new prompts each step instead, and are measured on the same
held-out prompts. `…, learned` are online rows whose reward is a Bradley-Terry reward model, trained on the offline
pairs (`reward model`, made when one of them is asked for), without a KL in the way: the second table has what the model
says and what VADER says along the run, the curve of over-optimisation (over.svg).

  python tests/bench/control.py                       all rows that are not there yet (some minutes each)
  python tests/bench/control.py --only dpo-0.1 sft    these
  python tests/bench/control.py --table               what has been measured so far

Rows are folders of --out: one that ended is not run again, one that was cut short goes on from its last checkpoint.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MODEL = "~/.cache/rayalign/models/SmolLM2-135M-Instruct"
PROMPTS = str(ROOT / "configs/prompts/film_reviews.jsonl")
ANSWERS = 16  # of one training step
GOOD = 0.4  # score from which an answer counts as good, about the median of the samples
BETAS = (0.03, 0.1, 0.3)
INTERRUPTED = 130  # the exit code of a run that was asked to stop
HELD_OUT = 0.2  # of the prompts
TRUE = "scores/vader"  # of the evaluations of rows whose reward is learned
VADER = {"name": "rules", "rule": "vader"}
FLIPPED = {"kind": "flip", "prob": 0.2}


def rows() -> dict[str, dict[str, Any]]:
    """Name → what differs from the shared config. Pairs: 6 of each prompt's 4 answers, 2 prompts a step."""
    found: dict[str, dict[str, Any]] = {"sft-best": _answers({"name": "sft"}, "ranked", ANSWERS)}
    for beta in BETAS:
        found[f"dpo-{beta}"] = _pairs({"name": "dpo", "beta": beta})
    for tau in BETAS:
        found[f"ipo-{tau}"] = _pairs({"name": "ipo", "tau": tau})
    for beta in BETAS:
        found[f"kto-{beta}"] = _answers({"name": "kto", "beta": beta}, "labels", ANSWERS)
    noisy = {"label_noise": FLIPPED}
    found |= {
        "dpo-0.1, 20 % flipped": _pairs({"name": "dpo", "beta": 0.1}, **noisy),
        "cdpo-0.1, 20 % flipped": _pairs({"name": "dpo", "beta": 0.1, "label_smoothing": 0.2}, **noisy),
        "robust-0.1, 20 % flipped": _pairs({"name": "robust", "beta": 0.1, "flip_prob": 0.2}, **noisy),
        "hinge-0.1": _pairs({"name": "hinge", "beta": 0.1}),
        "slic_hf": _pairs({"name": "slic_hf"}),
        "simpo": _pairs({"name": "simpo"}),
        "orpo": _pairs({"name": "orpo"}),
        "cringe-binary": _answers({"name": "cringe", "variant": "binary"}, "labels", ANSWERS),
        "cringe-pairwise": _answers({"name": "cringe", "variant": "pairwise"}, "pairs", ANSWERS // 2),
    }
    return found | online_rows()


def online_rows() -> dict[str, dict[str, Any]]:
    """Those that sample: 4 answers to each of 4 prompts a step, of PPO one answer to each of 16."""
    online_dpo = {"name": "online_preference", "samples": 4, "pairs": "all", "loss": {"name": "dpo", "beta": 0.1}}
    grpo = {"name": "policy_gradient", "advantage": "grpo", "samples": 4}
    ppo = {
        "name": "ppo",
        "samples": 1,
        "kl": {"in": "reward", "estimator": "k1", "coef": 0.02},
        "critic": {"optimizer": {"lr": 1.0e-4}},
    }
    return {
        "online-dpo-0.1": {"algorithm": online_dpo, "prompts": 4},
        "ppo": {"algorithm": ppo, "prompts": ANSWERS},
        "grpo": {"algorithm": grpo, "prompts": 4},
        "grpo, learned": {"algorithm": {**grpo, "kl": {"coef": 0.0}}, "prompts": 4, "learned": True},
        "ppo, learned": {"algorithm": {**ppo, "kl": {"coef": 0.0}}, "prompts": ANSWERS, "learned": True},
    }


def _pairs(loss: dict[str, Any], **source: Any) -> dict[str, Any]:
    return _answers({"name": "preference", "loss": loss}, "pairs", ANSWERS // 2, **source)


def _answers(algorithm: dict[str, Any], file: str, prompts: int, **source: Any) -> dict[str, Any]:
    return {"algorithm": algorithm, "examples": {"path": file, **source}, "prompts": prompts}


def config_of(
    row: dict[str, Any], out: Path, run_dir: Path, arguments: argparse.Namespace, first: bool
) -> dict[str, Any]:
    """`first`: of all rows that begin with the same model, the one that evaluates it."""
    learned = bool(row.get("learned"))
    often = max(1, arguments.steps // (3 if learned else 2))
    if "examples" in row:
        examples = {**row["examples"], "path": str(out / "data" / f"{row['examples']['path']}.jsonl")}
        data = {"prompts": str(out / "data/held_out.jsonl"), "held_out": 0.0, "examples": examples}
    else:
        data = {"prompts": PROMPTS, "held_out": HELD_OUT}
    return {
        "model": {"path": arguments.model, "dtype": arguments.dtype},
        "data": data,
        "algorithm": row["algorithm"],
        "scorer": scorer_of(out) if learned else VADER,
        "sampling": {"max_tokens": 40},
        "rollout": {"prompts": row["prompts"]},
        "train": {"steps": arguments.steps},
        "optimizer": {"lr": 3.0e-5, "warmup_steps": 5},
        "engine": {"name": "vllm", "max_context": 128, "max_running": 64, "kv_cache_gib": 0.5},
        "learner": {"name": "deepspeed", "zero_stage": 0},
        "placement": {"name": "ray", "object_store_gib": 1.0},
        "evaluation": {
            "prompts": arguments.held_out,
            "samples": 4,
            "every": often,
            "rows": 0,
            "show": 0,
            "before": first or learned,
            "reference": True,
        },
        "checkpoint": {"every": often, "keep": 1},
        "run_dir": str(run_dir),
        "resume": (run_dir / "metrics.jsonl").is_file(),
    }


def scorer_of(out: Path) -> dict[str, Any]:
    """The reward model decides, VADER is only reported."""
    model = max((out / "reward_model/checkpoints").glob("step-*"), key=lambda each: int(each.name[5:]))
    learned = {"name": "reward_model", "model": str(model), "threads": 1}
    return {"name": "mix", "scorers": [{"scorer": learned}, {"scorer": VADER, "weight": 0.0}]}


def make_reward_model(out: Path, arguments: argparse.Namespace) -> bool:
    """On all pairs of the offline rows, once."""
    run_dir = out / "reward_model"
    if _evaluations(run_dir).get(arguments.reward_steps):
        return True
    config = config_of(_answers({"name": "reward_model"}, "pairs", 24), out, run_dir, arguments, first=False)
    config |= {"scorer": None, "evaluation": {"prompts": 0, "every": 20}, "train": {"steps": arguments.reward_steps}}
    config["optimizer"] = {"lr": 1.0e-4, "warmup_steps": 5}
    config["data"] = {"examples": config["data"]["examples"], "held_out": 0.1}
    return train("reward model", config, out)


def make_data(out: Path, model: str, dtype: str) -> None:
    """Four answers a training prompt with their scores, as ranked rows, pairs and labels; and the held-out prompts."""
    data = out / "data"
    if (data / "made.json").is_file():
        return
    import torch
    from transformers import AutoTokenizer

    from rayalign.data.config import DataConfig
    from rayalign.data.prompts import load_prompts
    from rayalign.engines.vllm import VLLMEngineConfig
    from rayalign.maths.feedback import all_pairs
    from rayalign.rollouts import Collector, sample_seed
    from rayalign.scorers.base import LocalScorer
    from rayalign.scorers.rules import Rules
    from rayalign.types import Sampling

    data.mkdir(parents=True, exist_ok=True)
    path = str(Path(model).expanduser())
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = load_prompts(DataConfig(prompts=PROMPTS, held_out=HELD_OUT), tokenizer, max_prompt_tokens=88)
    engine = VLLMEngineConfig(name="vllm", dtype=dtype, max_context=128, kv_cache_gib=0.5).build(
        model=path, name="engine-0", cores=None, seed=0, trust_remote_code=False
    )
    collector = Collector(
        engine,
        LocalScorer(Rules(name="rules", rule="vader")),
        lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True).strip(),
    )
    groups, seconds, _ = collector.collect(
        prompts.training, [Sampling(40)] * 4, lambda prompt, k: sample_seed(0, "control", prompt, k), label="control"
    )
    engine.close()
    files = {name: (data / f"{name}.jsonl").open("w") for name in ("ranked", "pairs", "labels", "held_out")}

    def write(name: str, row: dict[str, Any]) -> None:
        files[name].write(json.dumps(row) + "\n")

    for group in groups:
        prompt, texts, scores = group.prompt.text, list(group.texts), list(group.scores or ())
        write(
            "ranked", {"prompt": prompt, "completions": texts, "ranks": [sorted(scores)[::-1].index(s) for s in scores]}
        )
        for _, better, worse in all_pairs(torch.tensor([scores])).tolist():
            write("pairs", {"prompt": prompt, "chosen": texts[better], "rejected": texts[worse]})
        for text, score in zip(texts, scores, strict=True):
            write("labels", {"prompt": prompt, "completion": text, "label": score > GOOD})
    for prompt in prompts.held_out:
        write("held_out", {"prompt": prompt.text})
    for file in files.values():
        file.close()
    (data / "made.json").write_text(json.dumps({"prompts": len(groups), "seconds": seconds}))


def run_row(name: str, row: dict[str, Any], out: Path, arguments: argparse.Namespace) -> bool:
    """Whether the row is there now."""
    run_dir = out / "rows" / name.replace(" ", "_")
    if _evaluations(run_dir).get(arguments.steps):
        return True
    if row.get("learned") and not make_reward_model(out, arguments):
        return False
    return train(name, config_of(row, out, run_dir, arguments, first=name == next(iter(rows()))), out)


def train(name: str, config: dict[str, Any], out: Path) -> bool:
    """Whether `rayalign train` of this ended well."""
    import yaml

    run_dir = Path(config["run_dir"])
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    file = out / f"{run_dir.name}.yaml"
    file.write_text(yaml.safe_dump(config))
    begun = time.time()
    command = [sys.executable, "-m", "rayalign.cli", "train", str(file)]
    log = (out / f"{run_dir.name}.log").open("a")
    done = subprocess.run(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    took = f"{(time.time() - begun) / 60:.1f} min"
    print(f"{name}: {took}" if done.returncode == 0 else f"{name}: failed after {took}, see {log.name}", flush=True)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode == 0:
        for state in run_dir.glob("checkpoints/*/trainer"):
            shutil.rmtree(state)  # ten times as large as the weights, and this run has ended
    return done.returncode == 0


def _evaluations(run_dir: Path) -> dict[int, dict[str, float]]:
    file = run_dir / "evaluations.jsonl"
    if not file.is_file():
        return {}
    return {r["step"]: r["metrics"] for r in map(json.loads, file.read_text().splitlines())}


def table(out: Path, steps: int) -> str:
    lines = ["| objective | reward | KL (k3), nats | tokens | distinct-2 | min |", "|---|---|---|---|---|---|"]
    start = None
    for name in with_true_reward():
        found = _evaluations(out / "rows" / name.replace(" ", "_"))
        if start is None and found.get(0):
            start = lines.append(_line("reference", found[0], None)) or True
        if found.get(steps):
            lines.append(_line(name, found[steps], _minutes(out / "rows" / name.replace(" ", "_"))))
    return "\n".join(lines)


def with_true_reward() -> list[str]:
    return [name for name, row in rows().items() if not row.get("learned")]


def over_optimisation(out: Path) -> str:
    """Along the rows whose reward is learned: what the reward model says, and what VADER says of the same samples."""
    lines = ["| row | step | KL (k3), nats | reward model | VADER | tokens | distinct-2 | min |", "|---" * 8 + "|"]
    for name, row in rows().items():
        folder = out / "rows" / name.replace(" ", "_")
        found = _evaluations(folder) if row.get("learned") else {}
        for step, m in sorted(found.items()):
            numbers = [f"{m[key]:.3f} [{m[f'{key}/low']:.3f}, {m[f'{key}/high']:.3f}]" for key in ("reward", TRUE)]
            numbers += [f"{m['length']:.1f}", f"{m['distinct_2']:.3f}", f"{_minutes(folder, step):.1f}"]
            lines.append(f"| {name} | {step} | {m['kl/k3']:.2f} | {' | '.join(numbers)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _line(name: str, m: dict[str, float], minutes: float | None) -> str:
    took = "" if minutes is None else f"{minutes:.1f}"
    return (
        f"| {name} | {m['reward']:.3f} [{m['reward/low']:.3f}, {m['reward/high']:.3f}] "
        f"| {m['kl/k3']:.2f} [{m['kl/k3/low']:.2f}, {m['kl/k3/high']:.2f}] | {m['length']:.1f} "
        f"| {m['distinct_2']:.3f} | {took} |"
    )


def _minutes(run_dir: Path, steps: int | None = None) -> float:
    """Of the first steps, or all."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()[:steps])
    return sum(record["time/step_s"] for record in records) / 60


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=(width, height))
    axes.grid(alpha=0.3)
    return drawn, axes


def _saved(drawn: Any, path: Path) -> Path:
    drawn.tight_layout()
    drawn.savefig(path)
    return path


def figure(out: Path) -> Path:
    """Reward against KL: a line a row, its points the evaluations along the run."""
    drawn, axes = _axes(9, 5)
    families: dict[str, list[str]] = {}
    for name in with_true_reward():
        families.setdefault(name.split("-")[0], []).append(name)
    start = _evaluations(out / "rows" / next(iter(rows()))).get(0)
    for colour, names in enumerate(families.values()):
        for style, name in zip(("o-", "s--", "^:", "x-."), names, strict=False):
            found = _evaluations(out / "rows" / name.replace(" ", "_")) | ({0: start} if start else {})
            if len(found) > 1:
                kl, reward = zip(
                    *((found[step]["kl/k3"], found[step]["reward"]) for step in sorted(found)), strict=True
                )
                axes.plot(kl, reward, style, ms=4, color=f"C{colour % 10}", lw=1, label=name)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.set_xlabel("KL to the reference, k3, nats a completion")
    axes.set_ylabel("reward (VADER), held-out prompts")
    return _saved(drawn, out / "control.svg")


def figure_of_over_optimisation(out: Path) -> Path | None:
    """Reward model and VADER over the square root of KL."""
    drawn, axes = _axes(7, 4)
    for colour, (name, row) in enumerate(rows().items()):
        found = _evaluations(out / "rows" / name.replace(" ", "_")) if row.get("learned") else {}
        if len(found) < 2:
            continue
        kl = [max(0.0, found[step]["kl/k3"]) ** 0.5 for step in sorted(found)]
        for key, style, label in (("reward", "s--", "reward model"), (TRUE, "o-", "VADER")):
            values = [found[step][key] for step in sorted(found)]
            axes.plot(kl, values, style, ms=4, lw=1, color=f"C{colour % 10}", label=f"{name}: {label}")
    if not axes.lines:
        return None
    axes.legend(fontsize=7, frameon=False)
    axes.set_xlabel("square root of KL to the reference, k3")
    axes.set_ylabel("reward, held-out prompts")
    return _saved(drawn, out / "over.svg")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/control"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="float32: a CPU without it"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--held-out", type=int, default=48, help="prompts of an evaluation, 4 answers each")
    parser.add_argument("--reward-steps", type=int, default=40, help="of the reward model, 24 pairs each")
    parser.add_argument("--only", nargs="*", metavar="ROW", choices=list(rows()), help="these rows")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    arguments = parser.parse_args()
    out, ended = arguments.out.resolve(), [True]
    if not arguments.table:
        make_data(out, arguments.model, arguments.dtype)
        ended = [run_row(name, rows()[name], out, arguments) for name in arguments.only or rows()]
    measured = table(out, arguments.steps)
    if len(measured.splitlines()) > 2:
        print(measured)
        print(f"figure: {figure(out)}")
    if more := over_optimisation(out):
        print(f"\n{more}")
        print(f"figure: {figure_of_over_optimisation(out)}")
    from rayalign.run_dir import versions

    print(f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}; {versions()}")
    return 0 if all(ended) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")

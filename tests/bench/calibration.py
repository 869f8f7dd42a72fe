"""Calibration by ranking: candidates searched once, as in the paper, against searched anew every n steps.

A preference model (d-PM) is trained once on the votes of configs/data/word_votes.jsonl. Each row is then a run of
`rayalign train` with it as the scorer: SmolLM2-135M writes film reviews, K candidates a prompt, the same number of
steps on the same number of new prompts. "Learned from, of K" counts the candidates that differ, of prompts that have
two such at least. Rows differ only in where candidates come from, and in what is left out:

- once; every 8, every 2: diverse beam search by the initial policy, or anew by the newest one;
- once, sampled: ordinary samples of the initial policy in the place of a search;
- once, no reference answer: without the likelihood of the prompts' gold answers (eq. 8).

On the 48 held-out prompts, before and after: d-PM's score and the true reward, the mean of what ten people said of the
held-out words of an answer (no model has learned from these words), both of ordinary samples and with 95 % bootstrap
intervals. On K candidates of each of them that the initial policy searched for, the same for all rows: Kendall's τ
between the policy's mean log-probs and d-PM's scores, how often the likeliest is d-PM's best, and the perplexity of
the gold answers.

  python tests/bench/calibration.py                     all rows that are not there yet, some minutes each
  python tests/bench/calibration.py --only once         one of them
  python tests/bench/calibration.py --table             what has been measured so far
  python tests/bench/calibration.py --small             all of it with a tiny random model, in --out/small: a minute

Parts are folders of --out: what ended is not run again, a run that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.runs import claim, minutes, run  # noqa: E402

MODEL = "~/.cache/rayalign/models/SmolLM2-135M-Instruct"
VOTES = str(ROOT / "configs/data/word_votes.jsonl")
PROMPTS = str(ROOT / "configs/prompts/film_reviews_gold.jsonl")
NEVER = {"resample_every": "never"}
ROWS: dict[str, dict[str, Any]] = {
    "once": {"rollout": NEVER},
    "every 8": {"rollout": {"resample_every": 8, "at_once": 8}},
    "every 2": {"rollout": {"resample_every": 2, "at_once": 2}},
    "once, sampled": {"rollout": NEVER, "sampled": True},
    "once, no reference answer": {"rollout": NEVER, "mle_weight": 0.0},
}
RANKS = {"kendall_tau": "held_out/ranking/kendall_tau", "top1": "held_out/ranking/top1"}
PERPLEXITY = "held_out/gold/perplexity"
REWARDS = {"scores/dpm": "d-PM", "scores/ratings": "ten people"}


def shared(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common."""
    config: dict[str, Any] = {
        "model": {"path": arguments.model, "dtype": arguments.dtype},
        "engine": {"name": "vllm", "max_context": 128, "max_running": 64, "kv_cache_gib": 0.5},
        "learner": {"name": "deepspeed", "zero_stage": 0},
        "placement": {"name": "ray", "object_store_gib": 1.0},
    }
    if arguments.small:
        config |= {
            "model": {"path": arguments.model, "dtype": "float32"},
            "engine": {"name": "transformers", "max_context": 256},
            "learner": {"name": "torch", "threads": 1},
            "placement": {"name": "local"},
            "trackers": [],
        }
    return config


def annotators(arguments: argparse.Namespace) -> dict[str, Any]:
    small = arguments.small
    return {
        **shared(arguments),
        "algorithm": {"name": "disagreement", "classes": ["bad", "neutral", "good"]},
        "data": {"examples": {"path": VOTES, "limit": 64} if small else VOTES, "held_out": 0.1},
        "rollout": {"prompts": 8 if small else 32},
        "train": {"steps": 3 if small else arguments.votes_steps},
        "optimizer": {"lr": 3.0e-5, "warmup_steps": arguments.votes_steps // 10},
    }


def scorer(out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """d-PM's expected worth; the ratings of held-out words beside, which weigh nothing."""
    model = {"name": "dpm", "model": str(newest(out / "annotators"))}
    model |= {"dtype": "float32"} if arguments.small else {"micro_batch_tokens": 2048, "threads": 1}
    ratings = {"name": "ratings"}
    return {"name": "mix", "scorers": [{"scorer": model}, {"scorer": ratings, "weight": 0.0}]}


def search(arguments: argparse.Namespace) -> dict[str, Any]:
    beams = arguments.candidates
    return {"name": "diverse_beam", "beams": beams, "groups": beams, "max_tokens": arguments.tokens}


def candidates(out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Labels candidates of the held-out prompts: those that all rows are measured on."""
    return {
        **shared(arguments),
        "algorithm": {"name": "label", "samples": arguments.candidates, "write": "ranked"},
        "data": {"prompts": str(out / "held_out.jsonl"), "held_out": 0.0},
        "sampling": search(arguments),
        "scorer": scorer(out, arguments),
    }


def calibration(name: str, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    row, small = ROWS[name], arguments.small
    algorithm = {"name": "dpm_calibration", "samples": arguments.candidates, "mle_weight": row.get("mle_weight", 1.0)}
    return {
        **shared(arguments),
        "algorithm": {**algorithm, "margin": arguments.margin},
        "data": {"prompts": PROMPTS, "held_out": 0.2},
        "sampling": {"max_tokens": arguments.tokens} if row.get("sampled") else search(arguments),
        "scorer": scorer(out, arguments),
        "rollout": {"prompts": 4, **row["rollout"]},
        "train": {"steps": arguments.steps},
        "optimizer": {"lr": 1.0e-3 if small else arguments.lr, "warmup_steps": max(1, arguments.steps // 10)},
        "evaluation": {"prompts": 4 if small else 48, "samples": 2 if small else 4, "show": 0},
        "checkpoint": {"every": 0, "keep": 1},
    }


def run_or_exit(config: dict[str, Any], run_dir: Path, verb: str = "train") -> None:
    if not run(config, run_dir, verb):
        sys.exit(f"{run_dir.name} failed, see {run_dir.with_suffix('.log')}")


def newest(run_dir: Path) -> Path:
    """The checkpoint that a run left."""
    return max(run_dir.glob("checkpoints/step-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def drop_trainer(run_dir: Path) -> None:
    """A run that is not gone on with needs no optimiser's state, which is ten times as large as the weights."""
    shutil.rmtree(newest(run_dir) / "trainer", ignore_errors=True)


def prepare(out: Path, arguments: argparse.Namespace) -> None:
    """The preference model, the held-out prompts with gold answers, and their candidates."""
    if not (out / "annotators.done").is_file():
        run_or_exit(annotators(arguments), out / "annotators")
        (out / "annotators.done").touch()
        drop_trainer(out / "annotators")
        print(f"preference model: {minutes(out / 'annotators'):.1f} min", flush=True)
    if not (out / "candidates/labels.jsonl").is_file():
        write_held_out(out, arguments)
        run_or_exit(candidates(out, arguments), out / "candidates", "label")


def write_held_out(out: Path, arguments: argparse.Namespace) -> None:
    from rayalign.build import load_tokenizer, prompts_for
    from rayalign.config import parse_config

    config = parse_config(calibration("once", out, arguments))
    held_out = prompts_for(config, load_tokenizer(config)).held_out[: config.evaluation.prompts]
    rows = [{"prompt": prompt.text, "gold": prompt.extra["gold"]} for prompt in held_out]
    (out / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_row(name: str, out: Path, arguments: argparse.Namespace) -> None:
    folder = folder_of(out, name)
    if (folder / "ranks.json").is_file():
        return
    last = folder / "checkpoints" / f"step-{arguments.steps}"
    if not last.is_dir() or (last / "trainer").is_dir():
        run_or_exit(calibration(name, out, arguments), folder)
    found = {"minutes": minutes(folder), **ranks(str(last), out, arguments)}
    (folder / "ranks.json").write_text(json.dumps(found))
    drop_trainer(folder)
    print(f"{name}: {found['minutes']:.1f} min", flush=True)


def ranks(model: str, out: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """A policy on the candidates of the held-out prompts, by the metrics of training."""
    from rayalign.algorithms.dpm_calibration import Calibration
    from rayalign.build import load_tokenizer
    from rayalign.config import parse_config
    from rayalign.data.config import DataConfig
    from rayalign.data.examples import load_examples
    from rayalign.evaluate import measure
    from rayalign.learners.settings import LearnerSpec
    from rayalign.learners.torch import TorchLearnerConfig
    from rayalign.protocols import Roles

    config = parse_config(calibration("once", out, arguments))
    data = DataConfig(examples=str(out / "candidates/labels.jsonl"), held_out=0.0)
    rows = load_examples(data, load_tokenizer(config), kinds=("ranked",), max_tokens=data.max_tokens, seed=0, gold=True)
    settings = TorchLearnerConfig(name="torch", dtype=config.model.dtype)
    spec = LearnerSpec(
        "policy", str(Path(model).expanduser()), settings=settings, trainable=False, dtype=settings.dtype
    )
    policy = settings.build([spec], rank=0, world_size=1, address=("127.0.0.1", 0))["policy"]
    groups = [group for part in rows.once(64) for group in part]
    found = measure(groups, Calibration(margin=arguments.margin), Roles(policy))
    return {key: found[key] for key in (*RANKS.values(), PERPLEXITY, "held_out/candidates/kept")}


def folder_of(out: Path, name: str) -> Path:
    return out / "rows" / name.replace(",", "").replace(" ", "_")


def evaluation(folder: Path, step: int) -> dict[str, float]:
    file = folder / "evaluations.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return next((record["metrics"] for record in found if record["step"] == step), {})


def steps_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(out: Path, arguments: argparse.Namespace) -> str:
    head = ["candidates", "Kendall τ", "top-1", *(f"reward, {name}" for name in REWARDS.values())]
    lines = [_line([*head, "gold perplexity", "learned from, of K", "min"]), _line(["---"] * 8)]
    if (out / "start.json").is_file():
        start = json.loads((out / "start.json").read_text())
        first = next((found for name in ROWS if (found := evaluation(folder_of(out, name), 0))), {})
        lines.append(_line(["the start", *_measured(start, first), "", ""]))
    for name in ROWS:
        folder = folder_of(out, name)
        if not (folder / "ranks.json").is_file():
            continue
        found, steps = json.loads((folder / "ranks.json").read_text()), steps_of(folder)
        kept = sum(step["candidates/kept"] for step in steps) / sum(step["examples/kept"] for step in steps)
        cells = _measured(found, evaluation(folder, arguments.steps))
        lines.append(_line([name, *cells, f"{kept:.1f}", f"{found['minutes']:.1f}"]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _measured(found: dict[str, float], sampled: dict[str, float]) -> list[str]:
    rewards = [
        f"{sampled[name]:+.3f} [{sampled[f'{name}/low']:+.3f}, {sampled[f'{name}/high']:+.3f}]" if sampled else ""
        for name in REWARDS
    ]
    return [*(f"{found[key]:+.3f}" for key in RANKS.values()), *rewards, f"{found[PERPLEXITY]:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="float32: a CPU without it"
    )
    parser.add_argument(
        "--steps", type=int, help="of calibration, on 4 new prompts each; default 32, or 4 with --small"
    )
    parser.add_argument("--votes-steps", type=int, default=80, help="of the preference model, 32 words each")
    parser.add_argument("--candidates", type=int, help="K; default 8, or 4 with --small")
    parser.add_argument("--tokens", type=int, help="of the longest answer; default 32, or 12 with --small")
    parser.add_argument("--margin", type=float, default=0.001)
    parser.add_argument("--lr", type=float, default=1.0e-5)
    parser.add_argument("--only", nargs="*", metavar="ROW", choices=list(ROWS), help="these rows")
    parser.add_argument("--small", action="store_true", help="a tiny random model in this process, to try it all")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    arguments = parser.parse_args()
    usual = {"steps": (32, 4), "candidates": (8, 4), "tokens": (32, 12)}
    for key, (large, small) in usual.items():
        setattr(arguments, key, getattr(arguments, key) or (small if arguments.small else large))
    out = arguments.out.resolve() / ("small" if arguments.small else "")
    out.mkdir(parents=True, exist_ok=True)
    if arguments.small:
        from tests.tiny_models import build_tiny_llama

        arguments.model = str(out / "tiny")
        if not (out / "tiny" / "config.json").is_file():
            build_tiny_llama(out / "tiny")
    claim(out, arguments, "model", "dtype", "steps", "votes_steps", "candidates", "tokens", "margin", "lr")
    if not arguments.table:
        prepare(out, arguments)
        if not (out / "start.json").is_file():
            (out / "start.json").write_text(json.dumps(ranks(arguments.model, out, arguments)))
        for name in arguments.only or ROWS:
            run_row(name, out, arguments)
    from rayalign.run_dir import versions

    print(f"{arguments.model}, {arguments.steps} steps on 4 prompts × {arguments.candidates} candidates")
    print(
        f"{table(out, arguments)}\n{os.cpu_count()} cores, {platform.processor() or platform.machine()}; {versions()}"
    )


if __name__ == "__main__":
    main()

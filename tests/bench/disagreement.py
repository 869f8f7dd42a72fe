"""d-PM on real disagreement: the ten ratings a word of VADER's lexicon, thinned to a few raters for training.

Each word is an answer; its ratings from −4 to 4 are votes for bad, neutral and good. A fifth of the words, those that
`scorers.ratings.held_out` names, is left out of training: half of them, the validation's, choose the epoch and the
temperature by their ten raters, and the other half is what the table tells of. Of the rest each word keeps 1, 2, 3 or 5
raters, drawn by a seed. Two halves:

- grid: a small head on frozen features of SmolLM2 (the last hidden state of the prompt with the word), computed once.
  Losses and statistics are the package's own (rayalign.algorithms.disagreement); only the network is smaller.
- whole: one fine-tuning of all of SmolLM2 a divergence, and one a baseline, by `rayalign train` itself.

Reported on the words' ten raters: NLL of a vote and Jensen-Shannon divergence to their shares (nats), accuracy on their
majority, and expected calibration error (likeliest class against the share of raters who chose it, 10 bins).

  python tests/bench/disagreement.py                    the grid, about half an hour on two cores
  python tests/bench/disagreement.py --whole            the fine-tunings instead
  python tests/bench/disagreement.py --only "js" soft   these rows
  python tests/bench/disagreement.py --table            what has been measured so far
  python tests/bench/disagreement.py --small            a trial with a tiny random model: a minute, in --out/small

Cells are files of --out: what is there is not run again, so that the same command goes on after a stop.

Read with care. Validation has ten raters a word where training has one to five: nobody who has the training's votes
alone could choose epoch and temperature so well, and which row wins on validation is known by those ten. Cells of all
batch sizes have the same epochs and rate, so that small batches make many more updates: the row `prior`, whose loss
looks at no other row, tells what of a difference is that. Whole fine-tunings take their last step, none is chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rayalign.scorers.ratings import read_lexicon  # noqa: E402
from rayalign.types import Completion, Group, Prompt  # noqa: E402
from tests.bench.disagreement_heads import NUMBERS, features, metrics_of, train_head, words_of  # noqa: E402
from tests.bench.runs import claim, minutes, run  # noqa: E402
from tests.bench.word_votes import CLASSES, prompt_of, rows, thinned, votes_of  # noqa: E402

MODEL = "~/.cache/rayalign/models/SmolLM2-135M-Instruct"
RATERS = (1, 2, 3, 5)
BATCHES = (16, 64, 256, 1024)
PUBLISHED = {"preset": "published"}
MIXED = {"detach_posterior": True, "prior_weight": 0.5, "temperature_scaling": False}
# Row of the table → settings of the algorithm. The divergences as published, detached, and mixed; then the baselines.
ROWS: dict[str, dict[str, Any]] = {
    **{f"{each}": {**PUBLISHED, "objective": each} for each in ("kl_q_r", "kl_r_q", "js")},
    **{f"{each}, detached": {"objective": each, **MIXED, "prior_weight": 0.0} for each in ("kl_q_r", "kl_r_q", "js")},
    **{f"{each}, detached, ½ prior": {"objective": each, **MIXED} for each in ("kl_q_r", "kl_r_q", "js")},
    "kl_r_q, ½ prior": {"objective": "kl_r_q", **MIXED, "detach_posterior": False},
    "kl_r_q, detached, ½ prior, moving average": {"objective": "kl_r_q", **MIXED, "mass": "moving_average"},
    "kl_r_q, detached, ½ prior, mass of the votes": {"objective": "kl_r_q", **MIXED, "mass": "votes"},
    "prior": {"objective": "prior", "temperature_scaling": False},
    "soft": {"objective": "soft", "temperature_scaling": False},
    "majority": {"objective": "majority", "temperature_scaling": False},
}
SMOOTHINGS = (0.03, 0.1, 0.3, 1.0)
WORDS = 32  # of a step of a whole fine-tuning
WHOLE = ("kl_q_r", "kl_r_q", "js", "js, detached, ½ prior", "prior", "soft", "majority")


# The grid


def cell_file(out: Path, name: str, raters: int, seed: int, batch: int, smoothing: float) -> Path:
    return out / "cells" / f"{_plain(name)}-r{raters}-s{seed}-b{batch}-a{smoothing:g}.json"


def run_cell(cell: tuple[str, int, int, int, float], out: Path, data: Any, arguments: argparse.Namespace) -> None:
    name, raters, seed, batch, smoothing = cell
    file = cell_file(out, *cell)
    if file.is_file():
        return
    x, counts, thin = data
    votes = {**counts, "train": thin(raters, seed)}
    settings = {"smoothing": smoothing, **ROWS[name]}
    begun = time.time()
    found = train_head(settings, x, votes, seed=seed, batch=batch, epochs=arguments.epochs)
    found["seconds"] = time.time() - begun
    file.with_suffix(".writing").write_text(json.dumps(found))
    file.with_suffix(".writing").replace(file)
    print(f"{file.stem}: nll {found['best']['nll']:.3f}, accuracy {found['best']['accuracy']:.3f}, "
          f"{found['seconds']:.0f} s", flush=True)  # fmt: skip


def cells(arguments: argparse.Namespace) -> list[tuple[str, int, int, int, float]]:
    """The table first; then smoothing and batch size, of rows that tell most, with two raters."""
    names = arguments.only or list(ROWS)
    found = [(name, r, s, 256, 0.1) for name in names for r in RATERS for s in range(arguments.seeds)]
    some = [name for name in ("kl_r_q", "kl_r_q, detached, ½ prior", "prior") if name in names]
    found += [(name, 2, s, 256, a) for name in some for a in SMOOTHINGS for s in range(arguments.seeds) if a != 0.1]
    some = [name for name in ("kl_q_r", "kl_r_q, detached", "kl_r_q, detached, ½ prior", "prior") if name in names]
    found += [(name, 2, s, b, 0.1) for name in some for b in BATCHES for s in range(arguments.seeds) if b != 256]
    return found


def load_data(out: Path, arguments: argparse.Namespace) -> Any:
    """(x, votes of ten raters, thinned votes of training words)."""
    lexicon = read_lexicon()
    parts = words_of(lexicon, arguments.small)
    known = features([word for words in parts.values() for word in words], out, arguments.model)
    raw = {name: torch.stack([known[word] for word in words]) for name, words in parts.items()}
    mean, spread = raw["train"].mean(0), raw["train"].std(0) + 1e-6
    x = {name: (each - mean) / spread for name, each in raw.items()}
    counts = {name: torch.tensor([votes_of(lexicon[word]) for word in words]).float() for name, words in parts.items()}

    def thin(raters: int, seed: int) -> torch.Tensor:
        return torch.tensor([votes_of(thinned(word, lexicon[word], raters, seed)) for word in parts["train"]]).float()

    return x, counts, thin


# Whole fine-tunings, by the package's own runs


def run_whole(name: str, out: Path, arguments: argparse.Namespace) -> None:
    """One run of `rayalign train` on three raters a word, and its checkpoint on the test's words."""
    folder = out / "whole" / _plain(name)
    if folder.with_suffix(".json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lexicon, data = read_lexicon(), out / "whole" / "votes.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(lexicon, 3, words=200 * arguments.small)), "utf-8")
    settings = {name: value for name, value in ROWS[name].items() if name != "temperature_scaling"}
    config = {
        "model": {"path": arguments.model, "dtype": "float32" if arguments.small else arguments.dtype},
        "data": {"examples": str(data), "held_out": 0.1},
        "algorithm": {"name": "disagreement", "classes": list(CLASSES), **settings, "temperature_scaling": False},
        "rollout": {"prompts": WORDS},
        "train": {"steps": arguments.steps},
        "optimizer": {"lr": 1.0e-4, "warmup_steps": max(1, arguments.steps // 10)},
        "learner": {"name": "torch", "micro_batch_tokens": 2048},
        "placement": {"name": "local"},
        "evaluation": {"prompts": 0, "rows": 0},  # no step is chosen by them
        "checkpoint": {"every": max(1, arguments.steps // 2), "keep": 1},
        "trackers": [],
    }
    if not run(config, folder):
        print(f"{name}: failed, see {folder.with_suffix('.log')}", flush=True)
        return
    words = words_of(lexicon, arguments.small)["test"]
    found = metrics_of(scored(folder / "checkpoints" / f"step-{arguments.steps}", words), _votes(lexicon, words))
    found["minutes"] = minutes(folder)
    found["passes"] = arguments.steps * WORDS / sum(1 for _ in data.open(encoding="utf-8"))
    folder.with_suffix(".json").write_text(json.dumps(found))
    print(f"whole, {name}: nll {found['nll']:.3f}, {found['minutes']:.1f} min", flush=True)


def scored(checkpoint: Path, words: list[str]) -> torch.Tensor:
    """log q of each word, [n, L], as the scorer `dpm` gives it."""
    from rayalign.scorers.dpm import DpmScorer

    score, found = DpmScorer(model=str(checkpoint)).start(), []
    for start in range(0, len(words), 64):
        part = words[start : start + 64]
        groups = [
            Group(word, Prompt(0, prompt_of(word), (1,)), (Completion(word, (1,), (), "stop", 0),), (word,))
            for word in part
        ]
        found += score.distributions(groups)  # type: ignore[attr-defined]
    return torch.cat(found)


def _votes(lexicon: dict[str, Any], words: list[str]) -> torch.Tensor:
    return torch.tensor([votes_of(lexicon[word]) for word in words]).float()


def _plain(name: str) -> str:
    return name.translate(str.maketrans(" ,½", "__h"))


# What came of it


def read(
    out: Path, name: str, raters: int, seeds: int, batch: int = 256, smoothing: float = 0.1
) -> list[dict[str, Any]]:
    files = [cell_file(out, name, raters, seed, batch, smoothing) for seed in range(seeds)]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def mean(cells: list[dict[str, Any]], part: str, number: str) -> str:
    """Over seeds, with the standard deviation where there are several."""
    values = np.array([cell[part][number] for cell in cells])
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def table(out: Path, arguments: argparse.Namespace) -> str:
    """Each cell: NLL / JS / accuracy / ECE at the epoch that validation chose; then with a fitted temperature."""
    seeds, lines = arguments.seeds, []
    for raters in RATERS:
        lines += [f"\n{raters} rater{'s' * (raters > 1)} a word, batch 256, smoothing .1"]
        lines += [
            "| objective | seeds | NLL | JS | accuracy | ECE | NLL, tempered | NLL, last epoch | validation NLL |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for name in ROWS:
            if found := read(out, name, raters, seeds):
                numbers = [mean(found, "best", number) for number in NUMBERS]
                numbers += [mean(found, "tempered", "nll"), mean(found, "last", "nll")]
                chosen = float(np.mean([cell["validation"] for cell in found]))
                lines.append(f"| {name} | {len(found)} of {seeds} | {' | '.join(numbers)} | {chosen:.4f} |")
    for title, key, values in (("smoothing", "smoothing", SMOOTHINGS), ("batch size", "batch", BATCHES)):
        lines += [f"\n2 raters a word, NLL at the chosen epoch / the last one, by {title}"]
        lines += [f"| objective | {' | '.join(map(str, values))} |", "|---" * (len(values) + 1) + "|"]
        for name in ROWS:
            found = {value: read(out, name, 2, seeds, **{key: value}) for value in values}
            if all(len(each) == seeds for each in found.values()):
                parts = (f"{mean(c, 'best', 'nll')} / {mean(c, 'last', 'nll')}" for c in found.values())
                lines.append(f"| {name} | {' | '.join(parts)} |")
    whole = {name: out / "whole" / f"{_plain(name)}.json" for name in WHOLE}
    if any(file.is_file() for file in whole.values()):
        lines += ["\nwhole fine-tunings, 3 raters a word", "| objective | NLL | JS | accuracy | ECE | passes | min |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, file in whole.items():
            if file.is_file():
                found = json.loads(file.read_text())
                numbers = " | ".join(f"{found[number]:.3f}" for number in NUMBERS)
                lines.append(f"| {name} | {numbers} | {found['passes']:.1f} | {found['minutes']:.1f} |")
    return "\n".join(lines)


def figure(out: Path, arguments: argparse.Namespace) -> Path:
    """The three divergences by epoch, as published and detached: NLL, and Jensen-Shannon divergence to ten raters."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for place, divergence in enumerate(("kl_q_r", "kl_r_q", "js")):
        for name, style in (
            (divergence, "-"),
            (f"{divergence}, detached", "--"),
            (f"{divergence}, detached, ½ prior", ":"),
        ):
            if found := read(out, name, 2, arguments.seeds):
                for axis, number in zip(axes, ("nll", "js"), strict=True):
                    curve = np.mean([[each[number] for each in cell["curve"]] for cell in found], 0)
                    axis.plot(range(1, len(curve) + 1), curve, style, color=f"C{place}", label=name, lw=1.3)
    for axis, title in zip(axes, ("NLL of a vote, nats", "Jensen-Shannon to the ten raters, nats"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch, 2 raters a word")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")  # the published forms are far from all others
    axes[0].legend(fontsize=6)
    drawn.tight_layout()
    drawn.savefig(out / "disagreement.svg")
    return out / "disagreement.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/disagreement"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="float32: a CPU without it"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30, help="of a head")
    parser.add_argument("--steps", type=int, default=60, help="of a whole fine-tuning, 32 words each; 170 are one pass")
    parser.add_argument("--only", nargs="*", metavar="ROW", choices=list(ROWS), help="these rows")
    parser.add_argument("--whole", action="store_true", help="fine-tune all of the model instead")
    parser.add_argument("--small", action="store_true", help="a tiny random model and 200 words, to try it all")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    arguments = parser.parse_args()
    out = arguments.out.resolve() / ("small" if arguments.small else "")
    out.mkdir(parents=True, exist_ok=True)
    if arguments.small:
        from tests.tiny_models import build_tiny_llama

        arguments.model, arguments.epochs, arguments.seeds = str(out / "tiny"), 2, min(2, arguments.seeds)
        arguments.steps = 2
        if not (out / "tiny" / "config.json").is_file():
            build_tiny_llama(out / "tiny")
    claim(out / "cells", arguments, "model", "epochs")
    if arguments.whole:
        claim(out / "whole", arguments, "model", "dtype", "steps")
    if arguments.whole and not arguments.table:
        for name in WHOLE:
            if not arguments.only or name in arguments.only:
                run_whole(name, out, arguments)
    elif not arguments.table:
        data = load_data(out, arguments)
        for cell in cells(arguments):
            run_cell(cell, out, data, arguments)
    print(table(out, arguments))
    from rayalign.run_dir import versions

    print(f"\n{os.cpu_count()} cores, {platform.processor() or platform.machine()}; {versions()}")
    if any((out / "cells").glob("*-r*.json")):
        print(f"figure: {figure(out, arguments)}")


if __name__ == "__main__":
    main()

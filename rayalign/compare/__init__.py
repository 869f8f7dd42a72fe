"""`rayalign compare`: two models answer the same held-out prompts with the same seeds, and a scorer says who wins.

The table has the form of OAIF's (Guo et al. 2024, arXiv:2402.04792, table 2): win, tie, loss and quality.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console as RichConsole
from rich.table import Table

from rayalign.algorithms.label import Label
from rayalign.api import quiet_libraries, sampling_of
from rayalign.build import decoder, examples_for, start_parts
from rayalign.checks import check_parts, check_scorer
from rayalign.compare.kept import Answers, judged, said_of, with_verdicts, working
from rayalign.compare.sides import Contest, Side, contest_of, find_side, refuse_same
from rayalign.compare.verdicts import COLUMNS, Verdicts, interval, verdicts_of
from rayalign.console import Console, logged
from rayalign.errors import ConfigError
from rayalign.record import redacted
from rayalign.run_dir import versions
from rayalign.schema import Config
from rayalign.scorers.rules import Rules
from rayalign.types import Group


@dataclass(frozen=True)
class Comparison:
    """How two models compare.

    Attributes:
        file: comparison.json, with all answers.
        pairs: scored groups of two answers, A's first, `samples` for each prompt.
    """

    a: Side
    b: Side
    verdicts: Verdicts
    pairs: tuple[Group, ...]
    file: Path


def run_comparison(
    a: str | Path,
    b: str | Path,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    tie: float = 0.0,
    out: Path | None = None,
) -> Comparison:
    """Ask two models the same, let a scorer say whose answers are better, print the table and write it down.

    Answers and verdicts are written as they come: the same comparison goes on with what one that was cut short left.

    Args:
        a, b: folders of runs (their newest checkpoint), of checkpoints or of models.
        config: whose held-out prompts, scorer, sampling and seed are used; none: the config of run A, or else B.
        overrides: of that config, as `scorer.name=judge`.
        tie: scores (with a judge: its two probabilities) that are no further apart are a tie.
        out: folder for comparison.json and logs; none: one in runs/, new or of the same comparison that did not end.

    Raises:
        RayalignError: see rayalign.errors; nothing is started before both sides, the prompts and the scorer are known
            to be there.
    """
    quiet_libraries()
    if not tie >= 0:
        raise ConfigError("a tie cannot be that close", where="--tie", value=tie, rule="0 or more", remedy="--tie 0")
    sides = find_side(str(a), "RUN_A"), find_side(str(b), "RUN_B")
    refuse_same(*sides)
    contest = contest_of(*sides, config, list(overrides))
    said = contest.config
    _check(asking(said))
    sampling = sampling_of(said, examples_for(said, contest.tokenizers[0]) if said.data.examples else None).ordinary
    answers = tuple(
        Answers(name, side.model, prompts, sampling, said)
        for name, side, prompts in zip("ab", sides, contest.prompts, strict=True)
    )
    console = Console()
    with _folder(out, answers) as folder:
        with logged(console, folder / "log" / "driver.log"), console.bars():
            pairs = _judged(sides, contest, answers, folder, console)
        table = verdicts_of(pairs, said.evaluation.samples, tie=tie, seed=said.seed)
        found = Comparison(*sides, table, pairs, folder / "comparison.json")
        _write(found, said)
    print_comparison(found, said)
    console.say(f"written to {found.file}")
    return found


def _check(config: Config) -> None:
    check_parts(config)
    if config.evaluation.samples > 1 and config.sampling.temperature == 0:
        raise ConfigError(
            "greedy samples of one prompt are all the same",
            where="key evaluation.samples",
            value=config.evaluation.samples,
            rule="1 with sampling.temperature: 0",
            remedy="set evaluation.samples=1",
        )
    check_scorer(config)


@contextmanager
def _folder(out: Path | None, answers: Sequence[Answers]) -> Iterator[Path]:
    """The folder that is asked for, or one in runs/: of a comparison of the same answers that did not end, else a new
    one. No other process writes into it meanwhile. Raises ConfigError when there is one in it, or another is at it."""
    if out:
        _refuse_written(out)
    for folder in [out] if out else [*_left(answers), _new()]:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", blocking=False)  # the system lets go of it with the process
        try:
            lock.acquire()
        except Timeout:
            continue
        try:
            if out or not (folder / "comparison.json").exists():  # else another one has ended it meanwhile
                yield folder
                return
        finally:
            lock.release()
    raise ConfigError(
        "another comparison is using this folder",
        where="--out",
        value=str(out),
        rule="one at a time",
        remedy="wait for it, stop it, or choose another --out",
    )


def _left(answers: Sequence[Answers]) -> list[Path]:
    """Folders of comparisons that did not end and have some of these answers, the newest first."""
    folders = [each for each in Path("runs").glob("compare-*") if not (each / "comparison.json").exists()]
    found = [each for each in folders if any(one.shard(each).read() for one in answers)]
    return sorted(found, key=lambda each: each.stat().st_mtime, reverse=True)


def _new() -> Path:
    name, number = f"compare-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}", 1
    folder = Path("runs") / name
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def _refuse_written(folder: Path) -> None:
    if (folder / "comparison.json").exists():
        raise ConfigError(
            "there is a comparison in this folder",
            where="--out",
            value=str(folder),
            rule="a new folder, or one of a comparison that did not end",
            remedy="choose another --out",
        )


def _judged(
    sides: tuple[Side, Side], contest: Contest, answers: Sequence[Answers], folder: Path, console: Console
) -> tuple[Group, ...]:
    """Both sides sampled one after the other, in the same places; then their answers side by side, scored. What is in
    the folder already is not asked again, and what is not needed for the rest is not started."""
    config, lends = contest.config, asking(contest.config).lends_engine
    first, second = (_sampled(contest, side, sides[side], answers[side], folder, console) for side in range(2))
    pairs = [pair for a, b in zip(first, second, strict=True) for pair in _side_by_side(a, b)]
    # A judge that asks the policy's engine gets one that holds the config's model.
    judging, lent = (asking(config), config.model.path) if lends else (asking(config, sample=False), sides[0].model)
    with working(said_of(folder, pairs, judging, lent), console.say) as work:
        console.say(f"comparing {len(pairs)} pairs of answers{_already(len(work.answers))}")
        if work.missing:
            with start_parts(judging, contest.tokenizers[0], folder, console, policy=lent, train=False) as parts:
                assert parts.scorer is not None, "a comparison has a scorer"
                judged(parts.scorer, pairs, work)
        return with_verdicts(pairs, work)


def asking(config: Config, *, sample: bool = True) -> Config:
    """The same without a learner: answers are sampled, and scored; or scored only."""
    said = (config.data.prompts or "the prompts of data.examples") if sample else None
    data = config.data.model_copy(update={"prompts": said})
    return config.model_copy(update={"algorithm": Label(samples=config.evaluation.samples, write="best"), "data": data})


def _sampled(
    contest: Contest, place: int, side: Side, answers: Answers, folder: Path, console: Console
) -> tuple[Group, ...]:
    # No policy is trained here, and no reference looked at: an engine is enough.
    config = asking(contest.config.model_copy(update={"scorer": Rules(rule="brevity")}))
    tokenizer, count = contest.tokenizers[place], len(contest.prompts[place])
    decode = decoder(tokenizer)
    with working(answers.shard(folder), console.say) as work:
        already = _already(len(work.answers))
        samples = contest.config.evaluation.samples
        console.say(f"{side.given}: {count} held-out prompts × {samples}, from {side.model}{already}")
        if not work.missing:
            return answers.asked(None, work, decode)
        with start_parts(config, tokenizer, folder, console, policy=side.model, train=False) as parts:
            return answers.asked(parts.engine, work, decode, console.sampled)


def _already(count: int) -> str:
    return f", {count:,} of them there already" if count else ""


def _side_by_side(a: Group, b: Group) -> list[Group]:
    """One group of two for each sample."""
    return [
        Group(f"{a.id}/{k}", a.prompt, (a.completions[k], b.completions[k]), (a.texts[k], b.texts[k]))
        for k in range(len(a.completions))
    ]


def print_comparison(found: Comparison, config: Config) -> None:
    """The table, on stdout."""
    verdicts, out = found.verdicts, RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
    prompts, samples = verdicts.lead.shape
    table = Table(title=f"{prompts} held-out prompts × {samples}, scorer {config.scorer.name}")  # type: ignore[union-attr]
    for column in ("", *(column if column == "quality" else f"{column}, %" for column in COLUMNS)):
        table.add_column(column, justify="right" if column else "left")
    rows = verdicts.rows()
    for name in "ab":
        table.add_row(name.upper(), *(interval(rows[name][key], percent=key != "quality") for key in COLUMNS))
    out.print(table)
    out.print(f"A: {found.a.given}\nB: {found.b.given}", markup=False)
    test = verdicts.sign_test()
    out.print("intervals: 95 %, bootstrap over prompts; quality: the scorer's mean score", markup=False)
    out.print(f"win rate of A, a tie counting ½: {interval(verdicts.win_rate(), percent=True)} %", markup=False)
    out.print(f"quality of A less that of B, paired by prompt: {interval(verdicts.quality_lead())}", markup=False)
    out.print(
        f"sign test over prompts: A better on {test['a']}, B on {test['b']}, {test['even']} even: p = {test['p']:.3g}, "
        "two-sided, exact",
        markup=False,
    )
    for name, value in verdicts.metrics.items():
        out.print(f"{name}: {value:.3f}", markup=False)


def _write(found: Comparison, config: Config) -> None:
    outcome = found.verdicts.outcome().ravel().tolist()
    pairs = [
        {
            "prompt_index": pair.prompt.index,
            "prompt": pair.prompt.text,
            "a": pair.texts[0],
            "b": pair.texts[1],
            "scores": pair.scores,
            "probability_a": pair.preferences[0][1] if pair.preferences else None,
            "verdict": {1: "a", 0: "tie", -1: "b"}[verdict],
        }
        for pair, verdict in zip(found.pairs, outcome, strict=True)
    ]
    said: dict[str, Any] = config.to_dict()
    record = {
        "a": found.a.record(),
        "b": found.b.record(),
        "scorer": redacted(said["scorer"], "scorer"),
        "sampling": said["sampling"],
        "seed": config.seed,
        "tie": found.verdicts.tie,
        "versions": versions(),
        "table": found.verdicts.record(),
        "pairs": pairs,
    }
    writing = found.file.with_suffix(".writing")
    writing.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    writing.replace(found.file)

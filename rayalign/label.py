"""`rayalign label`: answers, sampled or read, with a scorer's word, become a data set of preferences.

run_dir/labels/shard-0000.jsonl   all that is known of some prompts, written when they are scored
run_dir/labels.jsonl              the rows that data.examples reads, made of all shards at the end
run_dir/labels.json               how many of what, and what the best of n gains
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from rayalign.algorithms.label import Label
from rayalign.algorithms.rejection_sampling import best_of_n
from rayalign.api import quiet_libraries, report_of
from rayalign.build import Parts, collector_for, examples_for, load_tokenizer, model_path, prompts_for, start_parts
from rayalign.checks import check_labelling, check_scorer
from rayalign.console import Console, logged
from rayalign.data.examples import ExampleSet
from rayalign.data.labels import Record, read_shard, record_of, rows_of, write_lines, write_shard
from rayalign.data.prompts import PromptSet
from rayalign.errors import DataError
from rayalign.interrupt import Interrupt
from rayalign.metrics import Recorder, in_order
from rayalign.protocols import Scorer
from rayalign.reference_cache import fingerprint
from rayalign.rollouts import Collector, sample_seed
from rayalign.run_dir import OPEN, decides, run_directory, scorer_files
from rayalign.samples import Rollout, heard, mean_metrics
from rayalign.schema import Config
from rayalign.trackers import start_trackers
from rayalign.types import Group, Metrics, Prompt, known_scores, unscored

ROWS, SUMMARY, SHARDS = "labels.jsonl", "labels.json", "labels"
Part = Sequence[Prompt] | Sequence[Group]


@dataclass(frozen=True)
class Labelled:
    """How a labelling ended.

    Attributes:
        run_dir: its folder.
        file: the data set; None where it was asked to stop before the last shard.
        rows: in that file.
        metrics: of all answers: best_of_n/…, reward/mean, and the scorer's own.
    """

    run_dir: Path
    file: Path | None
    rows: int
    metrics: Metrics

    @property
    def stopped(self) -> bool:
        return self.file is None


def run_labelling(config: Config, *, name: str = "label") -> Labelled:
    """Sample K answers for each training prompt, or take those of data.examples, score them, and write a data set.

    Shards that are there already are read, not sampled again.

    Args:
        config: of the algorithm `label`; of another one, K and the data are taken as it would sample or read them.
        name: of the run directory, when the config gives none.

    Raises:
        RayalignError: see rayalign.errors; the shards that were written stay.
    """
    quiet_libraries()
    config = labelling(config)
    check_labelling(config)
    check_scorer(config)
    tokenizer = load_tokenizer(config)
    prompts, examples = data_of(config, tokenizer)
    named = prompts if examples is None else examples
    key = "data.prompts" if examples is None else "data.examples"
    with run_directory(config, name, {key: named.fingerprint}) as run_dir:
        console = Console()
        with logged(console, run_dir / "log" / "driver.log"):
            return _label(config, tokenizer, prompts, examples, run_dir, console)


def labelling(config: Config) -> Config:
    """The same config with the algorithm `label`: it asks for as many samples as the one that stands there, or takes
    the rows that it would learn from."""
    if isinstance(config.algorithm, Label):
        return config
    samples = len(config.algorithm.request(config.sampling.sampling()))
    data = config.data if samples else config.data.model_copy(update={"prompts": None})
    label = Label(samples=samples, write="best") if samples == 1 else Label(samples=samples)
    return config.model_copy(update={"algorithm": label, "data": data})


def data_of(config: Config, tokenizer: Any) -> tuple[PromptSet, ExampleSet | None]:
    """Prompts to sample for, or rows with answers. Raises DataError."""
    return prompts_for(config, tokenizer), examples_for(config, tokenizer)


@dataclass
class _Work:
    """What the shards of a labelling are made with."""

    config: Config
    parts: Parts
    collector: Collector | None
    tokenizer: Any
    console: Console

    def groups(self, number: int, part: Part) -> tuple[tuple[Group, ...], float, float]:
        """The scored groups of one shard, seconds of sampling, and of scoring."""
        config = self.config
        if self.collector is None:
            begun = perf_counter()
            asked = [replace(g, scores=None, preferences=None, votes=None, metrics={}, inferred=()) for g in part]
            return scored(self.parts.scorer, asked), 0.0, perf_counter() - begun
        return self.collector.collect(
            part,
            config.algorithm.request(config.sampling.sampling()),
            lambda prompt, k: sample_seed(config.seed, "label", prompt, k),
            label=f"label-{number}",
            progress=self.console.sampled,
        )

    def texts(self, group: Group) -> tuple[str, ...]:
        """Of the answers, as they follow the prompt: without a chat template the space in front belongs to them."""
        if self.collector is None or self.config.data.chat_template:
            return group.texts
        decode = self.tokenizer.decode
        return tuple(decode(list(c.token_ids), skip_special_tokens=True) for c in group.completions)


def scored(scorer: Scorer, groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups with their scores, in the same order."""
    scorer.submit(groups)
    done: dict[str, Group] = {}
    while len(done) < len(groups):
        done.update((group.id, group) for group in scorer.poll())
    return tuple(done[group.id] for group in groups)


def _label(
    config: Config, tokenizer: Any, prompts: PromptSet, examples: ExampleSet | None, run_dir: Path, console: Console
) -> Labelled:
    parts = list(_shards(config, prompts, examples))
    known = fingerprint(
        (examples or prompts).fingerprint,
        model_path(config.model.path),
        algorithm=decides(config.algorithm.model_dump(mode="json"), OPEN),
        sampling=config.sampling.model_dump(mode="json"),
        scorer=decides(config.scorer.model_dump(mode="json")) | scorer_files(config),
        seed=config.seed,
    )
    files = [run_dir / SHARDS / f"shard-{number:04d}.jsonl" for number in range(len(parts))]
    there = [read_shard(file, known, _indices(part), console.say) for file, part in zip(files, parts, strict=True)]
    first = next((number for number, records in enumerate(there) if records is None), len(parts))
    count, whole = sum(map(len, parts)), sum(records is not None for records in there)
    told = examples.describe() if examples else f"{count:,} prompts × {config.algorithm.samples} samples"
    console.say(f"labelling {told}, in {len(parts)} shards" + (f"; {whole} are there already" if whole else ""))
    known_steps = {number + 1 for number, records in enumerate(there) if records is not None}
    trackers = start_trackers(config.trackers, run_dir, max(known_steps, default=0), resume=config.resume)
    recorder = Recorder(run_dir, trackers, first, there=known_steps)
    try:
        if None in there and not _fill(config, tokenizer, parts, files, there, known, recorder, run_dir, console):
            console.say(f"stopped; go on with: resume=true run_dir={run_dir}")
            return Labelled(run_dir, None, 0, {})
    finally:
        recorder.close()
        in_order(run_dir)
        report_of(run_dir, console)
    return _finish(config, [record for records in there for record in records or ()], run_dir, console)


def _shards(config: Config, prompts: PromptSet, examples: ExampleSet | None) -> Iterator[Part]:
    """Training prompts, or rows: what is held out for evaluations is not labelled."""
    size = config.algorithm.shard
    if examples is not None:
        yield from examples.once(size)
        return
    for place in itertools.count(0, size):
        if not (part := prompts.training[place : place + size]):
            return
        yield part


def _indices(part: Part) -> list[int]:
    return [(each.prompt if isinstance(each, Group) else each).index for each in part]


def _fill(
    config: Config,
    tokenizer: Any,
    parts: Sequence[Part],
    files: Sequence[Path],
    there: list[Sequence[Record] | None],
    known: str,
    recorder: Recorder,
    run_dir: Path,
    console: Console,
) -> bool:
    """Sample and score what is missing, shard by shard. Whether all of it was done: else a stop was asked for."""
    interrupt = Interrupt()
    with (
        start_parts(config, tokenizer, run_dir, console) as started,
        interrupt.listen(console.say),
        console.bars(len(parts)),
    ):
        collector = collector_for(config, started, tokenizer) if config.algorithm.samples else None
        work = _Work(config, started, collector, tokenizer, console)
        for number, part in enumerate(parts):
            if there[number] is not None:
                continue
            if interrupt.requested:
                return False
            begun = perf_counter()
            groups, sampling_s, scoring_s = work.groups(number, part)
            there[number] = [record_of(group, work.texts(group)) for group in groups]
            write_shard(files[number], known, there[number])
            rollout = Rollout(number, 0, tuple(groups), sampling_s, scoring_s)
            metrics = rollout.metrics(first_use=collector is not None) | best_of_n(
                [_there(g.known_scores) for g in heard(groups)], drawn=drawn(config)
            )
            metrics |= {"time/step_s": perf_counter() - begun, "memory/peak_gib": started.memory()}
            recorder.samples(number + 1, 0, groups)
            recorder.step(number + 1, metrics)
            console.step(number + 1, metrics, learns=False)
    return True


def _finish(config: Config, records: Sequence[Record], run_dir: Path, console: Console) -> Labelled:
    """The rows of all records, and what they come to. Raises DataError when there is none."""
    left_out: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    label = config.algorithm
    for record in records:
        made, lost = rows_of(record, label.write, drop_truncated=label.drop_truncated)
        rows += made
        left_out += lost
    heard_of = [record for record in records if not unscored(record["metrics"])]
    scores = [_there(known_scores(record["scores"], record.get("skipped", ()))) for record in heard_of]
    metrics = best_of_n(scores, drawn=drawn(config)) | mean_metrics([record["metrics"] for record in records])
    answers = sum(len(record["completions"]) for record in records)
    inferred = {"inferred": sum(row["inferred"] for row in rows)} if rows and "inferred" in rows[0] else {}
    summary = {"rows": len(rows), **inferred, "prompts": len(records), "answers": answers, "left_out": dict(left_out)}
    (run_dir / SUMMARY).write_text(json.dumps({**summary, "metrics": metrics}, indent=1))
    if not rows:
        raise DataError(
            "no row is left to learn from",
            where=str(run_dir / ROWS),
            value=", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "no prompt",
            rule="answers that differ, and of which the scorer likes one better",
            remedy="raise algorithm.samples or sampling.temperature, or use a scorer that tells answers apart",
        )
    write_lines(run_dir / ROWS, rows)
    lost = f"; left out: {', '.join(f'{n:,} {reason}' for reason, n in left_out.items())}" if left_out else ""
    console.say(f"done: {len(rows):,} rows of {len(records):,} prompts and {answers:,} answers{lost}")
    bound = metrics.get("best_of_n/kl_bound")
    console.say(
        f"the best of n scores {metrics['best_of_n/reward']:+.3f}, the mean {metrics['best_of_n/mean_reward']:+.3f}"
        + ("" if bound is None else f"; the best is at most {bound:.2f} nats from what was sampled")
    )
    console.say(f"written to {run_dir / ROWS}; learn from it with data.examples={run_dir / ROWS}")
    return Labelled(run_dir, run_dir / ROWS, len(rows), metrics)


def drawn(config: Config) -> bool:
    """Whether the answers are samples, and not those of a search."""
    return config.sampling.sampling().search is None


def _there(scores: Sequence[float | None]) -> list[float]:
    """Without those that stand for an answer that the scorer failed on."""
    return [score for score in scores if score is not None]

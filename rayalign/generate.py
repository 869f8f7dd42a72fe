"""`rayalign generate`: each prompt's completions, sampled or searched, one JSON line a prompt. Nothing is scored.

run_dir/completions.jsonl   written as they come; in the order of the prompts at the end
run_dir/generate.json       how many of what, how long they are, how many differ, tokens a second
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from rayalign.algorithms.generate import Generate
from rayalign.api import quiet_libraries
from rayalign.build import decoder, load_tokenizer, model_path, prompts_for, start_parts
from rayalign.checks import check_parts
from rayalign.console import Console, logged
from rayalign.errors import ConfigError
from rayalign.interrupt import Interrupt
from rayalign.protocols import Engine
from rayalign.rollouts import sample_seed, searched
from rayalign.run_dir import run_directory
from rayalign.schema import Config
from rayalign.types import Candidate, Completion, Metrics, Prompt, Request, Sampling

LINES, SUMMARY = "completions.jsonl", "generate.json"
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Generated:
    """How a generation ended.

    Attributes:
        run_dir: its folder.
        file: completions.jsonl.
        prompts: in that file; fewer than there are where it was stopped.
        metrics: of all completions.
    """

    run_dir: Path
    file: Path
    prompts: int
    metrics: Metrics
    stopped: bool


def run_generation(config: Config, *, model: str | None = None, name: str = "generate") -> Generated:
    """Complete every prompt of data.prompts, held out or not.

    Args:
        config: of the algorithm `generate`; of another one, as many completions as it asks for, and where it asks for
            none, as many as its evaluations. Scorer, learner and reference are not started.
        model: a checkpoint instead of the config's model.
        name: of the run directory, when the config gives none.

    Raises:
        RayalignError: see rayalign.errors; the lines that were written stay, in the order in which they came.
    """
    quiet_libraries()
    config = generating(config)
    check_parts(config)
    tokenizer = load_tokenizer(config, model)
    found = prompts_for(config, tokenizer)
    with run_directory(config, name, {"data.prompts": found.fingerprint}) as run_dir:
        console = Console()
        with logged(console, run_dir / "log" / "driver.log"):
            skipped = f"; {found.skipped:,} are too long" if found.skipped else ""
            asked = len(config.algorithm.request(config.sampling.sampling()))
            console.say(f"generating {len(found.training):,} prompts × {asked}{skipped}")
            return _generate(config, tokenizer, found.training, run_dir, console, model)


def generating(config: Config) -> Config:
    """The same config with the algorithm `generate`, and without what nothing is asked of. Raises ConfigError."""
    if config.data.prompts is None:
        raise ConfigError(
            "there are no prompts to complete",
            where="key data.prompts",
            value="nothing",
            rule="a file with a column prompt",
            remedy="set data.prompts=my_prompts.jsonl",
        )
    if config.resume:
        raise ConfigError(
            "a generation is not gone on with",
            where="key resume",
            value=True,
            rule="a new run_dir each time",
            remedy="take resume out, and choose another run_dir",
        )
    algorithm = config.algorithm
    if not isinstance(algorithm, Generate):
        sampling = config.sampling.sampling()
        usual = config.evaluation.samples if sampling.search is None else None
        algorithm = Generate(samples=len(algorithm.request(sampling)) or usual)
    data = config.data.model_copy(update={"examples": ()})
    return config.model_copy(update={"algorithm": algorithm, "scorer": None, "data": data})


def _generate(
    config: Config, tokenizer: Any, prompts: Sequence[Prompt], run_dir: Path, console: Console, model: str | None
) -> Generated:
    file, interrupt, totals = run_dir / LINES, Interrupt(), _Totals()
    policy = model_path(model) if model else None
    with (
        start_parts(config, tokenizer, run_dir, console, policy=policy) as parts,
        interrupt.listen(console.say),
        console.bars(),
        file.open("w", encoding="utf-8", errors="replace") as out,
    ):
        began = perf_counter()
        asking = Asking(parts.engine, config.algorithm.request(config.sampling.sampling()), config.seed)
        at_once = 2 * config.engine.count * config.engine.max_running
        for prompt, completions in asking.all(
            prompts, at_once=at_once, progress=console.sampled, stop=lambda: interrupt.requested
        ):
            line = line_of(prompt, completions, decoder(tokenizer))
            totals.add(line)
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
        seconds = perf_counter() - began
    _sort(file)
    metrics = totals.metrics(seconds)
    record = {"prompts": totals.prompts, "completions": totals.completions, "metrics": metrics}
    (run_dir / SUMMARY).write_text(json.dumps(record, indent=1))
    stopped = totals.prompts < len(prompts)
    told = f"{totals.completions:,} completions of {totals.prompts:,} prompts"
    console.say(f"{'stopped' if stopped else 'done'}: {told}, {metrics.get('tokens_per_s', 0.0):.0f} tokens/s: {file}")
    return Generated(run_dir, file, totals.prompts, metrics, stopped)


def _sort(file: Path) -> None:
    """Lines into the order of the prompts; of all lines only their places are held in memory."""
    with file.open("rb") as lines:
        places, place = [], 0
        for line in lines:
            places.append((json.loads(line)["prompt_index"], place))
            place += len(line)
        if places == sorted(places):
            return
        sorting = file.with_name(f".{file.name}.sorting")
        with sorting.open("wb") as out:
            for _, place in sorted(places):
                lines.seek(place)
                out.write(lines.readline())
    sorting.replace(file)


class Asking:
    """Asks an engine for the completions of prompts.

    Args:
        sampling: one entry a completion; the candidates of one search have the same.
    """

    def __init__(self, engine: Engine, sampling: Sequence[Sampling], seed: int):
        self._engine, self._seed, self._asked = engine, seed, len(sampling)
        self._sampling = sampling[:1] if searched(sampling) else sampling
        self._done: dict[int, dict[int, Completion]] = {}  # place of the prompt → number of the request → completion

    def all(
        self,
        prompts: Sequence[Prompt],
        *,
        at_once: int,
        progress: Callable[[int, int], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Each prompt with what it was completed by, as soon as that is there. New prompts are asked for while fewer
        than `at_once` completions are open. What is open is given up once `stop` says so."""
        given = finished = 0
        unfinished: set[int] = set()
        while (given < len(prompts) or unfinished) and not stop():
            asked: list[Request] = []
            while given < len(prompts) and given * self._asked - finished < at_once:
                asked += self._requests(given, prompts[given])
                unfinished.add(given)
                given += 1
            if asked:
                self._engine.submit(asked)
            for completion in self._engine.poll():
                place, number = map(int, completion.request_id.split("/")[1:])
                found = self._done.setdefault(place, {})
                found[number] = completion
                finished += self._asked // len(self._sampling)
                progress(finished, len(prompts) * self._asked)
                if len(found) == len(self._sampling):
                    unfinished.remove(place)
                    del self._done[place]
                    yield prompts[place], [found[number] for number in range(len(self._sampling))]
        self._engine.abort([one.id for place in unfinished for one in self._requests(place, prompts[place])])

    def _requests(self, place: int, prompt: Prompt) -> list[Request]:
        return [
            Request(
                f"generate/{place}/{k}", prompt.token_ids, one, sample_seed(self._seed, "generate", prompt.index, k)
            )
            for k, one in enumerate(self._sampling)
        ]


def line_of(prompt: Prompt, completions: Sequence[Completion], decode: Callable[[Sequence[int]], str]) -> Line:
    """One prompt as it is written. `same_as` names the first completion that has the same text, where there is one."""
    found: Sequence[Candidate | Completion] = completions[0].candidates or completions
    texts = [decode(each.token_ids).strip() for each in found]
    written = []
    for number, (each, text) in enumerate(zip(found, texts, strict=True)):
        record: dict[str, Any] = {"text": text, "token_ids": list(each.token_ids), "logps": list(each.logps)}
        record |= {"sum_logp": sum(each.logps), "mean_logp": sum(each.logps) / len(each.logps)}
        record["finish_reason"] = each.finish_reason
        if isinstance(each, Candidate):
            record |= {"group": each.group, "score": each.score}
        if texts.index(text) < number:
            record["same_as"] = texts.index(text)
        written.append(record)
    return {
        "prompt_index": prompt.index,
        "prompt": prompt.text,
        "distinct": len(set(texts)),
        "version": completions[0].version,
        "completions": written,
    }


@dataclass
class _Totals:
    """Sums over all lines, which are not kept."""

    prompts: int = 0
    completions: int = 0
    tokens: int = 0
    truncated: int = 0
    distinct: int = 0
    mean_logps: float = 0.0

    def add(self, line: Line) -> None:
        written = line["completions"]
        self.prompts += 1
        self.completions += len(written)
        self.tokens += sum(len(each["token_ids"]) for each in written)
        self.truncated += sum(each["finish_reason"] == "length" for each in written)
        self.distinct += line["distinct"]
        self.mean_logps += sum(each["mean_logp"] for each in written)

    def metrics(self, seconds: float) -> Metrics:
        """Of all completions; empty where there is none."""
        if not self.completions:
            return {}
        return {
            "completion/length_mean": self.tokens / self.completions,
            "completion/truncated": self.truncated / self.completions,
            "completion/mean_logp": self.mean_logps / self.completions,
            "candidates/distinct": self.distinct / self.prompts,
            "candidates/same": (self.completions - self.distinct) / self.prompts,
            "tokens_per_s": self.tokens / max(seconds, 1e-9),
        }

"""Metrics and samples of a run: files, trackers, one calm line a step."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from rayalign.errors import DataError
from rayalign.protocols import Tracker
from rayalign.types import Group, Metrics

FINAL = "final"  # marks a run's last evaluation, where it is of other weights than the last step's as they are


@contextmanager
def timed(metrics: Metrics, key: str) -> Iterator[None]:
    """Adds the seconds that the block takes to the metric."""
    begun = perf_counter()
    try:
        yield
    finally:
        metrics[key] = metrics.get(key, 0.0) + perf_counter() - begun


class Clock:
    """Seconds by name: `with clock("update"): …` adds to time/update_s."""

    def __init__(self) -> None:
        self.metrics: Metrics = {}
        self._started = perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with timed(self.metrics, f"time/{name}_s"):
            yield

    def stop(self) -> Metrics:
        return {**self.metrics, "time/step_s": perf_counter() - self._started}


class Recorder:
    """Writes metrics.jsonl (one record a step), samples.jsonl and evaluations.jsonl, and feeds trackers.

    On resume, records beyond the checkpoint's step are dropped first, and a final evaluation: each step stands there
    once.

    Args:
        there: steps beyond the first whose records stay, as they are not taken again.
    """

    def __init__(
        self, run_dir: Path, trackers: Sequence[Tracker], first_step: int, *, there: Collection[int] = frozenset()
    ):
        self._trackers = trackers
        self._files = {}
        for name in ("metrics", "samples", "evaluations"):
            path = run_dir / f"{name}.jsonl"
            _keep(path, first_step, there)
            self._files[name] = path.open("a", encoding="utf-8")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One record: metrics in a fixed order, `step` first."""
        self._write("metrics", {"step": step, **dict(sorted(metrics.items()))})
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def samples(self, step: int, version: int, groups: Sequence[Group]) -> None:
        for group in groups:
            for text, score, completion in zip(group.texts, group.known_scores, group.completions, strict=True):
                self._write(
                    "samples",
                    {
                        "step": step,
                        "version": version,
                        "prompt_index": group.prompt.index,
                        "prompt": group.prompt.text,
                        "completion": text,
                        "score": score,
                        "tokens": len(completion.token_ids),
                        "finish_reason": completion.finish_reason,
                    },
                )

    def evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        self._write("evaluations", {"step": step, **record})
        metrics = {f"eval/{key}": value for key, value in record["metrics"].items()}
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(record, ensure_ascii=False) + "\n")
        self._files[name].flush()


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl file of a run, one by one, however long it is; none where there is no file. A last
    line that a kill cut short is left out.

    Raises:
        DataError: another line that is no JSON object.
    """
    if not path.is_file():
        return
    with path.open("rb") as lines:  # as text they would also end at other characters, which models write
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            yield _record(line, f"{path}:{number}")


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a .jsonl file of a run; see `records`."""
    return list(records(path))


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        fault = "" if isinstance(record, dict) else "another value"
    except ValueError as error:
        fault = getattr(error, "msg", "not UTF-8")
    if fault:
        raise DataError(
            "a record of this run is damaged",
            where=where,
            value=f"{fault}: {line.decode(errors='replace').strip()!r}",
            rule="one JSON object a line, as the run wrote it",
            remedy="take this line out of the file; the others stand on their own",
        )
    return record


def in_order(run_dir: Path) -> None:
    """Records by their steps, where some were written after those of later ones."""
    for name in ("metrics", "samples"):
        _rewrite(run_dir / f"{name}.jsonl", sorted(records(run_dir / f"{name}.jsonl"), key=lambda each: each["step"]))


def _keep(path: Path, step: int, there: Collection[int]) -> None:
    if path.is_file():
        stay = [each for each in records(path) if each["step"] <= step or each["step"] in there]
        _rewrite(path, [each for each in stay if FINAL not in each])


def _rewrite(path: Path, kept: Sequence[Mapping[str, Any]]) -> None:
    whole = path.with_suffix(".tmp")
    whole.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")
    whole.replace(path)

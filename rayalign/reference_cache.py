"""Log-probs of a fixed reference, computed once: by the policy before its first step, when it still is the reference.

They stand on disk under the fingerprints of data and model, so that a second run, or a resumed one, only reads them,
and no reference model takes memory while the policy learns.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.errors import CheckpointError, ConfigError
from rayalign.protocols import Learner
from rayalign.types import AnyColumn, Column, Example
from rayalign.types import Sequence as Row

PROGRESS = 20  # of these batches, between two lines that say how far it is
BATCH = 256  # examples that the policy is asked for at a time
Key = bytes


@dataclass(frozen=True)
class CachedReference:
    """A frozen role that knows the log-probs of certain rows, and nothing else.

    Attributes:
        index: the row's digest → its place in `logps` (first, one past the last).
        logps: float32 of all rows, behind one another.
    """

    index: dict[Key, tuple[int, int]]
    logps: np.ndarray

    def annotate(self, examples: Sequence[Example], columns: Sequence[AnyColumn]) -> list[Example]:
        """See protocols.Learner. Raises ConfigError for other columns and CheckpointError for unknown rows."""
        if tuple(columns) != (Column.LOGPS,):
            raise ConfigError(
                "a cached reference has log-probs only",
                where="key algorithm.reference.cached",
                value=", ".join(column.value for column in columns),
                rule="logps of the rows of the data set",
                remedy="set algorithm.reference.cached=false",
            )
        return [replace(e, sequences=tuple(map(self._with_logps, e.sequences))) for e in examples]

    def _with_logps(self, row: Row) -> Row:
        place = self.index.get(digest(row))
        if place is None:
            raise CheckpointError(
                "the cached reference does not know this row",
                value=f"{len(row.prompt_ids)} + {len(row.completion_ids)} tokens",
                rule="rows of the data set that the run began with",
                remedy="start a new run, or set algorithm.reference.cached=false",
            )
        return replace(row, columns={**row.columns, "reference/logps": self.logps[slice(*place)]})

    def save(self, path: Path) -> None:
        """Nothing: a resumed run finds the cache by its fingerprint."""

    def restore(self, path: Path) -> None:
        """Nothing, see `save`."""


def digest(row: Row) -> Key:
    """Of the tokens of a row, prompt and completion apart, and of its images."""
    tokens = np.array([len(row.prompt_ids), *row.prompt_ids, *row.completion_ids], dtype=np.int64)
    found = hashlib.blake2b(tokens.tobytes(), digest_size=16)
    for image in row.images:
        found.update(repr(image.box).encode() + image.data)
    return found.digest()


def cached_reference(
    examples: Iterator[Sequence[Example]], policy: Learner, file: Path, say: Callable[[str], None]
) -> CachedReference:
    """Read what the file has; let the policy compute the rest, and write it there.

    Args:
        examples: all that the run will ever annotate, part by part.
        file: of this data and model, see `fingerprint`.
        policy: with the weights that the run began with.

    Raises:
        CheckpointError: the file cannot be written.
    """
    known = _read(file, say)
    found: dict[Key, np.ndarray] = {}
    waiting: dict[Key, Row] = {}  # no more than one batch: rows may have images

    def compute() -> None:
        if len(found) % (PROGRESS * BATCH) == 0:
            say(f"log-probs of the reference, for rows that have none on disk: {len(found):,} done")
        annotated = policy.annotate([Example((row,)) for row in waiting.values()], (Column.LOGPS,))
        for key, example in zip(waiting, annotated, strict=True):
            found[key] = example.sequences[0].columns["policy/logps"]
        waiting.clear()

    for part in examples:
        for row in (row for example in part for row in example.sequences):
            key = digest(row)
            if key in known.index or key in found or key in waiting:
                continue
            waiting[key] = replace(row, columns={})
            if len(waiting) == BATCH:
                compute()
    if waiting:
        compute()
    if not found:
        return known
    whole = _joined(known, list(found), list(found.values()))
    _write(file, whole)
    return whole


def fingerprint(data: str, model: str, **settings: Any) -> str:
    """Of the data, of the model and of what log-probs depend on besides.

    A folder is known by its files (names, sizes, times of change), a hub id by the commit that was downloaded last.
    """
    path = Path(model)
    files: list[Any]
    if path.is_dir():
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(path.iterdir()) if p.is_file()]
    else:
        files = [_commit(model)]
    text = json.dumps([data, model, files, settings], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _commit(model: str) -> str | None:
    """Of a hub id, as its snapshot in the cache of the hub is called."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def _joined(known: CachedReference, keys: list[Key], arrays: list[np.ndarray]) -> CachedReference:
    index, end = dict(known.index), len(known.logps)
    for key, array in zip(keys, arrays, strict=True):
        index[key] = (end, end + len(array))
        end += len(array)
    return CachedReference(index, np.concatenate([known.logps, *arrays]).astype(np.float32))


def _read(file: Path, say: Callable[[str], None]) -> CachedReference:
    """What the file has: nothing when it is not there, or damaged; it is then written anew."""
    nothing = CachedReference({}, np.zeros(0, np.float32))
    if not file.is_file():
        return nothing
    try:
        with np.load(file) as found:
            keys, places, logps = found["keys"], found["places"], found["logps"]
        index = {k.tobytes(): (int(a), int(b)) for k, (a, b) in zip(keys, places, strict=True)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        say(f"{file} is damaged and is not used: {type(error).__name__}: {error}")
        return nothing
    return CachedReference(index, logps)


def _write(file: Path, cache: CachedReference) -> None:
    """Beside its place, then moved there: a kill leaves the old one or the new one."""
    writing = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        keys = np.frombuffer(b"".join(cache.index), dtype=np.uint8).reshape(-1, 16)
        with writing.open("wb") as out:
            np.savez(out, keys=keys, places=np.array(list(cache.index.values()), np.int64), logps=cache.logps)
        writing.replace(file)
    except OSError as error:
        raise CheckpointError(
            "the log-probs of the reference could not be written",
            where=str(file),
            value=f"{type(error).__name__}: {error}",
            remedy="free disk space, or set algorithm.reference.cached=false",
        ) from error
    finally:
        writing.unlink(missing_ok=True)

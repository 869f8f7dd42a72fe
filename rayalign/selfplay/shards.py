"""Answers on disk: files that are whole or are not there, and what has come of those that are not whole yet.

generations/iteration-2/shard-0007.jsonl   a line that says what it is, then an answer a line
generations/iteration-2/shard-0007.part    the same, as answers come; what a kill leaves of it is read again
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from rayalign.data.files import set_aside
from rayalign.errors import CheckpointError
from rayalign.types import Completion, Sampling


class Line(Protocol):
    """What a shard holds of one row: a dataclass.

    Attributes:
        left_out: why there is nothing of this row, else empty.
    """

    row: int
    left_out: str

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """From what was written: its fields, but for those that are as usual."""

    def compact(self) -> Self:
        """What is held of it in memory."""


L = TypeVar("L", bound=Line)


@dataclass(frozen=True)
class Answer:
    """One completion on disk.

    Attributes:
        row: its number among the rows that are answered.
        same: whether it is the data's answer, token for token.
        left_out: why there is none; the tokens are then empty.
        engine: that served it.
    """

    row: int
    token_ids: Sequence[int] = ()
    prompt: str = ""
    completion: str = ""
    finish_reason: str = "stop"
    same: bool = False
    left_out: str = ""
    engine: str = ""

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Answer:
        """See Line."""
        return cls(**{**said, "token_ids": tuple(said.get("token_ids", ()))})

    def as_completion(self, version: int) -> Completion:
        return Completion(f"generation/{self.row}", tuple(self.token_ids), (), self.finish_reason, version)

    def compact(self) -> Answer:
        """Without its texts, and four bytes a token: all answers of an iteration are held at once."""
        return replace(self, token_ids=array("i", self.token_ids), prompt="", completion="", engine="")


class Shard(Generic[L]):
    """One file of answers.

    Args:
        path: of the whole file.
        identity: all that decides what the answers are; another one is another file's.
        rows: that it has an answer to, once it is whole.
        kind: of what it holds.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], rows: Sequence[int], kind: type[L] = Answer):  # type: ignore[assignment]
        self.path, self.rows, self._kind = path, rows, kind
        self._part = path.with_suffix(".part")
        known = json.dumps({**identity, "rows": [rows[0], len(rows)]}, sort_keys=True)
        self._fingerprint = hashlib.blake2b(known.encode(), digest_size=16).hexdigest()
        self._identity, self.damage = dict(identity), ""
        self._file: Any = None

    def read(self) -> dict[int, L]:
        """Row → answer: of the whole file, else of what has come of it. A file that is torn, or another's, counts as
        none; `damage` says what it is."""
        for path, whole in ((self.path, True), (self._part, False)):
            if path.is_file():
                found = self._read(path, whole=whole)
                if found is not None:
                    return found
        return {}

    def set_aside(self) -> None:
        """What is damaged, or of another opponent, under another name: nothing is deleted."""
        self.close()
        for path in (self.path, self._part):
            if path.is_file():
                set_aside(path)

    def begin(self, known: Iterable[L]) -> None:
        """Go on with a shard that is not whole, from these answers of it."""
        lines = [json.dumps({"fingerprint": self._fingerprint}), *map(_line, known)]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write(self._part, "".join(f"{line}\n" for line in lines))
            self._file = self._part.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritten(error) from error

    def add(self, answer: L) -> None:
        """It is with the system when this returns."""
        try:
            self._file.write(f"{_line(answer)}\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritten(error) from error

    def finish(self, answers: Mapping[int, L]) -> None:
        """Write the whole file beside its place, and move it there."""
        self.close()
        body = "".join(f"{_line(answers[row])}\n" for row in self.rows)
        head = {**self._identity, "fingerprint": self._fingerprint, "answers": len(self.rows), "digest": _digest(body)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write(self.path, f"{json.dumps(head)}\n{body}")
            self._part.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, path: Path, *, whole: bool) -> dict[int, L] | None:
        """None for a file that is not this shard's, or, where it has to be whole, torn."""
        try:
            head, _, body = path.read_text(encoding="utf-8").partition("\n")
            said = json.loads(head)
            if said.get("fingerprint") != self._fingerprint:
                self.damage = f"{path.name} holds other answers than these"
                return None
            if whole and said.get("digest") != _digest(body):
                self.damage = f"{path.name} is torn"
                return None
            lines = body.split("\n")[:-1]  # what a kill cut short has no end
            found = [self._kind.of(each) for each in map(json.loads, lines)]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            self.damage = f"{path.name} cannot be read: {type(error).__name__}: {error}"
            return None
        return {answer.row: answer for answer in found}

    def _unwritten(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            "answers could not be written; those that were are kept",
            where=str(self.path),
            value=f"{type(error).__name__}: {error}",
            remedy="free disk space, then resume=true (a comparison: the same command again)",
        )


def settings_of(sampling: Sampling) -> dict[str, Any]:
    """What differs from the defaults: a later version's new setting does not make old answers another's."""
    usual = asdict(Sampling(0))
    return {key: value for key, value in asdict(sampling).items() if value != usual[key]}


def _line(answer: Any) -> str:
    usual = {each.name: each.default for each in fields(answer)}
    return json.dumps({key: value for key, value in asdict(answer).items() if value != usual[key]})


def _digest(body: str) -> str:
    return hashlib.blake2b(body.encode(), digest_size=16).hexdigest()


def _write(path: Path, text: str) -> None:
    """Beside its place, to the disk, then moved there."""
    writing = path.with_name(f".{path.name}.writing")
    with writing.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    writing.replace(path)

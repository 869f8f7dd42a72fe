"""Plain texts as rows of tokens, for what is learned beside a reward so that it is not forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.data.config import SourceConfig
from rayalign.data.rows import decoded
from rayalign.data.tables import open_table
from rayalign.errors import DataError
from rayalign.types import Sequence as Row

KEY = "algorithm.ptx.path"
TEXT = ".txt"


class PlainText:
    """Rows of at most so many tokens: which a step takes is a function of seed and step alone.

    Args:
        path: a .txt file, which is one text, or a data set with a column of texts.
        column: of the data set.
        tokens: of a row; longer texts are several rows, and a last token alone is left out.
        count: rows of a step.

    Raises:
        DataError: no such file or column, or no text of two tokens.
    """

    def __init__(self, path: str, tokenizer: Any, *, column: str, tokens: int, count: int, seed: int):
        self._count, self._seed = count, seed
        with _of_the_key():
            self._rows = [
                Row((piece[0],), tuple(piece[1:]))
                for text in _texts(path, column)
                for piece in _pieces(tokenizer(text)["input_ids"], tokens)
            ]
        if not self._rows:
            raise DataError(
                "there is no text to learn from",
                where=f"key {KEY}",
                value=path,
                rule="at least one text of two tokens",
                remedy="give another file",
            )

    def __len__(self) -> int:
        return len(self._rows)

    def of_step(self, step: int) -> list[Row]:
        """All rows once, in a random order, and again in another one."""
        found = []
        for slot in range(step * self._count, (step + 1) * self._count):
            turn, place = divmod(slot, len(self._rows))
            order = np.random.default_rng((self._seed, turn)).permutation(len(self._rows))
            found.append(self._rows[order[place]])
        return found


def load_texts(algorithm: Any, tokenizer: Any, *, seed: int) -> PlainText | None:
    """What an algorithm mixes into its updates, where it does that. Raises DataError."""
    ptx = getattr(algorithm, "ptx", None)
    if ptx is None:
        return None
    return PlainText(ptx.path, tokenizer, column=ptx.column, tokens=ptx.tokens, count=ptx.count, seed=seed)


def _pieces(ids: list[int], tokens: int) -> Iterator[list[int]]:
    pieces = (ids[start : start + tokens] for start in range(0, len(ids), tokens))
    return (piece for piece in pieces if len(piece) > 1)


def _texts(path: str, column: str) -> Iterator[str]:
    file = Path(path).expanduser()
    if file.suffix == TEXT and file.is_file() and file.stat().st_size:
        yield decoded(file.read_bytes(), str(file))
        return
    table = open_table(SourceConfig(path=path), KEY, also=(TEXT,))
    for index in range(len(table)):
        row = table.row(index)
        if not isinstance(row.get(column), str):
            raise DataError(
                "a row has no text",
                where=table.where(index),
                value=f"columns {', '.join(map(str, row))}",
                rule=f"a text in the column {column}",
                remedy="set algorithm.ptx.column to the column of the texts",
            )
        yield row[column]


@contextmanager
def _of_the_key() -> Iterator[None]:
    """What is wrong with a file or row, said with the key that names it: it may be one of several data files."""
    try:
        yield
    except DataError as error:
        error.where = f"key {KEY}, {error.where}"
        raise

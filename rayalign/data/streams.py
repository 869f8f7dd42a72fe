"""A source of examples that is read as a stream, through a shuffle buffer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from rayalign.data.config import DataConfig, SourceConfig
from rayalign.data.groups import Tokeniser
from rayalign.data.order import uniform
from rayalign.data.readers import prompt_key
from rayalign.data.sources import Source
from rayalign.data.tables import Numbered, Stream
from rayalign.data.votes import ANY, Classes
from rayalign.errors import DataError
from rayalign.types import Group

FIRST = 1000  # rows that are looked at before the start; among them those held out are drawn


class StreamSource(Source):
    """A data set that is read as it comes, through a shuffle buffer, from its beginning again and again.

    Attributes:
        rows: training rows of one pass, known after `hold_out` where there are fewer than a thousand.
        looked_at: rows that were read to see what the stream holds.
    """

    def __init__(
        self,
        source: SourceConfig,
        data: DataConfig,
        kinds: Sequence[str],
        tokeniser: Tokeniser,
        place: int,
        *,
        seed: int,
        ties: bool = False,
        classes: Classes = ANY,
    ):
        super().__init__(source, data, kinds, tokeniser, place, ties=ties, classes=classes)
        self._seed, self._position, self._open = seed, 0, iter(())
        self.rows: int | None = None
        self.looked_at = 0
        self._first: np.ndarray | None = None  # keys of all rows, where they are few
        self._held: frozenset[int] = frozenset()
        self._noted: set[tuple[str, int]] = set()
        self._rows = Stream(source)
        self.fingerprint = self._rows.fingerprint
        first = next((row for _, _, row in self._rows if not isinstance(row, DataError)), None)
        if first is None:
            raise self._nothing("there is not one row in this data")
        reading = self._start(first)
        if reading.form.needs[-1] == "ratings" and classes.ratings is None:
            raise DataError(
                "the classes of a stream's ratings are not known",
                where=source.path,
                value="ratings, and stream: true",
                rule="the lowest and the highest rating of all rows, which nobody knows before the end",
                remedy="set algorithm.ratings, write votes (how many annotators chose each class), or take stream out",
            )

    def look(self) -> np.ndarray:
        """Read the first rows: their labels, how many there are, and the keys of the prompts to hold out."""
        keys, place = [], -1
        for place, (_, where, raw) in enumerate(self._rows):
            if place >= FIRST and (self.kind != "label" or len(self.labels) > 1 or place >= self._data.shuffle_buffer):
                break
            try:
                row = self._reader.read(_readable(raw), where)
            except DataError:
                continue  # said when it is taken
            if place < FIRST:
                keys.append(prompt_key(row))
            if row.kind == "label":
                self.labels.update(row.scores)
        else:
            place += 1
            self._first = np.array(keys, np.uint64) if place <= FIRST else None
        self.looked_at = place
        known = np.unique(np.array(keys, np.uint64))
        return known[uniform(self._data.shuffle_seed, known) < self._data.held_out]

    def hold_out(self, prompts: np.ndarray) -> None:
        """Keep rows with these prompts' keys out of training."""
        self._held = frozenset(prompts.tolist())
        if self._first is not None:
            self.rows = int((~np.isin(self._first, prompts)).sum())

    def held_out(self) -> Iterator[Group]:
        for index, where, raw in itertools.islice(self._rows, FIRST):
            if self._is_held_out(where, raw) and (group := self._read(index, where, raw, "held", noisy=False)):
                yield group

    def take(self, position: int) -> Group | None:
        """The row at this position in the order of the run; None when it is of no use."""
        if position < self._position or self._position == 0:
            self._open, self._position = self._endless(), 0
        for epoch, (index, where, raw) in self._open:
            self._position += 1
            if self._position > position:
                return self._read(index, where, raw, str(epoch), noisy=True)
        raise AssertionError("a stream has no end")

    def _is_held_out(self, where: str, raw: dict[str, object] | DataError) -> bool:
        if not self._held:
            return False
        try:
            return prompt_key(self._reader.read(_readable(raw), where)) in self._held
        except DataError:
            return False

    def _endless(self) -> Iterator[tuple[int, Numbered]]:
        for epoch in itertools.count():
            random = np.random.default_rng([self._seed, self.place, epoch])
            buffer: list[Numbered] = []
            for each in self._rows:
                if self._is_held_out(*each[1:]):
                    continue
                if len(buffer) < self._data.shuffle_buffer:
                    buffer.append(each)
                    continue
                slot = int(random.integers(len(buffer)))
                yield epoch, buffer[slot]
                buffer[slot] = each
            if not buffer:
                raise self._nothing("no row of this stream is left to learn from")
            for slot in random.permutation(len(buffer)):
                yield epoch, buffer[slot]

    def _nothing(self, what: str) -> DataError:
        return DataError(
            what,
            where=self.source.path,
            value="0 rows",
            rule="at least one row that is not held out",
            remedy="write rows, name another data set, or lower data.held_out",
        )

    def _read(
        self, index: int, where: str, raw: dict[str, object] | DataError, name: str, *, noisy: bool
    ) -> Group | None:
        first = index not in self._dropped
        try:
            group, cut = self._group(self._reader.read(_readable(raw), where), index, where, name, noisy=noisy)
        except DataError as error:
            self._dropped.add(index)
            if first or self._data.on_bad_row == "error":
                self._refuse(error)
            return None
        self._note("truncated", index, cut)
        self._note("flipped", index, noisy and bool(self._noise.turned(np.array([index]))[0]))
        return group

    def _note(self, name: str, index: int, met: bool) -> None:
        """Count a row once, however often it comes."""
        if met and (name, index) not in self._noted:
            self._noted.add((name, index))
            self.counts[name] += 1


def _readable(raw: dict[str, object] | DataError) -> dict[str, object]:
    if isinstance(raw, DataError):
        raise raw
    return raw

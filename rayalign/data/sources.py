"""One source of examples: its usable rows found once, or read as a stream, and its noise."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rayalign.data.columns import Reading, read_columns
from rayalign.data.config import DataConfig, SourceConfig
from rayalign.data.groups import Tokeniser
from rayalign.data.order import held_out_places, uniform
from rayalign.data.readers import Reader, Row, counted
from rayalign.data.tables import Numbered, Stream, open_table
from rayalign.data.tokens import Turns
from rayalign.errors import DataError
from rayalign.types import Group

HELD_OUT_OF = 1000  # rows of a stream among which those held out are drawn
Counts = Counter[str]


class Noise:
    """The source's `label_noise`, a function of the row's number."""

    def __init__(self, source: SourceConfig, kind: str):
        self._noise, self._kind = source.label_noise, kind
        if self._noise is not None and kind in ("completion", "votes"):
            raise DataError(
                "there are no labels here that noise could turn round",
                where=source.path,
                value=f"label_noise on rows of the kind {kind}",
                rule="label_noise is for pairs, good and bad labels, and ranked answers",
                remedy="take label_noise out",
            )

    def turned(self, indices: np.ndarray) -> np.ndarray:
        """Which of these rows are changed by it; of ranked rows under uniform noise, which are drawn anew."""
        if self._noise is None:
            return np.zeros(len(indices), bool)
        met = uniform(2 * self._noise.seed, indices) < self._noise.prob
        if self._noise.kind == "uniform" and self._kind != "ranked":
            met &= uniform(2 * self._noise.seed + 1, indices) < 0.5
        return met

    def apply(self, row: Row, index: int) -> Row:
        if self._noise is None or not self.turned(np.array([index]))[0]:
            return row
        count = len(row.answers)
        if self._noise.kind == "uniform" and row.kind == "ranked":
            return row.turned(np.random.default_rng([self._noise.seed, index]).permutation(count).tolist())
        return row.turned(range(count)[::-1])


class Source:
    """What both kinds of sources share.

    Args:
        place: the source's place in the config, part of the names of its groups.
        first: added to a row's number to make the prompt's index.
    """

    def __init__(self, source: SourceConfig, data: DataConfig, kinds: Sequence[str], tokeniser: Tokeniser, place: int):
        self.source, self._data, self._kinds, self._tokeniser = source, data, kinds, tokeniser
        self.place, self.first, self.kind = place, 0, ""
        self.counts: Counts = Counter()
        self.classes: tuple[int, int] | None = None
        self._reader: Reader | None = None
        self._dropped: set[int] = set()

    def _start(self, row: dict[str, object]) -> Reading:
        reading = read_columns(list(row), self.source.columns, self._kinds, self.source.path)
        path = Path(self.source.path).expanduser()
        folder = path if path.is_dir() else path.parent if path.is_file() else Path()
        self._reader = Reader(reading, system=self._data.system, chat=self._data.chat_template, folder=folder)
        self._tokeniser = self._tokeniser.reading(reading, self.source.path)
        self.kind = reading.form.kind
        self._noise = Noise(self.source, self.kind)
        return reading

    @property
    def turns(self) -> Turns:
        """How its texts become tokens."""
        return self._tokeniser.turns

    def _group(self, row: Row, index: int, where: str, name: str, *, noisy: bool) -> Group:
        if noisy:
            row = self._noise.apply(row, index)
        if row.ratings and self.classes is not None:
            row = replace(row, votes=(counted(row.ratings, *self.classes),))
        return self._tokeniser.group(row, where, index=self.first + index, id=f"{self.place}/{name}/{index}")

    def _refuse(self, error: DataError) -> None:
        """Raise it, or count it, as the config says."""
        if self._data.on_bad_row == "error":
            raise error
        self.counts["skipped"] += 1
        self.counts[f"skipped: {error.what}"] += 1


class TableSource(Source):
    """A data set whose rows are all there: each is read once to see whether it is of use, tokenised when taken."""

    def __init__(self, source: SourceConfig, data: DataConfig, kinds: Sequence[str], tokeniser: Tokeniser, place: int):
        super().__init__(source, data, kinds, tokeniser, place)
        self._table = open_table(source)
        self.rows = min(len(self._table), source.limit or len(self._table))
        self.labels: set[float] = set()
        good = np.fromiter(self._usable(), np.int64)
        if not len(good):
            raise self._nothing()
        held = held_out_places(len(good), data.held_out, data.shuffle_seed)
        self.held_out, self.training = good[held], np.delete(good, held)
        if flipped := int(self._noise.turned(self.training).sum()):
            self.counts["flipped"] = flipped
        self.fingerprint = self._table.fingerprint

    def _usable(self) -> Iterator[int]:
        for index in range(self.rows):
            where = self._table.where(index)
            try:
                raw = self._table.row(index)
            except DataError as error:
                self._refuse(error)
                continue
            if self._reader is None:
                self._start(raw)
            try:
                row = self._reader.read(raw, where)
                cut = self._tokeniser.is_cut(row, where)
            except DataError as error:
                self._refuse(error)
                continue
            self.counts["truncated"] += cut
            if row.kind == "label":
                self.labels.update(row.scores)
            if row.ratings:
                known = (*row.ratings, *(self.classes or ()))
                self.classes = (min(known), max(known))
            yield index

    def group(self, index: int, name: str, *, noisy: bool = True) -> Group | None:
        """The group of a row that is of use; None for one that turns out not to be when it is tokenised."""
        where = self._table.where(index)
        try:
            return self._group(self._reader.read(self._table.row(index), where), index, where, name, noisy=noisy)
        except DataError as error:
            if self._data.on_bad_row == "error" or index not in self._dropped:
                self._refuse(error)
            self._dropped.add(index)
            return None

    def _nothing(self) -> DataError:
        reasons = [f"{count} × {name.removeprefix('skipped: ')}" for name, count in self.counts.items() if ": " in name]
        return DataError(
            "there is not one row to learn from in this data",
            where=self.source.path,
            value=f"{self.rows} rows" + (f"; {', '.join(reasons)}" if reasons else ""),
            rule="at least one row that is not skipped",
            remedy="see the first bad row with data.on_bad_row=error"
            if reasons
            else "write rows, or name another file",
        )


class StreamSource(Source):
    """A data set that is read as it comes, through a shuffle buffer, from its beginning again and again."""

    def __init__(
        self, source: SourceConfig, data: DataConfig, kinds: Sequence[str], tokeniser: Tokeniser, place: int, seed: int
    ):
        super().__init__(source, data, kinds, tokeniser, place)
        self._seed, self._position, self._open = seed, 0, iter(())
        self._rows = Stream(source)
        self.fingerprint = self._rows.fingerprint
        first = next((row for _, _, row in self._rows if not isinstance(row, DataError)), None)
        if first is None:
            raise self._nothing("there is not one row in this data")
        reading = self._start(first)
        if reading.form.needs[-1] == "ratings":
            raise DataError(
                "the classes of a stream's ratings are not known",
                where=source.path,
                value="ratings, and stream: true",
                rule="the lowest and the highest rating of all rows, which nobody knows before the end",
                remedy="write votes (how many annotators chose each class), or take stream out",
            )

    def held_out(self) -> Iterator[Group]:
        for index, where, raw in itertools.islice(self._rows, HELD_OUT_OF):
            if self._is_held_out(index) and (group := self._read(index, where, raw, "held", noisy=False)):
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

    def _is_held_out(self, index: int) -> bool:
        return index < HELD_OUT_OF and bool(uniform(self._data.shuffle_seed, index) < self._data.held_out)

    def _endless(self) -> Iterator[tuple[int, Numbered]]:
        for epoch in itertools.count():
            random = np.random.default_rng([self._seed, self.place, epoch])
            buffer: list[Numbered] = []
            for each in self._rows:
                if self._is_held_out(each[0]):
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
            if isinstance(raw, DataError):
                raise raw
            return self._group(self._reader.read(raw, where), index, where, name, noisy=noisy)
        except DataError as error:
            self._dropped.add(index)
            if first or self._data.on_bad_row == "error":
                self._refuse(error)
            return None

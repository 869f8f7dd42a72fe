"""One source of examples: its usable rows, found once, and its noise. Streams are in `streams`."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rayalign.data.columns import Reading, read_columns
from rayalign.data.config import DataConfig, SourceConfig
from rayalign.data.groups import Tokeniser
from rayalign.data.order import uniform
from rayalign.data.readers import Reader, Row, counted, prompt_key
from rayalign.data.tables import open_table
from rayalign.data.tokens import Turns
from rayalign.data.votes import ANY, Classes
from rayalign.errors import DataError
from rayalign.types import Group

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
        drawn = np.random.default_rng([self._noise.seed, index]).permutation(len(row.answers))
        if row.kind != "ranked":
            return row.turned(range(len(row.answers))[::-1])
        if self._noise.kind == "uniform":
            return row.turned(drawn.tolist())
        # The best answer takes the place of the worst, the second that of the last but one; of equals any.
        best_first = drawn[np.argsort(-np.array(row.scores)[drawn], kind="stable")]
        order = np.empty_like(drawn)
        order[best_first[::-1]] = best_first
        return row.turned(order.tolist())


class Source:
    """What both kinds of sources share.

    Args:
        place: the source's place in the config, part of the names of its groups.
        ties: whether pairs may be equally good, see `readers.Reader`.
        classes: that votes are for.

    Attributes:
        first: added to a row's number to make the prompt's index.
        rated: the lowest and the highest rating of the data, where ratings are votes and no key says for what.
    """

    def __init__(
        self,
        source: SourceConfig,
        data: DataConfig,
        kinds: Sequence[str],
        tokeniser: Tokeniser,
        place: int,
        *,
        ties: bool = False,
        classes: Classes = ANY,
    ):
        self._ties, self._classes = ties, classes
        self.source, self._data, self._kinds, self._tokeniser = source, data, kinds, tokeniser
        self.place, self.first, self.kind = place, 0, ""
        self.counts: Counts = Counter()
        self.rated: tuple[int, int] | None = None
        self.labels: set[float] = set()
        self._reader: Reader | None = None
        self._dropped: set[int] = set()

    def _start(self, row: dict[str, object]) -> Reading:
        def read(found: Sequence[str]) -> Reading:
            return read_columns(found, self.source.columns, self._kinds, self.source.path)

        path = Path(self.source.path).expanduser()
        folder = path if path.is_dir() else path.parent if path.is_file() else Path()
        chat = self._data.chat_template
        self._reader = Reader(
            read,
            list(row),
            system=self._data.system,
            chat=chat,
            ties=self._ties,
            classes=self._classes,
            folder=folder,
        )
        reading = self._reader.reading
        self._tokeniser = self._tokeniser.reading(reading, self.source.path)
        self.kind = reading.form.kind
        self._noise = Noise(self.source, self.kind)
        return reading

    @property
    def turns(self) -> Turns:
        """How its texts become tokens."""
        return self._tokeniser.turns

    def _group(self, row: Row, index: int, where: str, name: str, *, noisy: bool) -> tuple[Group, bool]:
        """The group, and whether something of it was cut."""
        if noisy:
            row = self._noise.apply(row, index)
        if row.ratings and self.rated is not None:
            row = replace(row, votes=(counted(row.ratings, *self.rated),))
        return self._tokeniser.group(row, where, index=self.first + index, id=f"{self.place}/{name}/{index}")

    def _refuse(self, error: DataError) -> None:
        """Raise it, or count it, as the config says."""
        if self._data.on_bad_row == "error":
            raise error
        self.counts["skipped"] += 1
        self.counts[f"skipped: {error.what}"] += 1


class TableSource(Source):
    """A data set whose rows are all there: each is read once to see whether it is of use, tokenised when taken."""

    def __init__(
        self,
        source: SourceConfig,
        data: DataConfig,
        kinds: Sequence[str],
        tokeniser: Tokeniser,
        place: int,
        *,
        ties: bool = False,
        classes: Classes = ANY,
    ):
        super().__init__(source, data, kinds, tokeniser, place, ties=ties, classes=classes)
        self._table = open_table(source)
        self.rows = min(len(self._table), source.limit or len(self._table))
        self._keys = array("Q")
        self.training = np.fromiter(self._usable(), np.int64)
        self.held_out = self.training[:0]
        if not len(self.training):
            raise self._nothing()
        self.fingerprint = self._table.fingerprint

    @property
    def keys(self) -> np.ndarray:
        """Of the prompt of each row of use, until `hold_out`."""
        return np.frombuffer(self._keys, np.uint64)

    def hold_out(self, prompts: np.ndarray) -> None:
        """Keep the rows with these prompts' keys out of training."""
        held = np.isin(self.keys, prompts)
        self.held_out, self.training = self.training[held], self.training[~held]
        self._keys = array("Q")
        if flipped := int(self._noise.turned(self.training).sum()):
            self.counts["flipped"] = flipped

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
                known = (*row.ratings, *(self.rated or ()))
                self.rated = (min(known), max(known))
            self._keys.append(prompt_key(row))
            yield index

    def group(self, index: int, name: str, *, noisy: bool = True) -> Group | None:
        """The group of a row that is of use; None for one that turns out not to be when it is tokenised."""
        where = self._table.where(index)
        try:
            return self._group(self._reader.read(self._table.row(index), where), index, where, name, noisy=noisy)[0]
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

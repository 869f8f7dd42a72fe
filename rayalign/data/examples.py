"""Data sets of answers, with what their annotators said of them, as the groups that algorithms learn from."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from rayalign.data.config import DataConfig
from rayalign.data.groups import Tokeniser
from rayalign.data.order import Mixture, Passes, held_out_prompts, uniform
from rayalign.data.sources import TableSource
from rayalign.data.streams import StreamSource
from rayalign.data.tokens import Turns
from rayalign.data.votes import ANY, Classes
from rayalign.errors import DataError
from rayalign.types import Group

AnySource = TableSource | StreamSource
KINDS = {
    "pair": "pairs",
    "completion": "answers",
    "label": "labelled answers",
    "ranked": "ranked",
    "votes": "voted on",
    "answers": "answers to compare",
}


class ExampleSet:
    """Groups of one or several data sets, tokenised when they are taken.

    Attributes:
        rows: training rows in one pass; None where one source is a stream.
        known_rows: the same, known of a short stream as well.
        held_out: groups for evaluation, without label noise, in an order that data.shuffle_seed draws. A sequence that
            makes them when they are looked at.
        end: the tokens that end an answer, on which an engine has to stop.
        fingerprint: of the rows and of how they become tokens; the same in every process.
    """

    def __init__(self, config: DataConfig, sources: Sequence[AnySource], turns: Turns, *, max_tokens: int, seed: int):
        self._config, self._sources, self._max, self.end = config, sources, max_tokens, turns.end
        tables = [source for source in sources if isinstance(source, TableSource)]
        if any(source.source.weight is not None for source in sources) and len(sources) > 1:
            self._pools: list[_Pool | StreamSource] = [
                _Pool([source], seed=(seed, source.place)) if isinstance(source, TableSource) else source
                for source in sources
            ]
            self._mixture = Mixture([source.source.weight or 1.0 for source in sources], seed=seed)
        else:
            self._pools = [_Pool(tables, seed=(seed,)) if tables else sources[0]]
            self._mixture = None
        self.rows = sum(len(source.training) for source in tables) if len(tables) == len(sources) else None
        self.known_rows = sources[0].rows if self.rows is None and len(sources) == 1 else self.rows
        self.held_out: Sequence[Group] = _HeldOut(sources, config.shuffle_seed)
        self.fingerprint = _fingerprint(config, sources, turns, max_tokens)

    def step(self, index: int, count: int) -> list[Group]:
        """The groups of one training step: slots index·count … of an endless order that the seed fixes. Fewer than
        `count` when rows turn out to be of no use only now (data.on_bad_row=skip), of a stream for instance.

        Raises:
            DataError: such a row, with data.on_bad_row=error.
        """
        taken = (self._slot(slot) for slot in range(index * count, (index + 1) * count))
        return [group for group in taken if group is not None]

    def once(self, count: int) -> Iterator[list[Group]]:
        """All training rows of sources that are no streams, each once, in parts of `count`."""
        tables = (source for source in self._sources if isinstance(source, TableSource))
        rows = ((table, row) for table in tables for row in table.training.tolist())
        while part := list(itertools.islice(rows, count)):
            yield [group for table, row in part if (group := table.group(row, "0")) is not None]

    def row(self, number: int) -> Group | None:
        """One of the training rows of sources that are no streams, by its number among all of them, from 0; None for
        one that turns out to be of no use only now."""
        for table in (source for source in self._sources if isinstance(source, TableSource)):
            if number < len(table.training):
                return table.group(int(table.training[number]), "0")
            number -= len(table.training)
        raise IndexError(number)

    def _slot(self, slot: int) -> Group | None:
        pool, position = self._mixture[slot] if self._mixture else (0, slot)
        return self._pools[pool].take(position)

    @property
    def counts(self) -> dict[str, int]:
        """What became of the rows: training, held_out, skipped, "skipped: REASON", truncated, flipped."""
        total: Counter[str] = Counter()
        if self.rows is not None:
            total["training"] = self.rows
        total["held_out"] = len(self.held_out)
        total.update({"skipped": 0, "truncated": 0})
        for source in self._sources:
            total.update(source.counts)
        return dict(total)

    def describe(self) -> str:
        """One line: how many rows of what, and what was left out or changed."""
        counts, named = self.counts, [source.source.path for source in self._sources]
        kinds = " and ".join(dict.fromkeys(KINDS[source.kind] for source in self._sources))
        rows = f"{counts['training']:,}" if self.rows is not None else "a stream of"
        parts = [f"{rows} {kinds} from {', '.join(named)}", f"{counts['held_out']:,} held out"]
        reasons = [f"{each:,} × {name.partition(': ')[2]}" for name, each in counts.items() if ": " in name]
        if counts["skipped"]:
            parts.append(f"{counts['skipped']:,} skipped ({', '.join(reasons)})")
        if counts["truncated"]:
            context = " (the model's context)" if self._max < self._config.max_tokens else ""
            parts.append(f"{counts['truncated']:,} cut to {self._max} tokens{context}")
        if counts.get("flipped"):
            parts.append(f"{counts['flipped']:,} labels turned by label_noise")
        return ", ".join(parts)


def load_examples(
    config: DataConfig,
    tokenizer: Any,
    *,
    kinds: Sequence[str],
    max_tokens: int,
    seed: int,
    processor: Callable[[], Any] | None = None,
    images: bool = False,
    ties: bool = False,
    gold: bool = False,
    classes: Classes = ANY,
    segments: bool = False,
) -> ExampleSet:
    """Open the data sets, read each row once to see whether it is of use, and hold some of them out.

    Args:
        kinds: of rows, that the algorithm learns from: "completion", "pair", "label", "ranked", "votes", "answers".
        max_tokens: of a prompt with an answer; what is longer is cut, and counted.
        seed: of the order.
        processor: gives the model's, as AutoProcessor loads it; asked for when there are images.
        images: whether each row has to have one.
        ties: whether a pair whose annotators are undecided is of use.
        gold: whether reference answers, where a row has one, become tokens.
        classes: that votes are for.
        segments: of an encoder, see `tokens.Turns`.

    Raises:
        DataError: with file, row, value, rule and remedy.
    """
    turns = Turns(tokenizer, chat_template=config.chat_template, segments=segments)
    limit = "the model's context" if max_tokens < config.max_tokens else "data.max_tokens"
    tokeniser = Tokeniser(turns, max_tokens=max_tokens, limit=limit, processor=processor, images=images, gold=gold)
    sources: list[AnySource] = []
    first = 0
    for place, source in enumerate(config.examples):
        if source.stream:
            sources.append(StreamSource(source, config, kinds, tokeniser, place, seed=seed, ties=ties, classes=classes))
        else:
            table = TableSource(source, config, kinds, tokeniser, place, ties=ties, classes=classes)
            table.first = first
            first += table.rows
            sources.append(table)
    _hold_out(config, sources)
    _rate_alike(sources, classes)
    _check_labels(sources)
    turns = next((source.turns for source in sources if source.turns is not turns), turns)
    return ExampleSet(config, sources, turns, max_tokens=max_tokens, seed=seed)


def _hold_out(config: DataConfig, sources: Sequence[AnySource]) -> None:
    """A share of the prompts, with all their rows, of whatever source; of streams among the first rows."""
    looked = [source.look() for source in sources if isinstance(source, StreamSource)]
    keys = [source.keys for source in sources if isinstance(source, TableSource)]
    if not looked:
        held = held_out_prompts(np.concatenate(keys), config.held_out, config.shuffle_seed)
    else:  # as a stream's rows come, each prompt by itself
        known = np.unique(np.concatenate([*keys, np.zeros(0, np.uint64)]))
        held = np.concatenate([*looked, known[uniform(config.shuffle_seed, known) < config.held_out]])
    for source in sources:
        source.hold_out(held)


class _Pool:
    """Tables as one: each row once in a pass."""

    def __init__(self, sources: Sequence[TableSource], *, seed: Sequence[int]):
        self._sources = sources
        count = sum(len(source.training) for source in sources)
        if not count:
            raise DataError(
                "no row is left to learn from",
                where=", ".join(source.source.path for source in sources),
                value=f"all rows held out: {sum(len(source.held_out) for source in sources)}",
                rule="at least one row of each source that has a weight is trained on",
                remedy="lower data.held_out, write more rows, or take the weights out",
            )
        self._passes = Passes(count, seed=seed)

    def take(self, position: int) -> Group | None:
        epoch, row = self._passes[position]
        for source in self._sources:
            if row < len(source.training):
                return source.group(int(source.training[row]), str(epoch))
            row -= len(source.training)
        raise IndexError(row)


class _HeldOut(Sequence[Group]):
    """Rows that are held out, made into groups when they are looked at. The first of them are a fair sample of all."""

    def __init__(self, sources: Sequence[AnySource], seed: int):
        places: list[tuple[TableSource, int] | Group] = []
        for source in sources:
            if isinstance(source, TableSource):
                places += [(source, index) for index in source.held_out.tolist()]
            else:
                places += source.held_out()
        self._places = [places[i] for i in np.random.default_rng(seed).permutation(len(places)).tolist()]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Group, ...]: ...
    def __getitem__(self, index: int | slice) -> Group | tuple[Group, ...]:
        if isinstance(index, slice):
            return tuple(group for each in self._places[index] if (group := self._made(each)) is not None)
        return self[index : index + 1 or None][0]

    def __iter__(self) -> Iterator[Group]:
        return (group for each in self._places if (group := self._made(each)) is not None)

    @staticmethod
    def _made(place: tuple[TableSource, int] | Group) -> Group | None:
        return place if isinstance(place, Group) else place[0].group(place[1], "held", noisy=False)


def _rate_alike(sources: Sequence[AnySource], classes: Classes) -> None:
    """A rating is a vote for the same class in all of them."""
    known = [rating for source in sources for rating in source.rated or ()]
    if not known:
        return
    lowest, highest = min(known), max(known)
    if classes.names and highest - lowest + 1 != len(classes.names):
        raise DataError(
            "these votes do not match the classes",
            where=", ".join(source.source.path for source in sources if source.rated),
            value=f"ratings from {lowest} to {highest}, of which each whole number is a class",
            rule=f"{len(classes.names)} classes: {classes.in_words}",
            remedy="set algorithm.ratings: which of them are a vote for each class; or correct the lowest or highest "
            "rating, or algorithm.classes",
        )
    for source in sources:
        source.rated = (lowest, highest)


def _check_labels(sources: Sequence[AnySource]) -> None:
    """Good and bad answers can only be told apart when there are both."""
    labelled = [source for source in sources if source.kind == "label"]
    labels = set().union(*(source.labels for source in labelled))
    if len(labels) != 1 or len(labelled) < len(sources):
        return
    first = max((source.looked_at for source in labelled if isinstance(source, StreamSource)), default=0)
    word = "good" if labels == {1.0} else "bad"
    raise DataError(
        "all labels are equal",
        where=", ".join(source.source.path for source in labelled),
        value=f"each of the stream's first {first:,} answers is {word}" if first else f"each answer is {word}",
        rule="good answers and bad ones",
        remedy="add the others, or use an algorithm that learns from good answers alone, as sft does"
        + ("; mix rows that are sorted, or take stream out" if first else ""),
    )


def _fingerprint(config: DataConfig, sources: Sequence[AnySource], turns: Turns, max_tokens: int) -> str:
    said = config.model_dump(mode="json", exclude={"prompts", "split", "prompt_column", "long_prompts"})
    for each in said["examples"]:
        each.pop("path")  # the same rows elsewhere are the same rows
    text = json.dumps([said, [source.fingerprint for source in sources], turns.fingerprint, max_tokens], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

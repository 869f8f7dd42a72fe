"""Data sets of answers, with what their annotators said of them, as the groups that algorithms learn from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from rayalign.data.config import DataConfig
from rayalign.data.groups import Tokeniser
from rayalign.data.order import Mixture, Passes
from rayalign.data.sources import StreamSource, TableSource
from rayalign.data.tokens import Turns
from rayalign.errors import DataError
from rayalign.types import Group

AnySource = TableSource | StreamSource
KINDS = {"pair": "pairs", "completion": "answers", "label": "labelled answers", "ranked": "ranked", "votes": "voted on"}


class ExampleSet:
    """Groups of one or several data sets, tokenised when they are taken.

    Attributes:
        held_out: groups for evaluation, without label noise. A sequence that makes them when they are looked at.
        end: the tokens that end an answer, on which an engine has to stop.
        fingerprint: of the rows and of how they become tokens; the same in every process.
    """

    def __init__(self, config: DataConfig, sources: Sequence[AnySource], turns: Turns, *, max_tokens: int, seed: int):
        self._config, self._sources, self.end = config, sources, turns.end
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
        self.held_out: Sequence[Group] = _HeldOut(sources)
        self.fingerprint = _fingerprint(config, sources, turns, max_tokens)

    def step(self, index: int, count: int) -> list[Group]:
        """The groups of one training step: slots index·count … of an endless order that the seed fixes. Fewer than
        `count` when rows turn out to be of no use only now (data.on_bad_row=skip), of a stream for instance.

        Raises:
            DataError: such a row, with data.on_bad_row=error.
        """
        taken = (self._slot(slot) for slot in range(index * count, (index + 1) * count))
        return [group for group in taken if group is not None]

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
            parts.append(f"{counts['truncated']:,} cut to {self._config.max_tokens} tokens")
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
) -> ExampleSet:
    """Open the data sets, read each row once to see whether it is of use, and hold some of them out.

    Args:
        kinds: of rows, that the algorithm learns from: "completion", "pair", "label", "ranked", "votes".
        max_tokens: of a prompt with an answer; what is longer is cut, and counted.
        seed: of the order.
        processor: gives the model's, as AutoProcessor loads it; asked for when there are images.
        images: whether each row has to have one.

    Raises:
        DataError: with file, row, value, rule and remedy.
    """
    turns = Turns(tokenizer, chat_template=config.chat_template)
    tokeniser = Tokeniser(turns, max_tokens=max_tokens, processor=processor, images=images)
    sources: list[AnySource] = []
    first = 0
    for place, source in enumerate(config.examples):
        if source.stream:
            sources.append(StreamSource(source, config, kinds, tokeniser, place, seed))
        else:
            table = TableSource(source, config, kinds, tokeniser, place)
            table.first = first
            first += table.rows
            sources.append(table)
    _check_labels(sources)
    turns = next((source.turns for source in sources if source.turns is not turns), turns)
    return ExampleSet(config, sources, turns, max_tokens=max_tokens, seed=seed)


class _Pool:
    """Tables as one: each row once in a pass."""

    def __init__(self, sources: Sequence[TableSource], *, seed: Sequence[int]):
        self._sources = sources
        self._passes = Passes(sum(len(source.training) for source in sources), seed=seed)

    def take(self, position: int) -> Group | None:
        epoch, row = self._passes[position]
        for source in self._sources:
            if row < len(source.training):
                return source.group(int(source.training[row]), str(epoch))
            row -= len(source.training)
        raise IndexError(row)


class _HeldOut(Sequence[Group]):
    """Rows that are held out, made into groups when they are looked at."""

    def __init__(self, sources: Sequence[AnySource]):
        self._places: list[tuple[TableSource, int] | Group] = []
        for source in sources:
            if isinstance(source, TableSource):
                self._places += [(source, index) for index in source.held_out.tolist()]
            else:
                self._places += source.held_out()

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


def _check_labels(sources: Sequence[AnySource]) -> None:
    """Good and bad answers can only be told apart when there are both."""
    labelled = [source for source in sources if source.kind == "label"]
    if not labelled or any(isinstance(source, StreamSource) for source in labelled):
        return
    labels = set().union(*(source.labels for source in labelled))
    if len(labels) == 1 and len(labelled) == len(sources):
        raise DataError(
            "all labels are equal",
            where=", ".join(source.source.path for source in labelled),
            value=f"each answer is {'good' if labels == {1.0} else 'bad'}",
            rule="good answers and bad ones",
            remedy="add the others, or use an algorithm that learns from good answers alone, as sft does",
        )


def _fingerprint(config: DataConfig, sources: Sequence[AnySource], turns: Turns, max_tokens: int) -> str:
    said = config.model_dump(mode="json", exclude={"prompts", "split", "prompt_column", "long_prompts"})
    for each in said["examples"]:
        each.pop("path")  # the same rows elsewhere are the same rows
    text = json.dumps([said, [source.fingerprint for source in sources], turns.fingerprint, max_tokens], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

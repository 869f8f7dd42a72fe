"""In which order rows are taken: functions of seeds and positions alone, so that a run can begin anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCK = 1000  # rows in which each source has exactly its share


def uniform(seed: int, index: int | np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), one for each index, whatever else is asked for (splitmix64, Steele 2014)."""
    with np.errstate(over="ignore"):
        z = np.asarray(index, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed) * np.uint64(
            0xD1342543DE82EF95
        )
        for multiplier, shift in ((0, 0), (0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
            z = (
                (z ^ (z >> np.uint64(shift))) * np.uint64(multiplier)
                if multiplier
                else z + np.uint64(0x9E3779B97F4A7C15)
            )
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def held_out_count(count: int, share: float) -> int:
    """How many of `count` rows are held out: at least one and not all of them, where there are two."""
    held = round(count * share)
    return min(max(held, 1), count - 1) if share > 0 and count > 1 else held


def held_out_prompts(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which prompts are held out with all their rows, in an order that the seed draws, as long as their rows fit in the
    share; at least one of two.

    Args:
        keys: [n] uint64, of the prompt of each row.
    """
    found, sizes = np.unique(keys, return_counts=True)
    left = held_out_count(len(keys), share)
    if not left or len(found) < 2:
        return found[:0]
    order = np.argsort(uniform(seed, found), kind="stable")
    held = []
    for place, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size <= left:
            held.append(place)
            left -= size
        if not left:
            break
    return found[held or [order[np.argmin(sizes[order])]]]


class Passes:
    """Position in a run → row of `count`, in a new random order at each pass over them."""

    def __init__(self, count: int, *, seed: Sequence[int]):
        self._count, self._seed = count, list(seed)
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(pass, row)."""
        epoch, place = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([*self._seed, epoch]).permutation(self._count)
        return epoch, int(self._order[place])


class Mixture:
    """Slot in a run → (source, position among the slots of that source).

    In each block of 1,000 slots every source has its share, to the nearest row and at least one, in a random order.

    Raises:
        ValueError: more sources than a block has slots.
    """

    def __init__(self, weights: Sequence[float], *, seed: int):
        share = np.asarray(weights, np.float64) / np.sum(weights)
        self._quota = np.maximum(np.floor(share * BLOCK).astype(np.int64), 1)
        if len(share) > BLOCK:
            raise ValueError(f"at most {BLOCK} sources can be mixed, got {len(share)}")
        while (missing := BLOCK - int(self._quota.sum())) != 0:
            if missing > 0:
                self._quota[np.argmax(share * BLOCK - self._quota)] += 1
            else:
                self._quota[np.argmax(self._quota)] -= 1
        self._seed, self._block = seed, -1
        self._sources = self._before = np.zeros(0, np.int64)

    def __getitem__(self, slot: int) -> tuple[int, int]:
        block, place = divmod(slot, BLOCK)
        if block != self._block:
            self._block = block
            ordered = np.repeat(np.arange(len(self._quota)), self._quota)
            self._sources = np.random.default_rng([self._seed, block, 7]).permutation(ordered)
            self._before = np.zeros(BLOCK, np.int64)
            for source in range(len(self._quota)):
                self._before[self._sources == source] = np.arange(self._quota[source])
        source = int(self._sources[place])
        return source, block * int(self._quota[source]) + int(self._before[place])

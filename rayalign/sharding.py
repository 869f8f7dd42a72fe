"""Which rank trains on which example, in which micro-batch. Pure: every rank works it out alone, and agrees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayalign.types import Example

Plan = list[list[list[int]]]  # [rank][micro-batch] → indices of examples


def lengths_of(examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """For each example the tokens of each of its rows, prompt and completion together."""
    return [tuple(len(row) for row in example.sequences) for example in examples]


def split(lengths: Sequence[Sequence[int]], *, ranks: int, micro_batch_tokens: int, packed: bool = False) -> Plan:
    """Deal examples to ranks by tokens, and pack each rank's into micro-batches.

    The longest examples go first, each to the rank with the fewest tokens so far. Within a rank, examples of
    similar length, and with the same number of rows, stand together, so that rows × longest row (what padding
    makes of them) stays within `micro_batch_tokens`; an example that is larger by itself stands alone.

    Args:
        lengths: for each example the tokens of each of its rows (see `lengths_of`).
        ranks: how many ranks there are.
        micro_batch_tokens: tokens of a micro-batch, padding included.
        packed: rows are laid behind one another, so that there is no padding to include.

    Returns:
        plan[rank][micro-batch] → indices. Every rank has the same number of micro-batches, those that it lacks
        are empty lists at its end. No examples give every rank an empty plan.

    Raises:
        ValueError: ranks or micro_batch_tokens under 1.
    """
    if ranks < 1 or micro_batch_tokens < 1:
        raise ValueError(f"ranks and micro_batch_tokens must be at least 1, got {ranks} and {micro_batch_tokens}")
    loads, owned = [0] * ranks, [[] for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-sum(lengths[i]), i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += sum(lengths[index])
        owned[rank].append(index)
    plan = [_pack(mine, lengths, micro_batch_tokens, packed) for mine in owned]
    count = max(map(len, plan))
    return [micros + [[] for _ in range(count - len(micros))] for micros in plan]


def _pack(indices: Sequence[int], lengths: Sequence[Sequence[int]], budget: int, packed: bool) -> list[list[int]]:
    micros: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (-len(lengths[i]), -max(lengths[i]), i)):
        last = micros[-1] if micros else []
        fits = last and len(lengths[last[0]]) == len(lengths[index])
        if fits and _size([*last, index], lengths, packed) <= budget:
            last.append(index)
        else:
            micros.append([index])
    return micros


def _size(micro: Sequence[int], lengths: Sequence[Sequence[int]], packed: bool) -> int:
    rows = [length for index in micro for length in lengths[index]]
    return sum(rows) if packed else len(rows) * max(rows)


def positions_of(lengths: Sequence[Sequence[int]], plan: Plan, *, packed: bool = False) -> tuple[int, int]:
    """Tokens, and positions with padding, of all micro-batches of a plan; fillers are not counted."""
    micros = [micro for share in plan for micro in share if micro]
    tokens = sum(_size(micro, lengths, True) for micro in micros)
    return tokens, sum(_size(micro, lengths, packed) for micro in micros)


def minibatches(n: int, *, count: int, seed: int, epoch: int) -> list[list[int]]:
    """Split n examples into at most `count` non-empty parts of nearly equal size, in a random order.

    With one part the order is that of the examples; otherwise it is a function of (seed, epoch) alone.

    Raises:
        ValueError: count under 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if count == 1:
        return [list(range(n))] if n else []
    order = np.random.default_rng([seed % 2**63, epoch]).permutation(n).tolist()
    parts = min(count, n)
    bounds = [n * part // parts for part in range(parts + 1)] if parts else [0]
    return [order[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]

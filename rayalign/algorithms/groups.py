"""From groups to the rows of examples. What cannot be learned from is left out, and counted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rayalign.maths.feedback import all_pairs, best_worst_pair
from rayalign.types import Group, Metrics
from rayalign.types import Sequence as Row


def row(group: Group, index: int) -> Row:
    """The prompt with one of its completions."""
    completion = group.completions[index]
    found = Row(group.prompt.token_ids, completion.token_ids, completion.logps, images=group.prompt.images)
    return replace(found, trust=group.trust[index]) if group.trust else found


def place_of(group: Group) -> str:
    """Where a person finds this row of a data set: its number, counted from 1 through all sources."""
    return f"data.examples, row {group.prompt.index + 1}"


def scored(group: Group) -> list[int]:
    """The completions whose score is a finite number, without contested ones and those without a token."""
    left_out = group.contested or (False,) * len(group.completions)
    there = [bool(each.token_ids) and not left for each, left in zip(group.completions, left_out, strict=True)]
    return [index for index, score in enumerate(group.scores or ()) if math.isfinite(score) and there[index]]


def is_cut(group: Group, index: int) -> bool:
    """Whether this completion has no end, as it was cut at sampling.max_tokens."""
    return group.completions[index].finish_reason == "length"


def scores_of_tokens(group: Group, index: int) -> np.ndarray:
    """[T] of a completion: as the scorer gave them, else its score at the last token."""
    if group.token_scores:
        return np.array(group.token_scores[index], np.float32)
    found = np.zeros(len(group.completions[index].token_ids), np.float32)
    found[-1] = group.scores[index]
    return found


def distinct(group: Group) -> list[int]:
    """Of the scored completions those that differ, the best first; of the same answer twice the better one."""
    found: dict[tuple[int, ...], int] = {}
    for index in sorted(scored(group), key=lambda i: -group.scores[i]):
        found.setdefault(group.completions[index].token_ids, index)
    return list(found.values())


def paired(groups: Sequence[Group], which: str) -> tuple[list[tuple[Group, int, int]], Metrics]:
    """(group, better, worse) of each pair of completions, by score, and the metrics of what was kept and left out.

    Left out (pairs/dropped) are ties, what has no finite score, and pairs of the same answer. The last are counted
    apart as well (pairs/same_answer): answers may have become the same when they were cut.

    Args:
        which: "all" pairs, or the "best_worst" one alone.
    """
    found, dropped, same = [], 0, 0
    for group in groups:
        pairs, ties, equal = _pairs_of(group, which)
        found += [(group, better, worse) for better, worse in pairs]
        dropped, same = dropped + ties + equal, same + equal
    counts = {"pairs/kept": len(found), "pairs/dropped": dropped, "pairs/same_answer": same}
    return found, {name: float(count) for name, count in counts.items()}


def _pairs_of(group: Group, which: str) -> tuple[list[tuple[int, int]], int, int]:
    """See `paired`: (better, worse), how many have no better one, and how many are the same answer twice."""
    count, kept = len(group.completions), scored(group)
    wanted = count * (count - 1) // 2 if which == "all" and count > 1 else 1
    if len(kept) < 2:
        return [], wanted, 0
    scores = torch.tensor([[group.scores[index] for index in kept]], dtype=torch.float64)
    if which == "all":
        found = [(better, worse) for _, better, worse in all_pairs(scores).tolist()]
    else:
        index, keep = best_worst_pair(scores)
        found = [tuple(index[0].tolist())] if keep[0] else []
    answers = [group.completions[index].token_ids for index in kept]
    differ = [(kept[i], kept[j]) for i, j in found if answers[i] != answers[j]]
    return differ, wanted - len(found), len(found) - len(differ)


def labelled(groups: Sequence[Group], good_above: float | str) -> tuple[list[tuple[Group, int, bool]], int]:
    """Each completion alone as (its group, its place there, whether it is good), and how many were left out.

    Left out are those without a finite score, an answer that is called good and bad in one group, and with "mean"
    those that are neither.

    Args:
        good_above: a score, or "mean": above the mean of the group's scores an answer is good, below it bad.
    """
    found, dropped = [], 0
    for group in groups:
        labels = _labels_of(group, good_above)
        said = {(group.completions[index].token_ids, good) for index, good in labels.items()}
        kept = [i for i, good in labels.items() if (group.completions[i].token_ids, not good) not in said]
        found += [(group, index, labels[index]) for index in kept]
        dropped += len(group.completions) - len(kept)
    return found, dropped


def _labels_of(group: Group, good_above: float | str) -> dict[int, bool]:
    """Whether each completion is good, by its place; see `labelled`."""
    kept = scored(group)
    if good_above != "mean":
        return {index: group.scores[index] > good_above for index in kept}
    if len({group.scores[index] for index in kept}) < 2:  # a mean in floating point may not equal its equal scores
        return {}
    mean = math.fsum(group.scores[index] for index in kept) / len(kept)
    return {index: group.scores[index] > mean for index in kept if group.scores[index] != mean}


def probabilities(group: Group, kept: Sequence[int], unrated: str) -> Tensor:
    """[k, k] P(i ≻ j) of some completions: as annotators gave them, else by the scores.

    Args:
        unrated: of a group without probabilities: "certain", 1 for the better one; "bradley_terry", σ(s_i − s_j).
    """
    index = list(kept)
    if group.preferences is not None:
        return torch.tensor(group.preferences, dtype=torch.float64)[index][:, index]
    scores = torch.tensor(group.scores, dtype=torch.float64)[index]
    lead = scores.unsqueeze(1) - scores.unsqueeze(0)
    return torch.sigmoid(lead) if unrated == "bradley_terry" else (lead.sign() + 1) / 2


class Seeds:
    """Seeds for what a loss draws: the same on any rank and in any micro-batch, others when rows meet in another order.

    Args:
        groups: of the whole step.
    """

    def __init__(self, groups: Sequence[Group]):
        self._step = repr([group.id for group in groups]).encode()

    def of(self, group: Group, *indices: int) -> float:
        """For these completions; below 2²⁴, so that it goes through a float32 unharmed."""
        own = repr((group.id, group.seed, [group.completions[index].token_ids for index in indices])).encode()
        return float(int.from_bytes(hashlib.blake2b(self._step + own, digest_size=3).digest(), "big"))

"""Pairs of sampled answers: which two of a prompt's K are compared, and which of the two is the chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from rayalign.algorithms.groups import probabilities, scored
from rayalign.types import Group, Metrics

Which = Literal["best_worst", "all", "random"]
WHICH = "which pairs of the K are trained on; random: two of them, others in each step that uses the samples"
Labels = Literal["certain", "bernoulli"]
LABELS = "who is chosen: certain, the likelier of the two; bernoulli, drawn with P(i ≻ j), as one annotator would say"


@dataclass(frozen=True)
class Pairing:
    """How pairs are made of sampled answers.

    Who is better says P(i ≻ j) where a judge gave it, and else the score. What is drawn is a function of
    `Group.seed`, so of run, step and prompt.

    Attributes:
        unrated: P(i ≻ j) of answers that only have scores, see `groups.probabilities`.
        ties: whether a pair of equally good answers is kept, because the loss learns from P = ½ as well.
    """

    which: Which
    labels: Labels = "certain"
    unrated: str = "certain"
    ties: bool = False

    def of(self, groups: Sequence[Group]) -> tuple[list[tuple[Group, int, int]], Metrics]:
        """(group, chosen, rejected) of each pair, and the metrics of what was kept and left out.

        Left out (pairs/dropped) are ties, what has no finite score, and pairs of the same answer. The last are
        counted apart as well (pairs/same_answer).
        """
        found, dropped, same = [], 0, 0
        for group in groups:
            candidates, missing = self._candidates(group)
            random = np.random.default_rng(group.seed) if self.labels == "bernoulli" else None
            ordered = [pair for pair in (self._ordered(group, *pair, random) for pair in candidates) if pair]
            answers = [completion.token_ids for completion in group.completions]
            differ = [(i, j) for i, j in ordered if answers[i] != answers[j]]
            found += [(group, i, j) for i, j in differ]
            dropped, same = dropped + missing + len(candidates) - len(differ), same + len(ordered) - len(differ)
        counts = {"pairs/kept": len(found), "pairs/dropped": dropped, "pairs/same_answer": same}
        return found, {name: float(count) for name, count in counts.items()}

    def _candidates(self, group: Group) -> tuple[list[tuple[int, int]], int]:
        """Two answers each, in any order; and how many pairs there would be besides, if all had finite scores."""
        count, kept = len(group.completions), scored(group)
        wanted = count * (count - 1) // 2 if self.which == "all" and count > 1 else 1
        if len(kept) < 2:
            return [], wanted
        if self.which == "all":
            found = list(combinations(kept, 2))
        elif self.which == "random":
            found = [tuple(sorted(np.random.default_rng((group.seed, 1)).choice(kept, 2, replace=False).tolist()))]
        else:
            scores = [group.scores[index] for index in kept]
            found = [(kept[int(np.argmax(scores))], kept[int(np.argmin(scores))])] if min(scores) < max(scores) else []
        return found, wanted - len(found)

    def _ordered(self, group: Group, i: int, j: int, random: np.random.Generator | None) -> tuple[int, int] | None:
        """(chosen, rejected) of two answers; None for a tie that is not kept."""
        if random is not None:
            wins = float(probabilities(group, (i, j), self.unrated)[0, 1])
            return (i, j) if random.random() < wins else (j, i)
        lead = float(probabilities(group, (i, j), "certain")[0, 1]) - 0.5
        if lead == 0:
            return (i, j) if self.ties else None
        return (i, j) if lead > 0 else (j, i)

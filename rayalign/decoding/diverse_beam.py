"""Diverse beam search as a pure state machine: log-probs of next tokens in, tokens to append out. No model in it.

Vijayakumar et al. 2016 (arXiv:1610.02424) with Hamming diversity, in the order and with the arithmetic (float32) of the
group beam search that transformers had up to 4.55, so that tokens and scores are the same:

- The groups go one after the other at each position. A token's log-prob is lowered by `penalty` for each beam of an
  earlier group that has the token there, and is not normalised again. Sums carry the penalty.
- A group looks at its 2 × size best continuations (1 + the number of end tokens, where that is more). One that ends
  counts only at a rank below the size; it becomes a hypothesis, and the next ones go on.
- At the first position only the first beam of each group lives.
- A group is done once it has as many hypotheses as beams and what it might reach at the present length is no better
  than the worst of them. With one beam that is at its first end token.
- What a done group adds to the penalty: in the step in which it ends, the tokens of its beams that would have gone on
  (in a group of one the second-best token, not the end token); at every later position the end token, once a beam. So
  the more groups have ended, the more the others are kept from ending.
- Scores are sum ÷ length^length_penalty, the end token counted. All groups' hypotheses are sorted together; of equals
  the later one comes first.

Groups need not go in step: one may be at any position that the groups before it have been at.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from rayalign.errors import DataError, RayalignError
from rayalign.types import Candidate, DiverseBeam, Sampling


class Top(NamedTuple):
    """The likeliest next tokens of some prefixes, in any order: token_ids int [n, k], logps float32 [n, k]."""

    token_ids: np.ndarray
    logps: np.ndarray


def top_of(logps: torch.Tensor, count: int) -> Top:
    """The `count` likeliest of next-token log-probs float32 [n, V], or all."""
    found = logps.topk(min(count, logps.shape[-1]), dim=-1)
    return Top(found.indices.cpu().numpy(), found.values.float().cpu().numpy())


@dataclass(frozen=True)
class Beam:
    """A beginning of a completion.

    Attributes:
        logps: of its tokens under the model, without penalty.
        total: their sum less the penalties, float32.
    """

    token_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    total: np.float32 = field(default_factory=lambda: np.float32(0))

    def then(self, token: int, logp: np.float32, total: np.float32) -> Beam:
        return Beam((*self.token_ids, token), (*self.logps, float(logp)), total)


@dataclass(frozen=True)
class _Group:
    """One group between two positions.

    Attributes:
        said: at each position so far, the tokens that count for later groups' penalty.
        hypotheses: (score, beam), in the order in which they were found.
        worst: of their scores.
    """

    live: tuple[Beam, ...] = (Beam(),)
    said: tuple[tuple[int, ...], ...] = ()
    hypotheses: tuple[tuple[float, Beam], ...] = ()
    worst: float = 1e9
    done: bool = False

    def with_hypothesis(self, score: float, beam: Beam, size: int) -> _Group:
        """With one more, if it is among the best `size`."""
        if len(self.hypotheses) >= size and not score > self.worst:
            return self
        found = (*self.hypotheses, (score, beam))
        if len(found) <= size:
            return replace(self, hypotheses=found, worst=min(score, self.worst))
        lowest, second = sorted((each[0], place) for place, each in enumerate(found))[:2]
        return replace(self, hypotheses=found[: lowest[1]] + found[lowest[1] + 1 :], worst=second[0])


class _Choice(NamedTuple):
    """One token after one live beam, as it is ranked."""

    total: np.float32
    parent: int
    token: int
    logp: np.float32


class DiverseBeamSearch:
    """The search of one prompt.

    Args:
        sampling: its search, max_tokens and min_tokens.
        end_ids: tokens that end a completion; the first one is what a group that has ended adds to the penalty.
    """

    def __init__(self, sampling: Sampling, end_ids: Sequence[int]):
        if sampling.search is None:
            raise ValueError("this is no search")
        self.settings, self._max, self._min = sampling.search, sampling.max_tokens, sampling.min_tokens
        self._end_ids = tuple(dict.fromkeys(end_ids))
        self._size = self.settings.beams // self.settings.groups
        self._ranked = most_ranked(self.settings, self._end_ids)
        self._groups = [_Group() for _ in range(self.settings.groups)]
        self._before = list(self._groups)  # each group one position earlier

    def width(self, group: int) -> int:
        """How many of the likeliest tokens after each beam of a group have to be known."""
        return self._ranked + len(self._end_ids) + group * self._size

    def live(self, group: int) -> tuple[Beam, ...]:
        """The beams whose next token `advance` wants, in its order; none once the group is over."""
        return () if self.over(group) else self._groups[group].live

    def steps(self, group: int) -> int:
        """Positions that a group has been at."""
        return len(self._groups[group].said)

    def over(self, group: int) -> bool:
        """Whether nothing more is added to a group: it has ended, or is as long as it may be."""
        state = self._groups[group]
        return state.done or len(state.said) == self._max

    def ended(self, group: int) -> bool:
        """Whether a group is over because its hypotheses are the best that it can reach."""
        return self._groups[group].done

    @property
    def finished(self) -> bool:
        return all(self.over(group) for group in range(len(self._groups)))

    def advance(self, group: int, top: Top, position: int | None = None) -> tuple[int, ...]:
        """Take one token for each beam of a group.

        Args:
            top: of each live beam, at least `width(group)` tokens, or the whole vocabulary.
            position: counted from 0, where the caller may ask for the last one again (what it gave was thrown away);
                default: the next one.

        Returns:
            for each beam that lives now the place, among those before, of the one that it continues; its token is the
            last of its token_ids.

        Raises:
            ValueError: an earlier group has not been at this position, or there are too few tokens.
        """
        state = self._groups[group]
        at = len(state.said) if position is None else position
        if at == len(state.said) - 1:
            state = self._before[group]
        if at != len(state.said) or state.done or at >= self._max:
            raise ValueError(f"group {group} has {len(state.said)} tokens, so that position {at} is not its next one")
        choices = self._choices(state, group, top, at)
        self._before[group], self._groups[group] = state, self._taken(state, choices, at)
        return tuple(choice.parent for choice in self._going_on(choices))

    def token(self, group: int, position: int) -> int:
        """What a group of one beam has at a position that it has been at, or the end token behind its end."""
        state = self._groups[group]
        beam = state.hypotheses[0][1] if state.done else state.live[0]
        return beam.token_ids[position] if position < len(beam.token_ids) else self._end_ids[0]

    def candidates(self) -> tuple[Candidate, ...]:
        """All groups' hypotheses, the best score first. Those that are not over count as far as they are."""
        found: list[tuple[float, int, Beam]] = []
        for group, state in enumerate(self._groups):
            for beam in () if state.done else state.live:
                state = state.with_hypothesis(self._score(beam), beam, self._size)
            found += [(score, group, beam) for score, beam in state.hypotheses]
        return tuple(
            Candidate(beam.token_ids, beam.logps, group, score, "stop" if self._ends(beam) else "length")
            for score, group, beam in sorted(found, key=lambda each: each[0])[::-1]
        )

    def _choices(self, state: _Group, group: int, top: Top, at: int) -> list[_Choice]:
        """The best continuations of a group's beams, penalty included, the best first."""
        counts = Counter(token for earlier in range(group) for token in self._said(earlier, at))
        banned = self._end_ids if at < self._min else ()
        penalty, found = np.float32(self.settings.penalty), []
        for parent, beam in enumerate(state.live):
            for token, logp in zip(top.token_ids[parent].tolist(), top.logps[parent], strict=True):
                if token not in banned:
                    lowered = logp - penalty * np.float32(counts[token]) if token in counts else logp
                    found.append(_Choice(lowered + beam.total, parent, token, logp))
        found.sort(key=lambda choice: (-choice.total, choice.parent, choice.token))
        if len(found) < self._ranked:
            raise ValueError(f"{len(found)} continuations are known, and {self._ranked} are ranked")
        return found[: self._ranked]

    def _said(self, group: int, at: int) -> tuple[int, ...]:
        state = self._groups[group]
        if at < len(state.said):
            return state.said[at]
        if not state.done:
            raise ValueError(f"group {group} has not been at position {at}: a later group may not be ahead of it")
        return (self._end_ids[0],) * self._size

    def _taken(self, state: _Group, choices: Sequence[_Choice], at: int) -> _Group:
        """The group after one more position."""
        parents = state.live
        for choice in choices[: self._size]:
            if choice.token in self._end_ids:
                beam = parents[choice.parent].then(choice.token, choice.logp, choice.total)
                state = state.with_hypothesis(self._score(beam), beam, self._size)
        going_on = self._going_on(choices)
        live = tuple(parents[c.parent].then(c.token, c.logp, c.total) for c in going_on)
        attainable = float(choices[0].total) / (at + 1) ** self.settings.length_penalty
        done = len(state.hypotheses) >= self._size and state.worst >= attainable
        return replace(state, live=live, said=(*state.said, tuple(c.token for c in going_on)), done=done)

    def _going_on(self, choices: Sequence[_Choice]) -> list[_Choice]:
        return [choice for choice in choices if choice.token not in self._end_ids][: self._size]

    def _score(self, beam: Beam) -> float:
        return float(beam.total) / len(beam.token_ids) ** self.settings.length_penalty

    def _ends(self, beam: Beam) -> bool:
        return bool(beam.token_ids) and beam.token_ids[-1] in self._end_ids


def most_ranked(search: DiverseBeam, end_ids: Sequence[int]) -> int:
    """Continuations that a group ranks at each position: enough that as many as it has beams do not end."""
    return max(2, 1 + len(set(end_ids))) * (search.beams // search.groups)


def continuations(sampling: Sampling, vocabulary: int, ends: int) -> int:
    """How many different completions there are, as far as it matters: counted until there are enough for all beams."""
    wanted = sampling.search.beams if sampling.search else 1
    open_ones, ended = 1, 0
    for position in range(sampling.max_tokens):
        ended += open_ones * ends if position >= sampling.min_tokens else 0
        open_ones *= vocabulary - ends
        if open_ones + ended >= wanted or not open_ones:
            break
    return open_ones + ended


def check_search(
    sampling: Sampling, *, vocabulary: int, end_ids: Sequence[int], where: str, error: type[RayalignError] = DataError
) -> None:
    """Refuse a search that cannot be made with this vocabulary and these end tokens, or means nothing.

    Raises:
        DataError: or another error that is asked for.
    """
    search = sampling.search
    if search is None:
        return
    ends = len(set(end_ids))

    def refuse(what: str, value: object, rule: str, remedy: str) -> None:
        raise error(what, where=where, value=value, rule=rule, remedy=remedy)

    if search.groups < 1 or search.beams < 2 or search.beams % search.groups:
        given = f"{search.beams} beams, {search.groups} groups"
        refuse(
            "the groups cannot be of the same size", given, "groups that divide 2 beams or more", "change one of them"
        )
    if not (math.isfinite(search.penalty) and search.penalty >= 0 and math.isfinite(search.length_penalty)):
        given = f"penalty {search.penalty}, length_penalty {search.length_penalty}"
        refuse(
            "a search cannot be penalised so", given, "finite numbers, and a penalty of 0 or more", "set penalty=4.0"
        )
    if sampling.choices:
        refuse("a search has no choices", len(sampling.choices), "choices of single completions", "ask for them apart")
    if not ends:
        refuse("the model has no end token", 0, "eos_token_id in its generation_config.json", "write it there")
    ranked, rest = most_ranked(search, end_ids), vocabulary - ends
    if ranked > rest:
        size = search.beams // search.groups
        given = f"{size} beams a group, {ranked} continuations ranked at each position"
        refuse(
            "a group has more beams than this vocabulary can fill",
            given,
            f"at most {rest} tokens that do not end",
            "lower beams, or raise groups",
        )
    if (there := continuations(sampling, vocabulary, ends)) < search.beams:
        refuse(
            "there are not as many different completions as beams",
            f"{search.beams} beams",
            f"at most {there} completions of {sampling.max_tokens} of {vocabulary} tokens",
            f"raise max_tokens, or lower beams to {there}",
        )

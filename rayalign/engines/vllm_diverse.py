"""Diverse beam search inside vLLM's batch: a logits processor that steers K greedy requests, one for each group.

Where each group has one beam, no request ever continues another one's tokens, so that the whole search is one pass of
K requests at the speed of sampling. vLLM loads this class by name (`logits_processors=[…]`) into each worker. It keeps
the searches that are under way; the engine takes their candidates, or drops them, by calls to the worker, as only the
engine knows when a request is over and when it was only put off (preempted).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from rayalign.decoding.diverse_beam import DiverseBeamSearch, Top, top_of
from rayalign.types import Candidate, Sampling

EXTRA = "rayalign_search"  # key of SamplingParams.extra_args


@dataclass(frozen=True)
class Part:
    """What a request says of the search that it belongs to.

    Attributes:
        key: of the search; never used again.
        group: which the request is, counted from 0.
        end_ids: the model's end token first.
    """

    key: str
    group: int
    sampling: Sampling
    end_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """A row of the batch, and the tokens that its request has so far (vLLM appends to this very list)."""

    part: Part
    output_ids: list[int]


class DiverseBeamProcessor(LogitsProcessor):
    """Leaves one token in each row of a search, the one that the search takes; other rows are left alone.

    A row's position is the number of tokens that its request has, so that it may be asked again: of a prompt that is
    read in several pieces vLLM throws away what all but the last one give, and a request that was put off is read anew.
    Requests of one search are added in the order of their groups, and vLLM starts and puts off requests in that order,
    so that a group is never behind a later one; the search raises an error if it were.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._rows: dict[int, _Row] = {}
        self._searches: dict[str, DiverseBeamSearch] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._rows, batch_update, self._row)

    def _row(self, params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> _Row | None:
        part: Part | None = (params.extra_args or {}).get(EXTRA)
        if part is None:
            return None
        if part.key not in self._searches:
            self._searches[part.key] = DiverseBeamSearch(part.sampling, part.end_ids)
        return _Row(part, output_ids)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits float32 [rows, V], changed in place."""
        if not self._rows:
            return logits
        found = sorted((row.part.key, row.part.group, index) for index, row in self._rows.items())
        places = [index for _, _, index in found]
        # One look at the whole vocabulary for all rows; penalties can only move what is among the likeliest tokens.
        width = max(self._searches[key].width(group) for key, group, _ in found)
        rows = torch.tensor(places, device=logits.device)
        tops = top_of(logits[rows].log_softmax(-1), width)
        tokens = [self._token(self._rows[index], tops, place) for place, index in enumerate(places)]
        logits[rows] = -torch.inf
        logits[rows, torch.tensor(tokens, device=logits.device)] = 0.0
        return logits

    def _token(self, row: _Row, tops: Top, place: int) -> int:
        search, group, position = self._searches[row.part.key], row.part.group, len(row.output_ids)
        if position < search.steps(group) or not search.over(group):  # else vLLM has yet to see that it has ended
            search.advance(group, Top(tops.token_ids[place : place + 1], tops.logps[place : place + 1]), position)
        return search.token(group, position)

    def take(self, key: str) -> tuple[Candidate, ...]:
        """What a search found; it is forgotten."""
        return self._searches.pop(key).candidates()

    def drop(self, key: str) -> None:
        """Forget a search that nobody waits for any more."""
        self._searches.pop(key, None)

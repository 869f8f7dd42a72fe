"""Diverse beam search with a transformers model: all beams of all groups go in step, and share one cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rayalign.decoding.diverse_beam import DiverseBeamSearch, Top, top_of
from rayalign.types import Request


class RunningSearch:
    """The search of one request; `step` adds a token to every beam that lives.

    Args:
        model: a causal language model.
        end_ids: tokens that end a completion, the model's own first.
    """

    def __init__(self, model: Any, device: torch.device, request: Request, end_ids: Sequence[int]):
        self.request, self.search = request, DiverseBeamSearch(request.sampling, end_ids)
        self._model, self._device, self._cache = model, device, None
        groups = request.sampling.search.groups if request.sampling.search else 0
        self._rows = [(group, 0) for group in range(groups)]  # (group, place of the beam) of each row of the input

    def step(self) -> None:
        """One token more."""
        first = self._cache is None
        if first:  # every group begins with the same prompt
            ids = torch.tensor([self.request.prompt_ids], device=self._device)
        else:
            tokens = [[self.search.live(group)[place].token_ids[-1]] for group, place in self._rows]
            ids = torch.tensor(tokens, device=self._device)
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        groups = sorted({group for group, _ in self._rows})
        tops = top_of(output.logits[:, -1].float().log_softmax(-1), self.search.width(groups[-1]))
        rows, parents = [], []
        for group in groups:
            mine = [row for row, (owner, _) in enumerate(self._rows) if owner == group]
            read = [0] if first else mine
            children = self.search.advance(group, Top(tops.token_ids[read], tops.logps[read]))
            if not self.search.over(group):
                rows += [(group, place) for place in range(len(children))]
                parents += [read[parent] for parent in children]
        self._rows = rows
        if rows and parents != list(range(output.logits.shape[0])):
            self._cache.batch_select_indices(torch.tensor(parents, device=self._device))

"""The open searches of a vLLM engine: each is several requests of vLLM's, and ends as one completion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from rayalign.decoding.diverse_beam import DiverseBeamSearch, Top
from rayalign.errors import EngineLost
from rayalign.types import Candidate, Request

Add = Callable[[str, Sequence[int], Any], None]  # request id, prompt, SamplingParams
Ask = Callable[..., list[Any]]  # a method of the workers, and its arguments
MOST_LOGPROBS = 2048  # of one token; what a search of 256 beams ranks, at most
Found = tuple[Candidate, ...]


class Searches:
    """Starts searches, and gathers what becomes of their requests.

    Args:
        add: gives vLLM a request.
        ask: calls a method of vLLM's workers.
        end_ids: the model's end tokens, in its order.
        vocabulary: its size.
    """

    def __init__(self, add: Add, ask: Ask, *, end_ids: tuple[int, ...], vocabulary: int):
        self._add, self._ask, self._end_ids, self._vocabulary = add, ask, end_ids, vocabulary
        self._open: dict[str, _OnePass | _Rounds] = {}  # by the request's id
        self._inner: dict[str, str] = {}  # id of vLLM's → the request's
        self._started = 0

    def ends(self, request: Request) -> tuple[int, ...]:
        """The tokens that end a completion, the model's own first."""
        return tuple(dict.fromkeys((*self._end_ids, *request.sampling.stop_token_ids)))

    def start(self, request: Request) -> None:
        search, self._started = request.sampling.search, self._started + 1
        key = f"{request.id}//{self._started}"  # never the same, so that nothing of an aborted one is met again
        if search is not None and search.groups == search.beams:
            self._open[request.id] = _OnePass(key, request, self.ends(request), self._ask)
        else:
            self._open[request.id] = _Rounds(key, request, self.ends(request), self._vocabulary)
        self._go_on(request.id)

    def take(self, output: Any) -> tuple[str, Found] | None:
        """Of one of vLLM's outputs: the request that it ended, and its candidates; None for one that goes on.

        Raises:
            EngineLost: vLLM did something else than the search said.
        """
        request_id = self._inner.pop(output.request_id, None)
        if request_id is None:
            return None
        found = self._open[request_id].take(output)
        if found is None:
            self._go_on(request_id)
            return None
        del self._open[request_id]
        return request_id, found

    def forget(self, request_ids: Iterable[str]) -> list[str]:
        """Drop these searches; gives the ids of vLLM's requests that are to be aborted."""
        gone = {request_id: search for request_id in request_ids if (search := self._open.pop(request_id, None))}
        for search in gone.values():
            search.drop()
        inner = [name for name, owner in self._inner.items() if owner in gone]
        for name in inner:
            del self._inner[name]
        return inner

    def clear(self) -> None:
        self._open.clear()
        self._inner.clear()

    def _go_on(self, request_id: str) -> None:
        for name, token_ids, params in self._open[request_id].due():
            self._inner[name] = request_id
            self._add(name, token_ids, params)


class _OnePass:
    """Groups of one beam: a greedy request for each, steered by the processor in vLLM's workers."""

    def __init__(self, key: str, request: Request, ends: tuple[int, ...], ask: Ask):
        self._key, self._request, self._ends, self._ask = key, request, ends, ask
        self._count = request.sampling.search.groups if request.sampling.search else 0
        self._tokens: dict[int, tuple[int, ...]] = {}  # group → as vLLM has them
        self._begun = False

    def due(self) -> list[tuple[str, Sequence[int], Any]]:
        """Requests that are to be made now, in the order of the groups."""
        if self._begun:
            return []
        self._begun = True
        return [(f"{self._key}/{g}", self._request.prompt_ids, self._params(g)) for g in range(self._count)]

    def _params(self, group: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from rayalign.engines.vllm_diverse import EXTRA, Part

        return SamplingParams(
            max_tokens=self._request.sampling.max_tokens,
            temperature=0.0,
            stop_token_ids=sorted(self._ends),
            extra_args={EXTRA: Part(self._key, group, self._request.sampling, self._ends)},
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def take(self, output: Any) -> Found | None:
        self._tokens[int(output.request_id.rpartition("/")[2])] = tuple(output.outputs[0].token_ids)
        if len(self._tokens) < self._count:
            return None
        found: Found = self._ask("rayalign_take_search", self._key)[0]
        if {candidate.group: candidate.token_ids for candidate in found} != self._tokens:
            raise EngineLost(
                "vLLM's tokens are not those of the search",
                where=f"request {self._request.id}",
                rule="each group's request has the tokens that the search took",
                remedy="turn off what samples tokens in another way, as speculative decoding",
            )
        return found

    def drop(self) -> None:
        self._ask("rayalign_drop_search", self._key)


class _Rounds:
    """Groups of several beams: each beam may go on from another one's tokens, so that for each position the different
    beginnings are asked for one token more. What they have in common comes from vLLM's prefix cache."""

    def __init__(self, key: str, request: Request, ends: tuple[int, ...], vocabulary: int):
        self._key, self._request, self._vocabulary = key, request, vocabulary
        self._search = DiverseBeamSearch(request.sampling, ends)
        self._groups = range(request.sampling.search.groups if request.sampling.search else 0)
        self._round = 0
        self._asked: dict[str, tuple[int, ...]] = {}  # id → beginning
        self._answers: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def due(self) -> list[tuple[str, Sequence[int], Any]]:
        """The beginnings that this round asks for, each once."""
        if self._asked:
            return []
        self._round, self._answers = self._round + 1, {}
        beams = (beam.token_ids for group in self._groups for beam in self._search.live(group))
        self._asked = {f"{self._key}/{self._round}.{n}": tokens for n, tokens in enumerate(dict.fromkeys(beams))}
        params = self._params()
        return [(name, self._request.prompt_ids + tokens, params) for name, tokens in self._asked.items()]

    def _width(self) -> int:
        last = max(group for group in self._groups if not self._search.over(group))
        return min(self._search.width(last), self._vocabulary)

    def _params(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=self._width(),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def take(self, output: Any) -> Found | None:
        at = output.outputs[0].logprobs[0]
        best = sorted(at.items(), key=lambda item: -item[1].logprob)[: self._width()]
        token_ids = np.array([token for token, _ in best])
        logps = np.array([each.logprob for _, each in best], np.float32)
        self._answers[self._asked[output.request_id]] = token_ids, logps
        if len(self._answers) < len(self._asked):
            return None
        self._asked = {}
        for group in self._groups:
            if live := self._search.live(group):
                known = [self._answers[beam.token_ids] for beam in live]
                self._search.advance(group, Top(np.stack([t for t, _ in known]), np.stack([p for _, p in known])))
        return self._search.candidates() if self._search.finished else None

    def drop(self) -> None:
        """Nothing is kept elsewhere."""

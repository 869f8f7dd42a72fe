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
MOST_LOGPROBS = 4096  # of one token; what a group of 256 beams ranks with 15 end tokens
Found = tuple[Candidate, ...]


class Searches:
    """Starts searches, and gathers what becomes of their requests.

    Args:
        add: gives vLLM a request.
        abort: takes requests back.
        ask: calls a method of vLLM's workers.
        end_ids: the model's end tokens, in its order.
        vocabulary: its size.
    """

    def __init__(
        self, add: Add, abort: Callable[[list[str]], None], ask: Ask, *, end_ids: tuple[int, ...], vocabulary: int
    ):
        self._add, self._abort, self._ask = add, abort, ask
        self._end_ids, self._vocabulary = end_ids, vocabulary
        self._open: dict[str, _OnePass | _Streams] = {}  # by the request's id
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
            self._open[request.id] = _Streams(key, request, self.ends(request), self._vocabulary)
        self._go_on(request.id)

    def take(self, output: Any) -> tuple[str, Found] | None:
        """Of one of vLLM's outputs: the request that it ended, and its candidates; None for one that goes on.

        Raises:
            EngineLost: vLLM did something else than the search said.
        """
        request_id = self._inner.get(output.request_id)
        if request_id is None:
            return None
        if output.finished:
            del self._inner[output.request_id]
        found = self._open[request_id].take(output)
        if found is None:
            self._go_on(request_id)
            return None
        if gone := self.forget([request_id]):
            self._abort(gone)
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

    def __contains__(self, name: str) -> bool:
        """Whether this is a request of vLLM's that belongs to a search."""
        return name in self._inner

    def _go_on(self, request_id: str) -> None:
        if gone := [name for name in self._open[request_id].useless() if self._inner.pop(name, None)]:
            self._abort(gone)
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

    def useless(self) -> list[str]:
        return []

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


class _Streams:
    """Groups of several beams: each beam may go on from another one's tokens, which no request of vLLM's can. So every
    beam is asked for by a request that goes on greedily. Where the search takes the greedy token, as it does for most
    beams, that request tells what follows next; for other beams there are new ones, which find what they have in common
    with others in vLLM's prefix cache, and those that no beam follows any more are aborted. Each log-prob is one of the
    model after exactly that beginning, however it came about."""

    def __init__(self, key: str, request: Request, ends: tuple[int, ...], vocabulary: int):
        self._key, self._request = key, request
        self._search = DiverseBeamSearch(request.sampling, ends)
        self._groups = range(request.sampling.search.groups if request.sampling.search else 0)
        self._width = min(self._search.width(self._groups[-1]), vocabulary)
        self._paths: dict[str, tuple[int, ...]] = {}  # of each request: where it began, and its tokens since
        self._told: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}  # beginning → likeliest tokens, log-probs
        self._started, self._moved = 0, True

    def due(self) -> list[tuple[str, Sequence[int], Any]]:
        """A request for each beginning that no other one has told about, or tells about next."""
        if not self._moved:
            return []
        found, ahead, self._moved = [], {*self._paths.values(), *self._told}, False
        for beginning in self._beginnings():
            if beginning not in ahead:
                self._started += 1
                name = f"{self._key}/{self._started}"
                self._paths[name] = beginning
                found.append((name, self._request.prompt_ids + beginning, self._params(len(beginning))))
        return found

    def useless(self) -> list[str]:
        """Requests that no beam follows any more; they are forgotten."""
        if not self._moved:
            return []
        wanted = set(self._beginnings())
        length = min(map(len, wanted), default=0)  # all are as long
        gone = [name for name, path in self._paths.items() if path[:length] not in wanted]
        for name in gone:
            del self._paths[name]
        self._told = {path: told for path, told in self._told.items() if path[:length] in wanted}
        return gone

    def _beginnings(self) -> list[tuple[int, ...]]:
        beams = (beam.token_ids for group in self._groups for beam in self._search.live(group))
        return list(dict.fromkeys(beams))

    def _params(self, there: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=self._request.sampling.max_tokens - there,
            temperature=0.0,
            logprobs=self._width,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def take(self, output: Any) -> Found | None:
        new, path = output.outputs[0], self._paths[output.request_id]
        for token, at in zip(new.token_ids, new.logprobs, strict=True):
            best = sorted(at.items(), key=lambda item: -item[1].logprob)[: self._width]
            logps = np.array([each.logprob for _, each in best], np.float32)
            self._told[path] = np.array([each for each, _ in best]), logps
            path += (token,)
        self._paths[output.request_id] = path
        if output.finished:
            del self._paths[output.request_id]
        while not self._search.finished and all(each in self._told for each in self._beginnings()):
            self._moved = True
            for group in self._groups:
                if live := self._search.live(group):
                    told = [self._told[beam.token_ids] for beam in live]
                    self._search.advance(group, Top(np.stack([t for t, _ in told]), np.stack([p for _, p in told])))
        return self._search.candidates() if self._search.finished else None

    def drop(self) -> None:
        """Nothing is kept elsewhere."""

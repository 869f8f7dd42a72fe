"""The reference engine: Hugging Face transformers, a plain decoding loop and nothing else.

Slow next to vLLM, but it runs whatever `AutoModelForCausalLM` loads, and it says what vLLM should give.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from rayalign.decoding.diverse_beam import check_search
from rayalign.engines.common import (
    check_requests,
    check_sequences,
    end_token_ids,
    model_dtype,
    quiet_loading,
    refuse_when_open,
)
from rayalign.engines.transformers_diverse import RunningSearch
from rayalign.errors import SyncMismatch
from rayalign.memory import peak_gib
from rayalign.protocols import WeightPush
from rayalign.record import Record
from rayalign.sync.flat import check_names, checksum, unpack, verify
from rayalign.types import Completion, Request, Sampling


class TransformersEngineConfig(Record):
    """Engines that decode with Hugging Face transformers: for tests, and for models that vLLM lacks."""

    name: Literal["transformers"] = "transformers"
    count: int = Field(1, ge=1, description="engine actors")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="default: the model's")
    max_context: int = Field(2048, ge=2, description="longest prompt + completion, in tokens")
    max_running: int = Field(16, ge=1, description="requests decoded at the same time (of equal prompt length)")
    threads: int | None = Field(None, ge=1, description="CPU cores an engine computes on; default: its share")
    deadline_s: float = Field(600.0, gt=0, description="seconds without any completion after which an engine is lost")
    max_replacements: int = Field(3, ge=0, description="lost engines replaced before the run stops")

    def build(
        self,
        *,
        model: str,
        name: str = "engine-0",
        cores: tuple[int, ...] | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> TransformersEngine:
        """Start one engine in this process."""
        return TransformersEngine(
            self, model=model, name=name, cores=cores, seed=seed, trust_remote_code=trust_remote_code
        )


@dataclass
class _Row:
    """One request that is being decoded."""

    request: Request
    end_ids: torch.Tensor  # [E]
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    choice_logps: tuple[float, ...] = ()
    finish_reason: str = ""


class TransformersEngine:
    """`protocols.Engine` with one model in this process. Requests of equal prompt length decode together.

    Args:
        model: folder of a Hugging Face checkpoint, or a hub id.
        cores: CPU cores to compute on (this process is bound to them); None leaves the binding as it is.
        seed: not used: every request brings its own.
    """

    def __init__(
        self,
        config: TransformersEngineConfig,
        *,
        model: str,
        name: str = "engine-0",
        cores: tuple[int, ...] | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ):
        from transformers import AutoModelForCausalLM

        self.config, self.name, self.version = config, name, 0
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu" and cores:
            os.sched_setaffinity(0, cores)
        if config.threads or cores:
            torch.set_num_threads(config.threads or len(cores or ()))
        dtype = getattr(torch, config.dtype or model_dtype(model, trust_remote_code=trust_remote_code))
        with quiet_loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=trust_remote_code)
        self._model: Any = loaded.to(self._device).eval().requires_grad_(False)
        self._end_ids = end_token_ids(model, trust_remote_code=trust_remote_code)
        self._waiting: list[Request] = []
        self._rows: list[_Row] = []
        self._cache: Any = None  # keys and values of the rows, in their order
        self._search: RunningSearch | None = None  # one at a time, while no rows run

    def submit(self, requests: Sequence[Request]) -> None:
        check_requests(requests, self._open_ids(), max_context=self.config.max_context, engine=self.name)
        for request in requests:
            vocabulary, where = self._model.get_output_embeddings().weight.shape[0], f"request {request.id}"
            check_search(request.sampling, vocabulary=vocabulary, end_ids=self._ends(request), where=where)
        self._waiting += requests

    def poll(self, timeout_s: float = 1.0) -> list[Completion]:
        deadline = time.monotonic() + timeout_s
        finished: list[Completion] = []
        while self._open_ids() and not finished:  # at least one step, so that polling always gets on
            finished = self._step()
            if time.monotonic() >= deadline:
                break
        return finished

    def abort(self, request_ids: Iterable[str]) -> None:
        gone = set(request_ids)
        self._waiting = [request for request in self._waiting if request.id not in gone]
        self._keep([row.request.id not in gone for row in self._rows])
        if self._search is not None and self._search.request.id in gone:
            self._search = None

    @torch.no_grad()
    def load(self, push: WeightPush) -> None:
        refuse_when_open("load weights", len(self._open_ids()), engine=self.name)
        check_names(push, who=self.name)
        # All is looked at before anything is overwritten; these very views are then copied into parameters.
        incoming = [pair for chunk in push.chunks for pair in unpack(chunk)]
        verify(push.manifest, {name: checksum(tensor) for name, tensor in incoming}, who=self.name)
        targets = dict(self._model.named_parameters(remove_duplicate=False)) | dict(self._model.named_buffers())
        self._check_covered(incoming, targets)
        for name, tensor in incoming:
            targets[name].copy_(tensor)
        self.version = push.version

    def _check_covered(self, incoming: list[tuple[str, torch.Tensor]], targets: dict[str, torch.Tensor]) -> None:
        """Every parameter (tied ones once, under either name) has a tensor of its shape, and nothing else comes."""
        covered = {id(targets[name]) for name, _ in incoming if name in targets}
        missing = [name for name, parameter in self._model.named_parameters() if id(parameter) not in covered]
        unknown = [name for name, tensor in incoming if name not in targets or targets[name].shape != tensor.shape]
        if missing or unknown:
            raise SyncMismatch(
                f"this push does not fit the model: {len(missing)} parameters without a tensor, "
                f"{len(unknown)} tensors without a parameter of their shape",
                where=self.name,
                value=", ".join([*missing[:3], *unknown[:3]]),
                rule="a push covers every parameter of the model that the engine was started with",
                remedy="check that learner and engine were started from the same model folder",
            )

    @torch.no_grad()
    def logps(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        refuse_when_open("take log-probs", len(self._open_ids()), engine=self.name)
        check_sequences(sequences, max_context=self.config.max_context, engine=self.name)
        return [self._sequence_logps(sequence) for sequence in sequences]

    def _sequence_logps(self, sequence: tuple[int, ...]) -> np.ndarray:
        ids = torch.tensor([sequence], device=self._device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu().numpy()

    def sleep(self) -> None:
        """Free the GPU for others: weights move to host memory."""
        refuse_when_open("sleep", len(self._open_ids()), engine=self.name)
        if self._device.type == "cuda":
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self) -> None:
        refuse_when_open("wake", len(self._open_ids()), engine=self.name)
        self._model.to(self._device)

    def memory_gib(self) -> float:
        return peak_gib()

    def close(self) -> None:
        self._model, self._cache, self._search = None, None, None
        self._waiting, self._rows = [], []
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _open_ids(self) -> list[str]:
        searched = [self._search.request.id] if self._search is not None else []
        return [request.id for request in self._waiting] + [row.request.id for row in self._rows] + searched

    @torch.no_grad()
    def _step(self) -> list[Completion]:
        """One token for every running request; the completions of those that it ended."""
        if not self._rows and self._search is None and self._waiting[0].sampling.search is not None:
            request = self._waiting.pop(0)
            self._search = RunningSearch(self._model, self._device, request, self._ends(request))
        if self._search is not None:
            return self._search_step(self._search)
        if not self._rows:
            self._start_batch()
            ids = torch.tensor([row.request.prompt_ids for row in self._rows], device=self._device)
        else:
            ids = torch.tensor([row.token_ids[-1:] for row in self._rows], device=self._device)
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        for row, logits in zip(self._rows, output.logits[:, -1].float().cpu(), strict=True):
            _extend(row, logits)
        finished = [self._completion(row) for row in self._rows if row.finish_reason]
        self._keep([not row.finish_reason for row in self._rows])
        return finished

    def _search_step(self, running: RunningSearch) -> list[Completion]:
        running.step()
        if not running.search.finished:
            return []
        self._search = None
        return [Completion.of_search(running.request.id, running.search.candidates(), self.version, self.name)]

    def _ends(self, request: Request) -> tuple[int, ...]:
        """The model's own end tokens first, in its order."""
        return tuple(dict.fromkeys((*self._end_ids, *request.sampling.stop_token_ids)))

    def _start_batch(self) -> None:
        """The longest-waiting request and others whose prompts are as long, so that no padding is needed."""
        length = len(self._waiting[0].prompt_ids)
        alike = [r for r in self._waiting if len(r.prompt_ids) == length and r.sampling.search is None]
        batch = alike[: self.config.max_running]
        taken = {request.id for request in batch}
        self._waiting = [request for request in self._waiting if request.id not in taken]
        self._rows = [self._row(request) for request in batch]
        self._cache = None

    def _row(self, request: Request) -> _Row:
        end_ids = torch.tensor(sorted(self._ends(request)), dtype=torch.long)
        return _Row(request, end_ids, torch.Generator().manual_seed(request.seed))

    def _keep(self, keep: list[bool]) -> None:
        """Drop rows, and their keys and values."""
        if all(keep):
            return
        self._rows = [row for row, kept in zip(self._rows, keep, strict=True) if kept]
        if not self._rows:
            self._cache = None
        elif self._cache is not None:
            self._cache.batch_select_indices(torch.tensor(keep, device=self._device).nonzero()[:, 0])

    def _completion(self, row: _Row) -> Completion:
        return Completion(
            row.request.id,
            tuple(row.token_ids),
            tuple(row.logps),
            row.finish_reason,
            self.version,
            self.name,
            row.choice_logps,
        )


def _extend(row: _Row, logits: torch.Tensor) -> None:
    """Sample one token from logits float32 [V], note its log-prob, and see whether it was the last."""
    sampling = row.request.sampling
    if sampling.choices and not row.token_ids:
        row.choice_logps = tuple(logits.log_softmax(-1)[list(sampling.choices)].tolist())
    if len(row.token_ids) < sampling.min_tokens:
        logits = logits.index_fill(0, row.end_ids, -torch.inf)
    logps = processed_logps(logits, sampling)
    if sampling.temperature == 0:
        token = int(logps.argmax())
    else:  # the exponential race: one draw of [V] numbers a token, whatever the other rows do
        race = torch.empty_like(logps).exponential_(generator=row.generator)
        token = int((logps.exp() / race).argmax())
    row.token_ids.append(token)
    row.logps.append(float(logps[token]))
    if token in row.end_ids.tolist():
        row.finish_reason = "stop"
    elif len(row.token_ids) == sampling.max_tokens:
        row.finish_reason = "length"


def processed_logps(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probs float32 [V] of the distribution that is sampled: temperature, then top-k, then top-p.

    Greedy decoding (temperature 0) samples from no distribution: those of the unscaled logits, as in vLLM.
    """
    if sampling.temperature == 0:
        return logits.log_softmax(-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort()
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p  # the least probable tail
        outside[-1] = False  # the likeliest token always stays
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(0, order, outside), -torch.inf)
    return logits.log_softmax(-1)

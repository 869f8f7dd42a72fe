"""vLLM as an engine: an LLMEngine that lives in this process and is stepped by `poll`."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
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
    refuse_when_open,
)
from rayalign.engines.vllm_search import MOST_LOGPROBS, Searches
from rayalign.engines.vllm_worker import verify_loaded
from rayalign.errors import EngineLost, SyncMismatch
from rayalign.memory import peak_gib
from rayalign.protocols import Chunk, WeightPush
from rayalign.record import Record
from rayalign.sync.flat import check_names, verify
from rayalign.types import Completion, Request, Sampling

GIB = 1 << 30
BLOCK_ON_CPU = 32  # tokens; vLLM would take 128, and read up to so many again of what a search has in common
PLAIN = Sampling(max_tokens=1, temperature=0.0)


class VLLMEngineConfig(Record):
    """vLLM engines, on GPUs or on a CPU."""

    name: Literal["vllm"] = "vllm"
    count: int = Field(1, ge=1, description="engine actors")
    tensor_parallel: int = Field(1, ge=1, description="GPUs (or groups of CPU cores) that share one engine's weights")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="default: the model's")
    max_context: int = Field(2048, ge=2, description="longest prompt + completion, in tokens")
    max_running: int = Field(64, ge=1, description="requests decoded at the same time by one engine")
    kv_cache_gib: float = Field(1.0, gt=0, description="memory for keys and values on a CPU, GiB an engine")
    gpu_memory: float = Field(0.85, gt=0, le=1, description="share of a GPU's memory that an engine may take")
    threads: int | None = Field(None, ge=1, description="CPU cores an engine computes on; default: its share")
    enforce_eager: bool | None = Field(None, description="no CUDA graphs and no compilation; default: on a CPU only")
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
    ) -> VLLMEngine:
        """Start one engine in this process."""
        return VLLMEngine(self, model=model, name=name, cores=cores, seed=seed, trust_remote_code=trust_remote_code)


class VLLMEngine:
    """`protocols.Engine` by vLLM. Tokens go in and come out; there is no tokenizer in it.

    In float32 a request's tokens depend on its prompt, seed and sampling alone, not on what else runs:
    with prefix caching and chunked prefill on (they need not be turned off for it), for any max_running,
    in any process. Only the number of threads moves log-probs, by about 1e-5.

    Args:
        model: folder of a Hugging Face checkpoint, or a hub id.
        cores: CPU cores to compute on (this process is bound to them); None leaves the binding as it is.
        seed: of requests without a seed of their own, of which there are none here; kept for vLLM's warm-up.
    """

    def __init__(
        self,
        config: VLLMEngineConfig,
        *,
        model: str,
        name: str = "engine-0",
        cores: tuple[int, ...] | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ):
        self.config, self.name, self.version = config, name, 0
        self._open: dict[str, Request] = {}
        self._choices: dict[str, tuple[float, ...]] = {}  # what is known already of open requests with choices
        self._failed_load = False
        self._end_ids = end_token_ids(model, trust_remote_code=trust_remote_code)
        self._on_gpu = torch.cuda.is_available()
        dtype: Any = config.dtype or model_dtype(model, trust_remote_code=trust_remote_code)  # "auto" halves float32
        eager = config.enforce_eager if config.enforce_eager is not None else not self._on_gpu
        with _vllm_environment(config, None if self._on_gpu else cores, eager=eager):
            from vllm import LLM

            self._llm: Any = LLM(
                model=str(model),
                dtype=dtype,
                seed=seed,
                trust_remote_code=trust_remote_code,
                tensor_parallel_size=config.tensor_parallel,
                # One token more than a request may have, because a probe of a full sequence samples one.
                max_model_len=config.max_context + 1,
                max_num_seqs=config.max_running,
                enforce_eager=eager,
                skip_tokenizer_init=True,
                logprobs_mode="processed_logprobs",  # of the distribution that was sampled
                max_logprobs=MOST_LOGPROBS,
                worker_extension_cls="rayalign.engines.vllm_worker.ReloadExtension",
                logits_processors=["rayalign.engines.vllm_diverse:DiverseBeamProcessor"],
                use_tqdm_on_load=False,
                **self._placement(),
            )
        self._vocabulary: int = self._llm.model_config.get_vocab_size()
        self._searches = Searches(
            self._add,
            lambda ids: self._llm.llm_engine.abort_request(ids),
            self._ask,
            end_ids=self._end_ids,
            vocabulary=self._vocabulary,
        )

    def _placement(self) -> dict[str, Any]:
        options: dict[str, Any] = {"distributed_executor_backend": "mp"} if self.config.tensor_parallel > 1 else {}
        if self._on_gpu:
            return options | {"gpu_memory_utilization": self.config.gpu_memory, "enable_sleep_mode": True}
        return options | {"kv_cache_memory_bytes": int(self.config.kv_cache_gib * GIB), "block_size": BLOCK_ON_CPU}

    def submit(self, requests: Sequence[Request]) -> None:
        if self._failed_load:
            raise SyncMismatch(
                "this engine holds the weights of a load that failed",
                where=self.name,
                rule="sampling only from the learner's weights",
                remedy="load a whole push, or restart the engine",
            )
        check_requests(requests, self._open, max_context=self.config.max_context, engine=self.name)
        for request in requests:
            ends, where = self._searches.ends(request), f"request {request.id}"
            check_search(request.sampling, vocabulary=self._vocabulary, end_ids=ends, where=where)
        for request in requests:
            if request.sampling.search is not None:
                self._searches.start(request)
                self._open[request.id] = request
                continue
            # vLLM gives log-probs of the distribution that is sampled: where that is another, they are asked first.
            first = replace(request, sampling=PLAIN) if _asks_apart(request.sampling) else request
            self._add(request.id, request.prompt_ids, self._sampling(first, request.sampling.choices))
            self._open[request.id] = request

    def poll(self, timeout_s: float = 1.0) -> list[Completion]:
        deadline = time.monotonic() + timeout_s
        finished: list[Completion] = []
        while self._open and not finished:  # at least one step, so that polling always gets on
            ended = [self._completion(output) for output in self._step()]
            finished = [completion for completion in ended if completion is not None]
            if time.monotonic() >= deadline:
                break
        return finished

    def abort(self, request_ids: Iterable[str]) -> None:
        ids = [request_id for request_id in request_ids if self._open.pop(request_id, None) is not None]
        for request_id in ids:
            self._choices.pop(request_id, None)
        searches = [self._searches.forget([request_id]) for request_id in ids]
        if ids:
            self._llm.llm_engine.abort_request([*ids, *chain.from_iterable(searches)])

    def load(self, push: WeightPush) -> None:
        refuse_when_open("load weights", len(self._open), engine=self.name)
        check_names(push, who=self.name)  # nothing is overwritten yet
        self._failed_load = True
        with self._for_workers(push.chunks) as chunks:
            results = self._llm.collective_rpc("rayalign_reload", args=(chunks,))
        verify_loaded(results, engine=self.name)
        for rank, result in enumerate(results):
            verify(push.manifest, result.handed, who=f"{self.name}, rank {rank}")
        self._drop_prefix_cache()
        self.version, self._failed_load = push.version, False

    def logps(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        refuse_when_open("take log-probs", len(self._open), engine=self.name)
        check_sequences(sequences, max_context=self.config.max_context, engine=self.name)
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs: dict[str, Any] = {}
        asked = [str(index) for index, sequence in enumerate(sequences) if len(sequence) > 1]
        for key in asked:
            self._add(f"logps-{key}", sequences[int(key)], params)
        while len(outputs) < len(asked):
            outputs |= {output.request_id.removeprefix("logps-"): output for output in self._step()}
        return [_prompt_logps(outputs.get(str(index)), sequence) for index, sequence in enumerate(sequences)]

    def sleep(self) -> None:
        """Free the GPU for others: weights move to host memory, keys and values are dropped."""
        refuse_when_open("sleep", len(self._open), engine=self.name)
        self._drop_prefix_cache()
        if self._on_gpu:
            self._llm.sleep(level=1)

    def wake(self) -> None:
        refuse_when_open("wake", len(self._open), engine=self.name)
        if self._on_gpu:
            self._llm.wake_up()

    def memory_gib(self) -> float:
        if self.config.tensor_parallel == 1:
            return peak_gib()
        return peak_gib() + sum(self._llm.collective_rpc("rayalign_memory"))

    def close(self) -> None:
        """Free weights and caches and end worker processes. Twice is once."""
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        self._open.clear()
        self._choices.clear()
        self._searches.clear()
        destroy_model_parallel()
        destroy_distributed_environment()
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()

    def _add(self, request_id: str, token_ids: Sequence[int], params: Any) -> None:
        self._llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(token_ids)}, params)

    def _ask(self, method: str, *args: Any) -> list[Any]:
        """Of each worker."""
        return self._llm.collective_rpc(method, args=args)

    def _step(self) -> list[Any]:
        """One step of all running requests; the outputs of those that ended, or go on as part of a search."""
        try:
            outputs = self._llm.llm_engine.step()
        except Exception as error:  # whatever it was, vLLM's state is not known any more
            raise EngineLost(
                "vLLM failed while it was sampling",
                where=self.name,
                value=f"{type(error).__name__}: {error}",
                remedy="the engine has to be replaced; its log shows the cause",
            ) from error
        return [output for output in outputs if output.finished or output.request_id in self._searches]

    def _sampling(self, request: Request, choices: tuple[int, ...] = ()) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=sorted(self._searches.ends(request)),
            seed=request.seed,
            logprobs=len(choices),  # of the sampled token, and these
            logprob_token_ids=list(choices) or None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any) -> Completion | None:
        """None when it ends no request: of one that was forgotten, one of several of a search, or where the choices
        alone were asked for, and what was wanted is asked for now."""
        if (ended := self._searches.take(output)) is not None:
            del self._open[ended[0]]
            return Completion.of_search(*ended, self.version, self.name)
        if output.request_id not in self._open:
            return None
        request, sampled = self._open[output.request_id], output.outputs[0]
        if request.sampling.choices and request.id not in self._choices:
            at = sampled.logprobs[0]
            self._choices[request.id] = tuple(at[token].logprob for token in request.sampling.choices)
            if _asks_apart(request.sampling):
                self._add(request.id, request.prompt_ids, self._sampling(request))
                return None
        del self._open[request.id]
        token_ids = tuple(sampled.token_ids)
        logps = tuple(at[token].logprob for token, at in zip(token_ids, sampled.logprobs, strict=True))
        choices = self._choices.pop(request.id, ())
        return Completion(request.id, token_ids, logps, sampled.finish_reason, self.version, self.name, choices)

    def _drop_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise SyncMismatch(
                "vLLM kept its prefix cache, whose keys and values are those of older weights", where=self.name
            )

    @contextmanager
    def _for_workers(self, chunks: Sequence[Chunk]) -> Iterator[Sequence[Chunk]]:
        """The chunks as workers can take them: themselves in this process, files to map for others.

        Files, not bytes in the call: each worker would hold its own copy of the whole model.
        """
        if self.config.tensor_parallel == 1:
            yield chunks
            return
        size = sum(chunk.specs[-1].offset + chunk.specs[-1].nbytes for chunk in chunks)
        with tempfile.TemporaryDirectory(prefix="rayalign-push-", dir=_shared_memory_for(size)) as folder:
            paths = [Path(folder) / f"{index}.bin" for index in range(len(chunks))]
            for path, chunk in zip(paths, chunks, strict=True):
                path.write_bytes(memoryview(chunk.data))
            yield [replace(chunk, data=str(path)) for path, chunk in zip(paths, chunks, strict=True)]


def _asks_apart(sampling: Sampling) -> bool:
    """Whether the log-probs that are sampled are not those of the whole distribution at temperature 1."""
    greedy = sampling.temperature == 0 and sampling.min_tokens == 0  # which vLLM takes from unscaled logits
    return bool(sampling.choices) and not greedy and (sampling.temperature != 1 or sampling.truncated)


def _prompt_logps(output: Any, sequence: tuple[int, ...]) -> np.ndarray:
    if output is None:  # one token: nothing before it
        return np.empty(0, np.float32)
    pairs = zip(sequence[1:], output.prompt_logprobs[1:], strict=True)
    return np.array([at[token].logprob for token, at in pairs], np.float32)


def _shared_memory_for(size: int) -> str | None:
    """/dev/shm when it has room for this many bytes twice (containers may have little), else the default."""
    try:
        free = os.statvfs("/dev/shm")
    except OSError:
        return None
    return "/dev/shm" if free.f_bavail * free.f_frsize > 2 * size else None


@contextmanager
def _vllm_environment(config: VLLMEngineConfig, cores: tuple[int, ...] | None, *, eager: bool) -> Iterator[None]:
    """Environment and threads as vLLM has to find them when it is imported and started.

    What vLLM changes for its own children while it starts (LD_PRELOAD, LOCAL_WORLD_SIZE, and on a CPU
    `torch.set_num_threads`, which it replaces by one that does nothing) is put back afterwards.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler runs in this process, stepped by poll
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would overrule kv_cache_gib
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings at start are about tuning, 30 lines of them
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # the runner whose seeds and reloads are tested here
    changed = ("LD_PRELOAD", "LOCAL_WORLD_SIZE", "VLLM_CPU_OMP_THREADS_BIND", "TORCHDYNAMO_DISABLE")
    kept = {key: os.environ.get(key) for key in changed}
    if eager and not torch.cuda.is_available():
        # Even an eager vLLM compiles some helpers at its first step: 3 to 20 s on a CPU, and a C++ compiler.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "vllm.envs" in sys.modules:  # an engine that this process had before has fixed what vLLM knows of it
        sys.modules["vllm.envs"].disable_envs_cache()
    set_num_threads = torch.set_num_threads
    _bind(config, cores)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch names that vLLM still uses
            yield
    finally:
        torch.set_num_threads = set_num_threads
        for key, value in kept.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def _bind(config: VLLMEngineConfig, cores: tuple[int, ...] | None) -> None:
    """Threads and cores of the computation on a CPU."""
    if torch.cuda.is_available():
        return
    if config.tensor_parallel > 1:  # each rank is a process of its own, which vLLM binds
        share = sorted(cores or os.sched_getaffinity(0))
        ranks = range(config.tensor_parallel)
        parts = [share[rank :: config.tensor_parallel] or [share[rank % len(share)]] for rank in ranks]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, part[: config.threads])) for part in parts)
        return
    # vLLM binds only processes that it starts; the engine computes in this one.
    if cores:
        os.sched_setaffinity(0, cores)
    if config.threads or cores:
        torch.set_num_threads(config.threads or len(cores or ()))

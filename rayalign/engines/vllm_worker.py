"""What runs inside vLLM's worker processes: taking weights over, and saying exactly what was handed in.

vLLM mixes `ReloadExtension` into its worker class (`worker_extension_cls`). Every name here starts
with `rayalign_`, because vLLM refuses an extension that shadows one of the worker's own methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rayalign.errors import SyncMismatch
from rayalign.memory import peak_gib
from rayalign.protocols import Chunk
from rayalign.sync.flat import checksum, unpack


@dataclass(frozen=True)
class Reloaded:
    """What one worker did with a push.

    Attributes:
        handed: name → checksum of each tensor at the moment it was handed to vLLM's loader.
        unloaded: vLLM's parameters that no tensor filled, or that were filled in part.
        error: why loading stopped, empty when it did not.
    """

    handed: dict[str, str]
    unloaded: tuple[str, ...]
    error: str = ""


class ReloadExtension:
    """Methods that `collective_rpc` calls in each worker."""

    model_runner: Any  # of vLLM's worker

    def rayalign_reload(self, chunks: Sequence[Chunk]) -> Reloaded:
        """Load the chunks (their `data` an array, or the path of a file to map) into this worker's shard."""
        handed: dict[str, str] = {}
        model = self.model_runner.get_model()
        recorder = _LoadRecorder(model)
        try:
            with recorder:
                # Not `model.load_weights`: on a CPU the layers were repacked after the first load and no
                # longer take checkpoint tensors; reload_weights undoes and redoes that layer by layer.
                self.reload_weights(weights_iterator=_checksummed(chunks, handed))  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001  every rank has to answer, whatever the loader made of it
            _abandon(model, self.model_runner.model_config)
            return Reloaded(handed, (), f"{type(error).__name__}: {error}")
        _repack_output_layer(model)
        return Reloaded(handed, recorder.unloaded)

    def rayalign_memory(self) -> float:
        return peak_gib()

    def rayalign_take_search(self, key: str) -> Any:
        """The candidates of a search that has ended in this worker."""
        return self._rayalign_searches().take(key)

    def rayalign_drop_search(self, key: str) -> None:
        self._rayalign_searches().drop(key)

    def _rayalign_searches(self) -> Any:
        from rayalign.engines.vllm_diverse import DiverseBeamProcessor

        processors = self.model_runner.input_batch.logitsprocs.non_argmax_invariant
        return next(each for each in processors if isinstance(each, DiverseBeamProcessor))


class _LoadRecorder:
    """Notes which parameters a reload fills: vLLM itself only logs those that it leaves as they were."""

    def __init__(self, model: Any):
        self.model = model
        self.unloaded: tuple[str, ...] = ()

    def __enter__(self) -> None:
        self.original = self.model.load_weights
        self.expected = {name for name, _ in self.model.named_parameters()}
        self.model.load_weights = self._load  # shadows the method until __exit__

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        loaded = self.original(weights)
        if loaded is not None and getattr(self.model, "quant_config", None) is None:
            self.unloaded = tuple(sorted(self.expected - set(loaded))) + tuple(_filled_in_part(self.model))
        return loaded

    def __exit__(self, *_: object) -> None:
        del self.model.load_weights


def _filled_in_part(model: torch.nn.Module) -> Iterator[str]:
    """Fused layers (qkv, gate and up) that got some of their parts: vLLM counts them as loaded."""
    from vllm.model_executor.layers.linear import LinearBase  # never padded, unlike embeddings
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if isinstance(layer, LinearBase) and info.can_load() and 0 < info.load_numel < (info.load_numel_total or 0):
            yield f"{name} ({info.load_numel} of {info.load_numel_total} numbers)"


def _repack_output_layer(model: torch.nn.Module) -> None:
    """Bring an output layer that is tied to the embeddings up to date on a CPU.

    vLLM computes logits from a packed copy of `lm_head.weight` there. A reload packs it anew only when a
    tensor of that name comes, so with tied weights the embeddings are new and the logits those of old ones.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


def _abandon(model: torch.nn.Module, model_config: Any) -> None:
    """Put the layers that a broken reload left on the meta device back, so that a later one can start."""
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():  # started and not finished: forget what came, or finalising would load it again
            info.loaded_weights.clear()
            info.load_numel = 0
    finalize_layerwise_reload(model, model_config)


def _checksummed(chunks: Sequence[Chunk], handed: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    for chunk in chunks:
        data = chunk.data if not isinstance(chunk.data, str) else np.memmap(chunk.data, np.uint8, mode="r")
        for name, tensor in unpack(replace(chunk, data=data)):
            handed[name] = checksum(tensor)
            yield name, tensor


def verify_loaded(results: Sequence[Reloaded], *, engine: str) -> None:
    """Raises SyncMismatch when a worker could not load, or left a parameter of its shard as it was."""
    for rank, result in enumerate(results):
        if result.error:
            raise SyncMismatch(
                "vLLM could not load the weights of this push",
                where=f"{engine}, rank {rank}",
                value=result.error,
                rule="Hugging Face names and shapes of the model that the engine was started with",
                remedy="check that learner and engine were started from the same model folder",
            )
        if result.unloaded:
            raise SyncMismatch(
                f"{len(result.unloaded)} parameters of the engine were not filled by this push",
                where=f"{engine}, rank {rank}",
                value=", ".join(result.unloaded[:3]),
                rule="a push covers every parameter",
                remedy="check that learner and engine were started from the same model folder",
            )

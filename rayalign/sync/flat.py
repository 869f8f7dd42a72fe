"""Named tensors ↔ flat arrays of bytes, with a checksum of each tensor.

The learner packs, an engine unpacks, and `verify` holds what the engine was handed against what the
learner had. What carries the arrays in between (an object store, shared memory, a file) is not known here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash

from rayalign.errors import SyncMismatch
from rayalign.protocols import Chunk, TensorSpec, WeightPush

ALIGNMENT = 64  # bytes: a cache line, and a multiple of every dtype's size
NAMED_AT_MOST = 3  # tensors that an error names of each kind


def checksum(tensor: torch.Tensor) -> str:
    """16 hex digits, xxh3-64 over dtype, shape and bytes of a tensor on any device."""
    digest = xxhash.xxh3_64(f"{_dtype_name(tensor)}{tuple(tensor.shape)}".encode())
    digest.update(_bytes_of(tensor.detach().cpu()).numpy().data)
    return digest.hexdigest()


def pack(
    named: Iterable[tuple[str, torch.Tensor]],
    version: int,
    *,
    dtype: torch.dtype | None = None,
    chunk_bytes: int = 128 << 20,
    wrap: Callable[[np.ndarray], Any] = lambda array: array,
) -> WeightPush:
    """Named tensors as chunks of about `chunk_bytes` bytes, a larger tensor alone in one of its own.

    One tensor is taken from the iterator at a time, so that gathered shards need not all be held.

    Args:
        dtype: floating-point tensors are cast to it; None keeps each as it is.
        wrap: called on each finished chunk (uint8, one dimension), for instance to put it in an object store.

    Raises:
        ValueError: when a name comes twice, or chunk_bytes is not positive.
    """
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes has to be positive, not {chunk_bytes}")
    manifest: dict[str, str] = {}
    chunks: list[Chunk] = []
    specs: list[TensorSpec] = []
    buffer, used = np.empty(0, np.uint8), 0

    def flush() -> None:
        nonlocal specs, used
        if specs:
            chunks.append(Chunk(tuple(specs), wrap(buffer[:used])))
            specs, used = [], 0

    for name, tensor in named:
        if name in manifest:
            raise ValueError(f"{name} comes twice among the tensors to pack")
        source = tensor.detach()
        if dtype is not None and source.is_floating_point():
            source = source.to(dtype)
        source = source.cpu()
        manifest[name] = checksum(source)  # of the learner's tensor, before the copy that it is to guard
        flat = _bytes_of(source)
        offset = -(-used // ALIGNMENT) * ALIGNMENT
        if specs and offset + flat.numel() > chunk_bytes:
            flush()
        if not specs:
            buffer, offset = np.empty(max(chunk_bytes, flat.numel()), np.uint8), 0
        buffer[used:offset] = 0
        torch.from_numpy(buffer[offset : offset + flat.numel()]).copy_(flat)
        specs.append(TensorSpec(name, _dtype_name(source), tuple(source.shape), offset, flat.numel()))
        used = offset + flat.numel()
    flush()
    return WeightPush(version, manifest, tuple(chunks))


def unpack(chunk: Chunk) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a chunk as views of its bytes (do not write to them: the bytes may be read-only).

    Raises:
        SyncMismatch: when a tensor's bytes are not all there.
    """
    data = np.asarray(chunk.data) if isinstance(chunk.data, np.ndarray) else np.frombuffer(chunk.data, np.uint8)
    for spec in chunk.specs:
        dtype = getattr(torch, spec.dtype)
        needed = math.prod(spec.shape) * dtype.itemsize
        if spec.nbytes != needed or spec.offset + needed > data.size:
            raise SyncMismatch(
                "a tensor of a weight push is cut short",
                where=spec.name,
                value=f"{max(0, min(spec.nbytes, data.size - spec.offset))} bytes",
                rule=f"{needed} bytes for {spec.dtype} {spec.shape}",
                remedy="what carries the chunks from learner to engine lost some of their bytes",
            )
        with warnings.catch_warnings():  # torch warns that read-only bytes could be written through the view
            warnings.filterwarnings("ignore", message=".*not writable.*")
            flat = torch.from_numpy(data[spec.offset : spec.offset + needed])
        yield spec.name, flat.view(dtype).view(spec.shape)


def verify(manifest: Mapping[str, str], handed: Mapping[str, str], *, who: str) -> None:
    """Hold the checksums of what `who` was handed against the learner's.

    Raises:
        SyncMismatch: naming up to three tensors that are missing, unexpected, or differ.
    """
    missing = [name for name in manifest if name not in handed]
    unexpected = [name for name in handed if name not in manifest]
    different = [name for name in manifest if name in handed and manifest[name] != handed[name]]
    if not (missing or unexpected or different):
        return
    differing = [f"{name} (learner {manifest[name]}, engine {handed[name]})" for name in different]
    kinds = (("missing", missing), ("unexpected", unexpected), ("different", differing))
    raise SyncMismatch(
        f"the weights that arrived are not the learner's: {_count(missing, unexpected, different)}",
        where=who,
        value="; ".join(f"{kind}: {_some(names)}" for kind, names in kinds if names),
        rule="every tensor arrives once, with the learner's dtype, shape and bytes",
        remedy="do not sample from this engine; restart it, and look at what carries the chunks",
    )


def check_names(push: WeightPush, *, who: str) -> None:
    """Before anything is overwritten: the chunks hold the tensors of the manifest, each once.

    Raises:
        SyncMismatch: naming what is missing, unexpected or there twice.
    """
    names = [spec.name for chunk in push.chunks for spec in chunk.specs]
    verify(push.manifest, {name: push.manifest.get(name, "not in the manifest") for name in names}, who=who)
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise SyncMismatch("a tensor comes twice in one push", where=who, value=_some(twice), rule="every tensor once")


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, uint8 [n]. Needed for dtypes that numpy does not know, bfloat16 among them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _count(missing: list[str], unexpected: list[str], different: list[str]) -> str:
    return f"{len(missing)} missing, {len(unexpected)} unexpected, {len(different)} different"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more

"""Packing weights into chunks: bit for bit, with checksums that notice everything."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.errors import SyncMismatch
from rayalign.protocols import WeightPush
from rayalign.sync.flat import ALIGNMENT, check_names, checksum, pack, unpack, verify

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool)


def unpacked(push: WeightPush) -> dict[str, torch.Tensor]:
    return {name: tensor for chunk in push.chunks for name, tensor in unpack(chunk)}


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(37, 16, generator=generator),
        "bfloat16": torch.randn(3, 5, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(7, 9, generator=generator).T,
        "counts": torch.arange(5),
    }


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.lists(st.integers(0, 7), max_size=3), st.sampled_from(DTYPES)), max_size=8),
    chunk_bytes=st.integers(1, 700),
    seed=st.integers(0, 2**16),
)
def test_tensors_come_back_bit_for_bit(shapes, chunk_bytes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    named = {
        f"t{index}": (torch.randn(shape, generator=generator) * 50).to(dtype)
        for index, (shape, dtype) in enumerate(shapes)
    }
    push = pack(named.items(), 3, chunk_bytes=chunk_bytes)
    found = unpacked(push)
    assert list(found) == list(named) and push.version == 3
    for name, tensor in named.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
        assert checksum(found[name]) == push.manifest[name] == checksum(tensor)
    for chunk in push.chunks:
        assert chunk.data.dtype == np.uint8 and chunk.data.ndim == 1
        assert all(spec.offset % ALIGNMENT == 0 for spec in chunk.specs)
        assert chunk.data.size <= chunk_bytes or len(chunk.specs) == 1
    check_names(push, who="engine")


def test_a_full_chunk_is_handed_on_before_more_tensors_are_taken() -> None:
    finished: list[np.ndarray] = []

    def wrap(array: np.ndarray) -> np.ndarray:
        finished.append(array)
        return array

    def gathered():
        for index in range(5):
            assert len(finished) == max(0, index - 1)  # only the tensor just packed is still in the open chunk
            yield f"t{index}", torch.full((64,), float(index))

    push = pack(gathered(), 0, chunk_bytes=256, wrap=wrap)
    assert len(finished) == len(push.chunks) == 5


def test_what_wrap_returns_is_what_travels() -> None:
    with tempfile.TemporaryDirectory() as folder:

        def to_file(array: np.ndarray) -> Path:
            path = Path(folder) / f"{len(list(Path(folder).iterdir()))}.bin"
            path.write_bytes(array.tobytes())
            return path

        push = pack(some_tensors().items(), 0, chunk_bytes=600, wrap=to_file)
        assert len(push.chunks) > 1
        resolved = replace(push, chunks=tuple(replace(c, data=c.data.read_bytes()) for c in push.chunks))
    verify(push.manifest, {name: checksum(tensor) for name, tensor in unpacked(resolved).items()}, who="engine")


def test_casting_is_in_the_manifest() -> None:
    named = some_tensors()
    push = pack(named.items(), 0, dtype=torch.bfloat16)
    assert push.manifest["embed"] == checksum(named["embed"].bfloat16()) != checksum(named["embed"])
    assert unpacked(push)["counts"].dtype == torch.int64  # only floating-point tensors are cast


def test_a_checksum_sees_dtype_shape_and_every_bit() -> None:
    zeros = torch.zeros(4, 6)
    assert checksum(zeros) == checksum(zeros.clone()) == checksum(torch.zeros(6, 4).T)
    different = [zeros.view(6, 4), zeros.bfloat16(), zeros.int(), -zeros, torch.zeros(24), torch.zeros(4, 7)]
    assert len({checksum(tensor) for tensor in [zeros, *different]}) == len(different) + 1
    base = torch.arange(3000, dtype=torch.bfloat16)
    flipped = base.clone()
    flipped.view(torch.int16)[1500] ^= 1
    assert checksum(base) != checksum(flipped)


def test_views_share_the_bytes_and_read_only_bytes_make_no_noise() -> None:
    push = pack(some_tensors().items(), 0)
    data = push.chunks[0].data
    assert unpacked(push)["embed"].data_ptr() == data.ctypes.data
    data.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = unpacked(push)
    assert torch.equal(found["embed"], some_tensors()["embed"])


def test_bytes_that_were_lost_are_noticed() -> None:
    push = pack(some_tensors().items(), 0)
    short = replace(push.chunks[0], data=push.chunks[0].data[:-1])
    with pytest.raises(SyncMismatch, match="counts: a tensor of a weight push is cut short"):
        list(unpack(short))


def test_the_error_names_three_of_each_kind_with_both_checksums() -> None:
    manifest = {f"layer.{index}": f"{index:016x}" for index in range(6)}
    handed = {name: value for name, value in manifest.items() if name != "layer.0"}
    handed |= {"layer.3": "f" * 16, "extra": "0" * 16}
    with pytest.raises(SyncMismatch) as caught:
        verify(manifest, handed, who="engine-2, rank 1")
    text = str(caught.value)
    assert "engine-2, rank 1" in text and "1 missing, 1 unexpected, 1 different" in text
    assert "missing: layer.0" in text and "unexpected: extra" in text
    assert f"layer.3 (learner {3:016x}, engine {'f' * 16})" in text
    with pytest.raises(SyncMismatch, match=r"missing: layer.0, layer.1, layer.2 and 3 more"):
        verify(manifest, {}, who="engine-0")
    verify(manifest, dict(manifest), who="engine-0")


def test_names_are_held_against_the_manifest_before_anything_is_read() -> None:
    push = pack(some_tensors().items(), 0)
    twice = replace(push, chunks=push.chunks * 2)
    with pytest.raises(SyncMismatch, match="comes twice"):
        check_names(twice, who="engine")
    with pytest.raises(SyncMismatch, match="unexpected: embed"):
        check_names(replace(push, manifest={k: v for k, v in push.manifest.items() if k != "embed"}), who="engine")
    with pytest.raises(ValueError, match="embed comes twice"):
        pack([("embed", torch.zeros(2)), ("embed", torch.zeros(2))], 0)
    with pytest.raises(ValueError, match="chunk_bytes"):
        pack([], 0, chunk_bytes=0)

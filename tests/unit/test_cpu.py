"""What a CPU computes in hardware, and what a run says of it."""

from __future__ import annotations

import pytest

from rayalign import build
from rayalign.api import run_training
from rayalign.cpu import bfloat16_flags


def test_flags_of_bfloat16_are_found_on_both_kinds_of_cpu():
    assert bfloat16_flags("model name: x\nflags\t\t: sse avx512_bf16 amx_bf16\n") == ["amx_bf16", "avx512_bf16"]
    assert bfloat16_flags("Features : fp asimd bf16\n") == ["bf16"]
    assert bfloat16_flags("flags : sse avx2\nbugs : bf16\n") == []


@pytest.mark.parametrize(
    ("dtype", "slow", "said"), [("bfloat16", True, 1), ("bfloat16", False, 0), ("float32", True, 0)]
)
def test_a_run_in_software_bfloat16_says_so_once(make, monkeypatch, capfd, dtype, slow, said):
    monkeypatch.setattr(build, "slow_bfloat16", lambda: slow)
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: False)
    run_training(make(model__dtype=dtype, train__steps=1))
    assert capfd.readouterr().err.count("set model.dtype=float32") == said

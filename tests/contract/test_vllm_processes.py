"""vLLM over more than one process: the same tokens from either engine, and tensor parallel ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rayalign.engines.vllm import VLLMEngineConfig
from rayalign.errors import SyncMismatch
from rayalign.sync.flat import pack
from rayalign.types import Request, Sampling
from tests.contract.test_engine_contract import SEQUENCE, TOLERANCE, drain, forward_logps, sampled_logps, serve
from tests.tiny_models import build_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = """
import json, sys
sys.path.insert(0, {root!r})
from rayalign.engines.vllm import VLLMEngineConfig
from tests.contract.test_engine_contract import drain
from tests.contract.test_vllm_processes import many_requests
engine = VLLMEngineConfig(max_context=288, max_running={running}, kv_cache_gib=0.25).build(model={model!r})
engine.submit(many_requests()[::-1])
done = drain(engine, len(many_requests()))
print("RESULT" + json.dumps({{key: completion.token_ids for key, completion in done.items()}}))
engine.close()
"""


def many_requests() -> list[Request]:
    """Six prompts, four answers each; half of the prompts share 200 tokens, more than one cache block."""
    shared = tuple(4 + (7 * index) % 150 for index in range(200))
    prompts = [(shared if index % 2 else shared[: 3 + index]) + (40 + index, 3) for index in range(6)]
    kinds = [Sampling(48), Sampling(48, temperature=0.7), Sampling(30, top_k=20), Sampling(40, top_p=0.9)]
    return [
        Request(f"{row}-{column}", prompt, kind, seed=100 * row + column)
        for row, prompt in enumerate(prompts)
        for column, kind in enumerate(kinds)
    ]


def test_another_process_another_order_and_two_at_a_time_give_the_same_tokens(tiny_llama: Path) -> None:
    config = VLLMEngineConfig(max_context=288, max_running=64, kv_cache_gib=0.25)
    engine = config.build(model=str(tiny_llama))
    try:
        engine.submit(many_requests())
        here = {key: list(completion.token_ids) for key, completion in drain(engine, len(many_requests())).items()}
    finally:
        engine.close()
    script = ELSEWHERE.format(root=str(ROOT), running=2, model=str(tiny_llama))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, run.stderr[-2000:]
    assert json.loads(lines[0].removeprefix("RESULT")) == here


@torch.no_grad()
def test_tensor_parallel_ranks_sample_load_and_verify(tmp_path: Path) -> None:
    """Two ranks, and a model whose output layer is tied to its embeddings. About 20 s."""
    model_path = build_tiny_llama(tmp_path, seed=8, tied=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    config = VLLMEngineConfig(max_context=96, tensor_parallel=2, kv_cache_gib=0.25)
    engine = config.build(model=str(model_path), name="pair")
    try:
        np.testing.assert_allclose(engine.logps([SEQUENCE])[0], forward_logps(model, SEQUENCE), atol=TOLERANCE)
        for parameter in model.parameters():
            parameter.add_(torch.full_like(parameter, 0.02).normal_(generator=torch.Generator().manual_seed(1)) * 0.1)
        push = pack(model.named_parameters(), 3, chunk_bytes=30_000)
        assert "lm_head.weight" not in push.manifest
        engine.load(push)
        np.testing.assert_allclose(engine.logps([SEQUENCE])[0], forward_logps(model, SEQUENCE), atol=TOLERANCE)
        requests = [Request(f"r{index}", SEQUENCE[:4], Sampling(10, temperature=0.7), index) for index in range(6)]
        for request, completion in zip(requests, serve(engine, *requests), strict=True):
            assert completion.version == 3
            expected = sampled_logps(model, completion, request)
            np.testing.assert_allclose(completion.logps, expected, atol=TOLERANCE)
        data = push.chunks[1].data.copy()
        data[100] ^= 1
        chunks = (push.chunks[0], replace(push.chunks[1], data=data), *push.chunks[2:])
        with pytest.raises(SyncMismatch, match="pair, rank 0"):
            engine.load(replace(push, version=4, chunks=chunks))
        with pytest.raises(SyncMismatch, match="a load that failed"):
            engine.submit(requests)
        assert engine.version == 3
        assert engine.memory_gib() > 0.5  # of three processes
    finally:
        engine.close()

"""A tiny llama in a folder, the same model in transformers, and both engines on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rayalign.engines.transformers import TransformersEngineConfig
from rayalign.engines.vllm import VLLMEngineConfig
from rayalign.protocols import Engine
from rayalign.sync.flat import pack
from tests.tiny_models import build_tiny_llama

MAX_CONTEXT = 96
CONFIGS = {
    "transformers": TransformersEngineConfig(max_context=MAX_CONTEXT, max_running=8),
    "vllm": VLLMEngineConfig(max_context=MAX_CONTEXT, max_running=8, kv_cache_gib=0.25),
}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tiny_llama"), seed=3)


@pytest.fixture(scope="session")
def base_model(tiny_llama: Path) -> PreTrainedModel:
    """What the engines were started with. Not to be changed: see `perturbed`."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture(scope="session")
def perturbed(tiny_llama: Path) -> PreTrainedModel:
    """The same model some training later."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def running_engine(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[Engine]:
    engine = CONFIGS[request.param].build(model=str(tiny_llama), name=f"{request.param}-0")
    yield engine
    engine.close()


@pytest.fixture
def engine(running_engine: Engine, base_model: PreTrainedModel) -> Iterator[Engine]:
    """The running engine with the base model's weights as version 0, and nothing open."""
    running_engine.load(pack(base_model.named_parameters(), 0))
    yield running_engine
    running_engine.abort([f"r{index}" for index in range(100)])

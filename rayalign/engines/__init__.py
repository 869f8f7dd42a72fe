"""Inference engines. A config record of this table has `build(...)`, which starts the engine it describes."""

from __future__ import annotations

ENGINES = {
    "vllm": "rayalign.engines.vllm:VLLMEngineConfig",
    "transformers": "rayalign.engines.transformers:TransformersEngineConfig",
}

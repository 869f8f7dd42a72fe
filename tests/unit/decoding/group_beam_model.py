"""A tiny llama whose weights depend on numpy's generator alone, so that any version of transformers reads the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 64, 96, 2, 4, 2, 32
EOS = 1
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}


def build_group_beam_model(path: Path, *, seed: int = 11, end_logit: float = 1.0) -> Path:
    """Save the model in a folder. Hidden states share a direction, along which the end token gains `end_logit`."""
    draw = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float) -> np.ndarray:
        return (draw.standard_normal((rows, columns)) * scale).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, 0.6), "model.norm.weight": np.ones(HIDDEN, "f4")}
    tensors["model.embed_tokens.weight"][:, 0] = 2.0  # the shared direction
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for part, rows in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            tensors[f"{name}.self_attn.{part}.weight"] = matrix(rows * HEAD_DIM, HIDDEN, 0.15)
        tensors[f"{name}.self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM, 0.1)
        tensors[f"{name}.mlp.gate_proj.weight"] = matrix(INNER, HIDDEN, 0.15)
        tensors[f"{name}.mlp.up_proj.weight"] = matrix(INNER, HIDDEN, 0.15)
        tensors[f"{name}.mlp.down_proj.weight"] = matrix(HIDDEN, INNER, 0.1)
        tensors[f"{name}.input_layernorm.weight"] = np.ones(HIDDEN, "f4")
        tensors[f"{name}.post_attention_layernorm.weight"] = np.ones(HIDDEN, "f4")
    tensors["lm_head.weight"] = matrix(VOCAB, HIDDEN, 0.2)
    tensors["lm_head.weight"][EOS, 0] += end_logit
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG, indent=1))
    return path

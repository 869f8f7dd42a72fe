"""A random llama of 2 layers in a folder, with a tokenizer: written with numpy in milliseconds, no download.

Neither torch nor transformers is imported, so that a machine on which those are broken gets this far.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ("<pad>", "<eos>")
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 2, 128, 256, 4, 2, 64  # heads that two tensor parallel ranks share
VOCAB = [*SPECIALS, "\n", *(chr(code) for code in range(32, 127))]
VOCAB += [f"<extra_{index}>" for index in range(128 - len(VOCAB))]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(VOCAB),
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "dtype": "float32",
}


def build_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a Hugging Face checkpoint into `folder`; the same seed gives the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    save_file(_weights(np.random.default_rng(seed)), folder / "model.safetensors", metadata={"format": "pt"})
    _save_tokenizer(folder)
    return folder


def _weights(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Hugging Face names → float32 arrays, far enough from 0 that next tokens are far from equally likely."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(VOCAB), HIDDEN),
        "lm_head.weight": (len(VOCAB), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        own = f"model.layers.{layer}"
        shapes |= {
            f"{own}.input_layernorm.weight": (HIDDEN,),
            f"{own}.post_attention_layernorm.weight": (HIDDEN,),
            f"{own}.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            f"{own}.self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{own}.self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{own}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            f"{own}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{own}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{own}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    centre = {name: 1.0 if "norm" in name else 0.0 for name in shapes}
    return {
        name: (centre[name] + random.normal(0, 0.02 if centre[name] else 0.1, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def _save_tokenizer(folder: Path) -> None:
    """One token a character of ASCII."""
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(VOCAB)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))

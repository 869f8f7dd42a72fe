"""What a model's config.json says about its size. No weights are read, and none need to be there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rayalign.build import model_path
from rayalign.errors import ConfigError
from rayalign.learners.lora import in_head
from rayalign.learners.vision import encoder_of, saved_to_see


@dataclass(frozen=True)
class Shape:
    """The numbers that memory follows from.

    Attributes:
        parameters: of the whole model, tied ones once.
        largest: parameters of its largest tensor.
        hidden, intermediate: width of the residual stream, and of the feed-forward layer (of all experts that one
            token visits).
        heads, kv_heads, head_dim: of attention.
        dtype: that the checkpoint is saved in.
        network: "causal", with a head as wide as the vocabulary, tied or not; "score", with one as wide as `labels`.
        linear: (name, rows, columns) of the weights that LoRA may adapt: below the head, and not what sees images.
    """

    path: str
    architecture: str
    parameters: int
    largest: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    dtype: str
    network: str = "causal"
    labels: int = 1
    linear: tuple[tuple[str, int, int], ...] = ()


def read_shape(path: str, *, network: str = "causal", labels: int = 1, trust_remote_code: bool = False) -> Shape:
    """The shape of the model in a folder with a config.json, or of a hub id that is at hand.

    Args:
        network: what an algorithm makes of it, see `Algorithm.network`.
        labels: of a score network; 0: as its config says.

    Raises:
        ConfigError: no config.json there, or one of no such model.
    """
    return _read(model_path(path), network, labels, trust_remote_code)


@lru_cache(maxsize=8)
def _read(path: str, network: str, labels: int, trust_remote_code: bool) -> Shape:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers import AutoModelForSequenceClassification as AutoModelForScores

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
        language = AutoModelForImageTextToText if saved_to_see(config) else AutoModelForCausalLM
        kind = AutoModelForScores if network == "score" else language
        if network == "score":
            config.num_labels = labels or config.num_labels
        with torch.device("meta"):  # shapes without storage: 70B parameters take half a second
            model = kind.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "the model's config.json cannot be read",
            where="key model.path",
            value=path if isinstance(error, OSError) else f"{path}: {type(error).__name__}: {error}",
            rule="config.json of a language model, in a folder, or of a hub id whose files are on this machine",
            remedy="give a folder with config.json (weights need not be there)",
        ) from None
    sizes = [parameter.numel() for parameter in model.parameters()]  # a tied tensor comes once
    text = config.get_text_config()
    output = model.get_output_embeddings() if network == "causal" else None
    heads = int(text.num_attention_heads)
    hidden = int(text.hidden_size)
    return Shape(
        path=path,
        architecture=type(model).__name__,
        parameters=sum(sizes),
        largest=max(sizes),
        layers=int(text.num_hidden_layers),
        hidden=hidden,
        intermediate=_intermediate(text, hidden),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
        vocabulary=int(text.vocab_size),
        tied=output is not None and output.weight is model.get_input_embeddings().weight,
        dtype=str(config.dtype or "float32").removeprefix("torch."),
        network=network,
        labels=int(config.num_labels) if network == "score" else 1,
        linear=tuple(_linear(model, output)),
    )


def _linear(model: Any, output: Any) -> Iterator[tuple[str, int, int]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    seeing = encoder_of(model)
    inside = set() if seeing is None else set(seeing.modules())
    for name, module in model.named_modules():
        below = module is not output and module not in inside and not in_head(model, f"{name}.")
        if below and isinstance(module, nn.Linear | Conv1D):
            yield name, *module.weight.shape


def _intermediate(config: Any, hidden: int) -> int:
    """Width of the feed-forward layer that one token goes through; GPT-2's is 4 hidden when not said."""
    dense = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", None)
    return int((getattr(config, "moe_intermediate_size", None) or dense) * experts if experts else dense)

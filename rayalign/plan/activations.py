"""Bytes that a forward pass leaves for its backward pass, and those of logits.

Counted tensor by tensor for a pre-norm decoder with gated feed-forward layers (llama and its relatives) as
transformers runs it, in the manner of Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large
Transformer Models"), whose 34·s·b·h is for GPT with dropout. h is hidden, f the feed-forward width, a·d the width
of all heads. A unit test counts the saved tensors of a real model and finds the same.
"""

from __future__ import annotations

from rayalign.plan.shapes import Shape


def layer_bytes(shape: Shape, *, width: int, autocast: bool, longest: int) -> float:
    """Saved for backward by one layer, a token.

    Two norms: each keeps its input in float32 (4h), the normalised input and what the next layer reads.
    Attention: queries, keys, values (repeated to all heads, as a padded batch needs) and output: 4·a·d.
    Feed-forward: gate, its activation, up, and their product: 4f. Statistics of norms and softmax: 8 + 4a.
    The padding mask, once a layer: `longest` a token.

    Args:
        width: bytes of a number in the compute dtype.
        autocast: float32 weights under autocast: the norms stay in float32, and each of the five
            projections keeps a cast copy of its input.
        longest: tokens of the longest row.
    """
    h, f, heads = shape.hidden, shape.intermediate, shape.heads
    norms = 16 * h + 5 * h * width if autocast else 2 * (4 + 2 * width) * h
    return norms + width * (4 * heads * shape.head_dim + 4 * f + longest) + 8 + 4 * heads


def saved_bytes(shape: Shape, tokens: int, *, width: int, autocast: bool, longest: int, checkpointing: bool) -> float:
    """Saved for backward by all layers at the end of a forward pass over `tokens` tokens.

    With gradient checkpointing a layer keeps its input only, and one layer at a time is computed again
    (Chen et al. 2016). The final norm keeps two copies.
    """
    stream = 4 if autocast else width
    layer = layer_bytes(shape, width=width, autocast=autocast, longest=longest)
    layers = shape.layers * stream * shape.hidden + layer if checkpointing else shape.layers * layer
    return tokens * (layers + (4 + stream) * shape.hidden)


def logit_bytes(shape: Shape, positions: int, *, width: int, temperature: float) -> float:
    """Logits of one chunk of positions while their gradient is computed.

    The logits and their gradient in the compute dtype, and two float32 blocks (`maths.logprobs`): the logits
    scaled or cast, which in float32 at temperature 1 are the logits themselves, and the softmax.
    """
    scaled = 0 if width == 4 and temperature == 1.0 else 4
    return float(positions) * shape.vocabulary * (2 * width + scaled + 4)


def kl_bytes(shape: Shape, positions: int, *, width: int) -> float:
    """Beside the logits of one chunk, for the exact KL to the reference: the reference's logits and the gradient of
    the divergence in the compute dtype, and float32 blocks of both distributions (`learners.columns._ReferenceKL`).

    Logits and this together: 28 bytes a position and token of the vocabulary in float32, 24 in bfloat16, as measured.
    """
    return float(positions) * shape.vocabulary * (2 * width + 8)


def hidden_bytes(shape: Shape, positions: int, *, width: int) -> float:
    """The reference's last hidden states at completion tokens, which the exact KL keeps until its backward pass."""
    return float(positions) * shape.hidden * width


def working_bytes(shape: Shape, tokens: int, *, width: int) -> float:
    """Of one layer while its backward pass runs: gradients of the feed-forward layer's inner tensors (3f), of its
    output and of attention's (4h), on top of what is saved."""
    return float(tokens) * width * (3 * shape.intermediate + 4 * shape.hidden)

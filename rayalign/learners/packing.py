"""Sequences behind one another in one row, without padding: what a backbone needs to keep them apart.

Position ids restart with each sequence, and attention is computed a sequence at a time, so that neither its time
nor its memory grows with the square of the whole row, as with a block mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rayalign.errors import ConfigError

ATTENTION = "packed_sdpa"


def packed(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """Arguments of a backbone for right-padded rows [R, S] as one row [1, N] of their N tokens."""
    keep = attention_mask.bool()
    positions = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    return {
        "input_ids": input_ids[keep].unsqueeze(0),
        "position_ids": positions[keep].unsqueeze(0),
        "attention_mask": None,
        # An argument that backbones hand down to each attention layer, in the recomputation of layers too.
        "packed_lengths": tuple(keep.sum(1).tolist()),
    }


def starts_of(attention_mask: Tensor) -> Tensor:
    """[R] where each row starts in the packed one."""
    lengths = attention_mask.sum(1)
    return lengths.cumsum(0) - lengths


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers, scaled dot product, on each sequence of a packed row.

    Args:
        query, key, value: [1, heads, N, D].
        packed_lengths: of the sequences; none: the row is one.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths = packed_lengths or (query.shape[2],)
    if len(lengths) == 1:
        parts = [(query, key, value)]
    else:
        parts = list(zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True))
    found = []
    for part in parts:
        mask = _window(part[0].shape[2], sliding_window, query.device)
        found.append(sdpa_attention_forward(module, *part, mask, **kwargs)[0])  # [1, n, heads, D]
    return torch.cat(found, 1), None


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, n, n] the causal mask of a sliding window; none where plain causality is enough."""
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    behind = at.unsqueeze(1) - at.unsqueeze(0)
    return ((behind >= 0) & (behind < window)).reshape(1, 1, length, length)


def register() -> str:
    """Make `attend` known to transformers; the name to ask for."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    return ATTENTION


@torch.no_grad()
def check_apart(model: Any) -> None:
    """Raises ConfigError when a sequence of a packed row gets other numbers than alone.

    Architectures with a state that runs along the row, or with attention of their own, would mix sequences up.
    """
    device, size = model.device, model.config.get_text_config().vocab_size
    lengths = (3, 5, 2)
    ids = torch.arange(1, 1 + sum(lengths), device=device) % size
    rows, mask = (torch.zeros(3, 5, dtype=torch.long, device=device) for _ in range(2))
    for row, part in enumerate(ids.split(lengths)):
        rows[row, : len(part)], mask[row, : len(part)] = part, 1
    try:
        together = model.base_model(**packed(rows, mask), use_cache=False).last_hidden_state[0]
        alone = [
            model.base_model(input_ids=part[None], attention_mask=torch.ones_like(part)[None], use_cache=False)
            for part in ids.split(lengths)
        ]
    except TypeError as error:
        raise unfit(model, f"{type(error).__name__}: {error}") from error
    apart = torch.cat([output.last_hidden_state[0] for output in alone])
    gap = float((together - apart).abs().max())
    rounding = 1e-4 if apart.dtype is torch.float32 else 3e-2
    if not gap <= rounding * (1e-3 + float(apart.abs().max())):
        raise unfit(model, f"hidden states differ by {gap:.2g}")


def unfit(model: Any, found: str) -> ConfigError:
    """The error for a model that cannot be packed, and what was found."""
    return ConfigError(
        "sequences of this architecture cannot be packed into one row",
        where="key learner.packing",
        value=f"{type(model).__name__}: {found}",
        rule="each sequence of a packed row has the numbers that it has alone",
        remedy="set learner.packing=false",
    )

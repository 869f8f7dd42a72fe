"""Cringe: push a bad answer's tokens under ones that the model likes instead. Imported through `preference`.

B answers, T tokens, V vocabulary. Log-probs are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rayalign.maths._tensors import (
    promote,
    require_dims,
    require_finite,
    require_non_negative,
    require_positive,
    require_same_shape,
)


def cringe_token_loss(
    logits: Tensor, labels: Tensor, mask: Tensor, *, top_k: int, generator: torch.Generator | None = None
) -> Tensor:
    """−log(e^{s*}/(e^{s*} + e^{s⁻})): a token of a bad answer against one the model likes instead. → [B, T].

    s⁻ is the label's logit. Of the top_k+1 logits the label is dropped if it is among them, top_k are kept,
    and s* is sampled from the softmax over those.

    Args:
        logits: [B, T, V].
        labels: [B, T]; a label under 0 is read as 0: mask it.
        mask: [B, T]; where it is 0 the loss is 0 and nothing in the logits matters.
        top_k: from 1 to V−1.
        generator: of the sampling, on the device of the logits.

    Source: Adolphs et al. 2022 (Cringe) eq. 2 and 3.

    Raises:
        ValueError: top_k out of range, shapes that do not fit.
    """
    require_dims(3, logits=logits)
    if labels.shape != logits.shape[:2] or mask.shape != logits.shape[:2]:
        raise ValueError(
            f"labels {tuple(labels.shape)} and mask {tuple(mask.shape)} do not fit logits {tuple(logits.shape)}"
        )
    if not 1 <= top_k < logits.shape[-1]:
        raise ValueError(f"top_k must lie in [1, {logits.shape[-1] - 1}] for this vocabulary, it is {top_k}")
    label, top = label_and_top(logits, labels.clamp(min=0).long(), top_k)
    return cringe_loss_of_top(label, top, mask, generator=generator)


def label_and_top(logits: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `cringe_loss_of_top` looks at: each label's logit, and the k largest of other tokens, largest first.

    Args:
        logits: […, V].
        labels: […] from 0 to V − 1.
        k: from 1 to V − 1.

    Returns:
        […] and […, k], float32 at least.
    """
    labels = labels.unsqueeze(-1)
    top, ids = logits.topk(k + 1, -1)
    # A stable sort on "is the label" moves it to the end, if it is there; the last one is then left out.
    order = (ids == labels).to(torch.uint8).argsort(dim=-1, stable=True)[..., :k]
    label, top = promote(logits.gather(-1, labels).squeeze(-1), top.gather(-1, order))
    return label, top


def cringe_loss_of_top(
    label_logits: Tensor,
    top_logits: Tensor,
    mask: Tensor,
    *,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """`cringe_token_loss` of what it looks at: the label's logit, and the largest ones of other tokens. → [B, T].

    Args:
        label_logits: [B, T] s⁻.
        top_logits: [B, T, K], s* is drawn from the softmax over them.
        mask: [B, T]; where it is 0 the loss is 0 and nothing in the logits matters.
        generator: of the sampling, on the device of the logits.
        uniform: [B, T] numbers in [0, 1) that the draws are made from instead, by the inverse of the
            distribution function: what is drawn for a token then does not depend on the rest of the batch.

    Raises:
        ValueError: shapes that do not fit.
    """
    require_dims(3, top_logits=top_logits)
    given = {"label_logits": label_logits, "mask": mask} | ({} if uniform is None else {"uniform": uniform})
    if any(tensor.shape != top_logits.shape[:2] for tensor in given.values()) or top_logits.shape[-1] == 0:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
        raise ValueError(f"shapes do not fit top_logits {tuple(top_logits.shape)}: {shapes}")
    counted = mask != 0
    negative, top = promote(label_logits, top_logits)
    zero = torch.zeros((), dtype=top.dtype, device=top.device)
    top = torch.where(counted.unsqueeze(-1), top, zero)
    negative = torch.where(counted, negative, zero)
    drawn = _draw(torch.softmax(top.detach(), -1), generator, uniform)
    positive = top.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, softplus(negative - positive), zero)


def _draw(probs: Tensor, generator: torch.Generator | None, uniform: Tensor | None) -> Tensor:
    """[B, T, K] → [B, T] indices."""
    if uniform is not None:
        below = probs.cumsum(-1) <= torch.where(uniform.isnan(), 0.0, uniform).unsqueeze(-1)
        return below.sum(-1).clamp(max=probs.shape[-1] - 1)  # rounding may leave the sum below 1
    flat = probs.reshape(-1, probs.shape[-1])
    drawn = torch.multinomial(flat, 1, generator=generator) if len(flat) else flat.new_zeros(0, dtype=torch.long)
    return drawn.reshape(probs.shape[:-1])


def binary_cringe_loss(positive_nll: Tensor, negative_token_loss: Tensor, *, alpha: float) -> Tensor:
    """CE(y⁺) + α·Cr(y⁻), each already a token mean. [B], [B] → [B].

    Source: Adolphs et al. 2022 (Cringe) eq. 4.

    Raises:
        ValueError: alpha negative, shapes that differ.
    """
    require_non_negative(alpha=alpha)
    require_same_shape(positive_nll=positive_nll, negative_token_loss=negative_token_loss)
    positive, negative = promote(positive_nll, negative_token_loss)
    return positive + alpha * negative


def pairwise_cringe_gate(logp_chosen: Tensor, logp_rejected: Tensor, *, margin: float, temperature: float) -> Tensor:
    """σ((margin − (log π(y_w) − log π(y_l)))/temperature), detached. [B], [B] → [B] in [0, 1].

    Pairwise Cringe is this gate times binary Cringe: pairs that are already apart are left alone.

    Source: Xu et al. 2023 (Pairwise Cringe) eq. 5.

    Raises:
        ValueError: temperature not above 0, margin not finite, shapes that differ.
    """
    require_positive(temperature=temperature)
    require_finite(margin=margin)
    require_same_shape(logp_chosen=logp_chosen, logp_rejected=logp_rejected)
    chosen, rejected = promote(logp_chosen.detach(), logp_rejected.detach())
    return torch.sigmoid((margin - (chosen - rejected)) / temperature)

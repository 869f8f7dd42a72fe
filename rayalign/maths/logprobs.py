"""From logits to log-probs of tokens and sequences, without a second block over the vocabulary.

B sequences, T tokens, V vocabulary. Log-probs and entropies are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayalign.maths._tensors import count, divide, keep, promote, require_dims, require_positive, require_same_shape


def token_logprobs(logits: Tensor, labels: Tensor, *, temperature: float = 1.0, chunk: int | None = None) -> Tensor:
    """log softmax(logits / temperature) at the labels.

    No shift is made here: `logits[:, t]` must be those that predict `labels[:, t]`. A label under 0 is
    read as 0, so that an ignore index can be masked afterwards.

    Args:
        logits: [B, T, V], any floating dtype.
        labels: [B, T], integers below V.
        temperature: a constant above 0.
        chunk: positions along T that are worked on at once. Neither pass then holds a second
            [B, T, V] float32 block; for backward only the logits and a [B, T] normaliser are saved.

    Returns:
        [B, T] in float32 (float64 for float64 logits), nats. A position whose output gets no gradient
        gives none to its logits, even when those are NaN.

    Raises:
        ValueError: shapes that do not fit, a label of V or more, temperature or chunk out of range.
    """
    chunk = _check_logits(logits, temperature, chunk)
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, they are {labels.dtype}")
    if labels.numel() and int(labels.max()) >= logits.shape[2]:
        raise ValueError(f"label {int(labels.max())} is not below the vocabulary size {logits.shape[2]}")
    return _TokenLogprobs.apply(logits, labels.clamp(min=0).long(), float(temperature), chunk)


def token_entropy(logits: Tensor, *, temperature: float = 1.0, chunk: int | None = None) -> Tensor:
    """Exact entropy of softmax(logits / temperature) at each position.

    Args:
        logits: [B, T, V], any floating dtype; −inf (a banned token) adds nothing.
        temperature: a constant above 0.
        chunk: as in `token_logprobs`.

    Returns:
        [B, T] in float32 (float64 for float64 logits), nats.

    Raises:
        ValueError: logits that are not [B, T, V], temperature or chunk out of range.
    """
    chunk = _check_logits(logits, temperature, chunk)
    return _TokenEntropy.apply(logits, float(temperature), chunk)


def sequence_logprob(token_logps: Tensor, mask: Tensor) -> Tensor:
    """log π(y|x): the masked sum of token log-probs. [B, T], [B, T] → [B], nats.

    Raises:
        ValueError: shapes that differ.
    """
    logps = _check_tokens(token_logps, mask)
    return keep(logps, mask).sum(-1)


def mean_logprob(token_logps: Tensor, mask: Tensor) -> Tensor:
    """Masked sum / token count, 0 for a sequence with no token. [B, T], [B, T] → [B], nats a token.

    Raises:
        ValueError: shapes that differ.
    """
    logps = _check_tokens(token_logps, mask)
    return divide(keep(logps, mask).sum(-1), count(mask, -1))


def mean_prob(token_logps: Tensor, mask: Tensor) -> Tensor:
    """Masked mean of exp(token_logps): what the released d-PM calibration code ranked by. → [B] in [0, 1].

    Raises:
        ValueError: shapes that differ.
    """
    logps = _check_tokens(token_logps, mask)
    # Twice masked: exp of a masked infinity would put inf·0 into the gradient.
    probs = torch.exp(torch.where(mask != 0, logps, torch.zeros_like(logps)))
    return divide(keep(probs, mask).sum(-1), count(mask, -1))


class _TokenLogprobs(torch.autograd.Function):
    """Forward: a log-sum-exp chunk by chunk. Backward: onehot − softmax, chunk by chunk."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, temperature: float, chunk: int) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        normaliser = logits.new_empty(labels.shape, dtype=dtype)
        logps = torch.empty_like(normaliser)
        for part in _parts(logits.shape[1], chunk):
            block = _scaled(logits[:, part], dtype, temperature)
            normaliser[:, part] = torch.logsumexp(block, -1)
            chosen = block.gather(-1, labels[:, part, None]).squeeze(-1)
            logps[:, part] = chosen - normaliser[:, part]
        ctx.save_for_backward(logits, labels, normaliser)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        logits, labels, normaliser = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for part in _parts(logits.shape[1], ctx.chunk):
            weight = (grad[:, part] / ctx.temperature).unsqueeze(-1)
            block = _scaled(logits[:, part], normaliser.dtype, ctx.temperature)
            block = torch.sub(block, normaliser[:, part, None]).exp_().mul_(-weight)
            block.scatter_add_(-1, labels[:, part, None], weight)
            grad_logits[:, part] = block.masked_fill_(weight == 0, 0)
        return grad_logits, None, None, None


class _TokenEntropy(torch.autograd.Function):
    """H = −Σ p·log p, and dH/dz = −p·(log p + H), chunk by chunk."""

    @staticmethod
    def forward(ctx, logits: Tensor, temperature: float, chunk: int) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        entropy = logits.new_empty(logits.shape[:2], dtype=dtype)
        for part in _parts(logits.shape[1], chunk):
            logp = torch.log_softmax(_scaled(logits[:, part], dtype, temperature), -1)
            p = logp.exp()
            entropy[:, part] = -p.mul_(logp).masked_fill_(logp == -torch.inf, 0).sum(-1)
        ctx.save_for_backward(logits, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        logits, entropy = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for part in _parts(logits.shape[1], ctx.chunk):
            weight = (grad[:, part] / ctx.temperature).unsqueeze(-1)
            logp = torch.log_softmax(_scaled(logits[:, part], entropy.dtype, ctx.temperature), -1)
            unchanged = (weight == 0) | (logp == -torch.inf)
            block = logp.exp().mul_(logp.add_(entropy[:, part, None])).mul_(-weight)
            grad_logits[:, part] = block.masked_fill_(unchanged, 0)
        return grad_logits, None, None


def _scaled(logits: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """May be a view of the logits themselves, so it must not be written to."""
    block = logits.to(dtype)
    return block if temperature == 1.0 else block / temperature


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _check_logits(logits: Tensor, temperature: float, chunk: int | None) -> int:
    require_dims(3, logits=logits)
    require_positive(temperature=temperature)
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, they are {logits.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be None or at least 1 position, it is {chunk}")
    return chunk or max(logits.shape[1], 1)


def _check_tokens(token_logps: Tensor, mask: Tensor) -> Tensor:
    require_dims(2, token_logps=token_logps)
    require_same_shape(token_logps=token_logps, mask=mask)
    return promote(token_logps)[0]

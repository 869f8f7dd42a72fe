"""d-PM: a preference model that learns from annotators who disagree.

A classifier q(l|x) over L vote classes is trained towards the posterior r(l|x) that follows from the votes
on x (the prior p) and from how common each class is in the batch. B answers, L classes; nats.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rayalign.maths._collectives import stack_over_ranks
from rayalign.maths._tensors import promote, require_dims, require_non_negative, require_probability, require_same_shape
from rayalign.maths.divergence import categorical_kl, jensen_shannon

DIVERGENCES = ("kl_q_r", "kl_r_q", "js")

# Stands for log 0 where a true −inf would make −inf − (−inf). exp of it is 0 in every dtype.
_LOG_ZERO = -1e30


def vote_prior(counts: Tensor, *, smoothing: float) -> Tensor:
    """p(l) = (count_l + α)/(n + αL), n the number of votes on that answer. [B, L] → [B, L], rows sum to 1.

    Args:
        counts: [B, L] votes for each class, integers or weights.
        smoothing: α of 0 or more; above 0 where an answer may have no vote.

    Raises:
        ValueError: negative or non-finite counts, negative smoothing, an answer without votes when it is 0.
    """
    require_dims(2, counts=counts)
    require_non_negative(smoothing=smoothing)
    (counts,) = promote(counts)
    if not bool((counts.ge(0) & torch.isfinite(counts)).all()):
        raise ValueError("counts must be finite and 0 or more")
    total = counts.sum(-1, keepdim=True) + smoothing * counts.shape[1]
    if not bool((total > 0).all()):
        raise ValueError("counts hold an answer without votes, which needs a smoothing above 0")
    return (counts + smoothing) / total


def batch_log_mass(log_q: Tensor, *, mask: Tensor | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """log Σ_j q(l|x_j) over the batch, or over the batches of all ranks, with its gradient. [B, L] → [L].

    Over a group every rank gets the same mass, and backward gives each the gradient of the sum of all
    ranks' losses to its own rows. Backward is a collective: every rank must run it, one without rows too.

    Args:
        log_q: [B, L] log-probabilities; B may differ between ranks and may be 0.
        mask: [B] of the rows that count; the others may hold anything.
        group: the ranks to sum over.

    Raises:
        ValueError: shapes that do not fit.
    """
    require_dims(2, log_q=log_q)
    (log_q,) = promote(log_q)
    log_q = log_q.clamp(min=_LOG_ZERO)
    if mask is not None:
        counted = _check_rows(mask, log_q)
        log_q = torch.where(counted, log_q, torch.full_like(log_q, _LOG_ZERO))
    # The sum keeps a rank without rows in the graph, so that it takes part in the others' backward.
    mine = torch.logsumexp(log_q, 0) if log_q.shape[0] else log_q.sum(0) + _LOG_ZERO
    return torch.logsumexp(stack_over_ranks(mine, group), 0)


def batch_posterior(log_q: Tensor, prior: Tensor, *, log_mass: Tensor | None = None, eps: float = 1e-9) -> Tensor:
    """log r(l|x_i) = log_softmax over l of [log q(l|x_i) − log Σ_j q(l|x_j) + log p_i(l)].

    Args:
        log_q: [B, L] log-probabilities of the classifier.
        prior: [B, L] p, clamped to at least eps.
        log_mass: [L], of `batch_log_mass` over the global batch; of these rows when it is None.
        eps: 0 lets p = 0 give r = 0 (log r = −inf).

    Returns:
        [B, L] log r, nats. With one row alone r is the prior, normalised.

    Raises:
        ValueError: shapes that do not fit, a prior outside [0, 1], a negative eps.
    """
    require_dims(2, log_q=log_q)
    require_same_shape(log_q=log_q, prior=prior)
    require_probability(prior=prior)
    require_non_negative(eps=eps)
    log_q, prior = promote(log_q, prior)
    if log_mass is None:
        log_mass = batch_log_mass(log_q)
    elif log_mass.shape != log_q.shape[1:]:
        raise ValueError(f"log_mass {tuple(log_mass.shape)} does not fit log_q {tuple(log_q.shape)}")
    evidence = log_q.clamp(min=_LOG_ZERO) - log_mass.to(log_q.dtype).clamp(min=_LOG_ZERO)
    return torch.log_softmax(evidence + prior.clamp(min=eps).log(), -1)


def posterior_divergence(log_q: Tensor, log_r: Tensor, *, divergence: str) -> Tensor:
    """How far the classifier is from the posterior: KL(q‖r), KL(r‖q) or Jensen-Shannon. [B, L] → [B], nats.

    Raises:
        ValueError: an unknown divergence, shapes that differ.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, it is {divergence!r}")
    if divergence == "kl_q_r":
        return categorical_kl(log_q, log_r)
    return categorical_kl(log_r, log_q) if divergence == "kl_r_q" else jensen_shannon(log_r, log_q)


def dpm_loss(
    logits: Tensor,
    prior: Tensor,
    *,
    divergence: str,
    detach_posterior: bool = False,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    eps: float = 1e-9,
) -> Tensor:
    """The divergence between the classifier q and the posterior r that its own batch and the votes imply.

    Args:
        logits: [B, L] of the classifier; B may differ between ranks and may be 0.
        prior: [B, L] of `vote_prior`.
        divergence: "kl_q_r", KL(q‖r) as published; "kl_r_q", KL(r‖q), what the released code trains;
            "js", the true Jensen-Shannon divergence.
        detach_posterior: False lets the gradient flow through r, as published. That form sharpens itself
            into over-confidence on real ratings; True takes r as a fixed target.
        mask: [B] of the rows that count; the others give 0 and stay out of the mass.
        group: the mass is over the rows of all its ranks (see `batch_log_mass` on backward).
        eps: the least prior of a class; 0 is not for "kl_q_r", which would be infinite.

    Returns:
        [B], nats.

    Raises:
        ValueError: an unknown divergence, shapes that do not fit, a prior outside [0, 1], eps 0 or negative.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, it is {divergence!r}")
    if divergence == "kl_q_r" and eps == 0:
        raise ValueError("eps must be above 0 for divergence 'kl_q_r'")
    require_dims(2, logits=logits)
    require_same_shape(logits=logits, prior=prior)
    logits, prior = promote(logits, prior)
    if mask is not None:
        counted = _check_rows(mask, logits)
        logits = torch.where(counted, logits, torch.zeros_like(logits))
        prior = torch.where(counted, prior, torch.full_like(prior, 1 / prior.shape[1]))
    log_q = torch.log_softmax(logits, -1)
    log_r = batch_posterior(log_q, prior, log_mass=batch_log_mass(log_q, mask=mask, group=group), eps=eps)
    losses = posterior_divergence(log_q, log_r.detach() if detach_posterior else log_r, divergence=divergence)
    return losses if mask is None else torch.where(mask != 0, losses, torch.zeros_like(losses))


def preference_score(log_q: Tensor, *, weights: Tensor) -> Tensor:
    """Σ_l q(l)·weights[l]; candidates are ranked by descending score. [B, L], [L] → [B].

    Weights [0, …, 0, −1] mean "least probability of the last, bad class first".

    Raises:
        ValueError: shapes that do not fit.
    """
    require_dims(2, log_q=log_q)
    if weights.shape != log_q.shape[1:]:
        raise ValueError(f"weights {tuple(weights.shape)} do not fit log_q {tuple(log_q.shape)}")
    log_q, weights = promote(log_q, weights.to(log_q.device))
    return (log_q.exp() * weights).sum(-1)


def fit_temperature(logits: Tensor, shares: Tensor, *, low: float = 0.05, high: float = 20.0) -> float:
    """The temperature T that is best for the votes: least mean of −Σ_l shares_l·log softmax(logits/T)_l.

    That is convex in 1/T, and found by bisection on its slope. Guo et al. 2017, section 4.2.

    Args:
        logits: [B, L] of held-out rows.
        shares: [B, L] of the votes, rows sum to 1.
        low, high: T stays within them.

    Raises:
        ValueError: no rows, shapes that differ, shares outside [0, 1], bounds that are none.
    """
    require_dims(2, logits=logits)
    require_same_shape(logits=logits, shares=shares)
    require_probability(shares=shares)
    if not len(logits) or not 0 < low < high:
        raise ValueError(f"a temperature needs rows, and bounds 0 < low < high: {len(logits)} rows, {low}, {high}")
    logits, shares = logits.detach().double(), shares.detach().double()
    logits = logits - logits.amax(-1, keepdim=True)
    wanted = (shares * logits).sum()
    cold, warm = 1.0 / low, 1.0 / high  # of 1/T
    for _ in range(60):
        middle = (cold * warm) ** 0.5
        slope = (torch.softmax(logits * middle, -1) * logits).sum() - wanted
        cold, warm = (middle, warm) if slope > 0 else (cold, middle)
    return float((cold * warm) ** -0.5)


def _check_rows(mask: Tensor, rows: Tensor) -> Tensor:
    if mask.shape != rows.shape[:1]:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit rows {tuple(rows.shape)}")
    return (mask != 0).unsqueeze(-1)

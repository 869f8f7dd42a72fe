"""Divergences between distributions: estimators from samples, and exact ones over classes. In nats.

A "KL" is reported under the name of its estimator (`kl/k1`, `kl/k3`, `kl/exact`), since they differ in
what they are good for. As a loss on the policy's own samples k2 has the gradient of the reverse KL, and
k3 (GRPO's) that of KL(π_ref‖π); k1's expected gradient is zero, so it is for rewards and metrics only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rayalign.maths._tensors import promote, require_same_shape


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d = logp − ref_logp for samples of π: unbiased for KL(π‖π_ref), may be negative. Same shape, nats.

    Source: Schulman 2020, "Approximating KL divergence".

    Raises:
        ValueError: shapes that differ.
    """
    return _log_ratio(logp, ref_logp)


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d²/2, d = logp − ref_logp for samples of π: biased, never negative. Same shape, nats.

    An infinite or NaN d stays in the value and gives no gradient, so that it can be masked afterwards.

    Source: Schulman 2020, "Approximating KL divergence".

    Raises:
        ValueError: shapes that differ.
    """
    d = _log_ratio(logp, ref_logp)
    finite, safe = _finite(d)
    return torch.where(finite, safe.square() / 2, d.abs())


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """e^{−d} − 1 + d, d = logp − ref_logp for samples of π: unbiased, never negative. Same shape, nats.

    The exponent is clamped at 20, and beyond it there is no gradient at all: that of the +d which would
    remain points away from the reference. An infinite or NaN d stays in the value without gradient.

    Source: Schulman 2020; Shao et al. 2024 (GRPO) eq. 4.

    Raises:
        ValueError: shapes that differ.
    """
    d = _log_ratio(logp, ref_logp)
    finite, safe = _finite(d)
    value = torch.expm1((-safe).clamp(max=20.0)) + safe
    value = torch.where(safe < -20.0, value.detach(), value)
    return torch.where(finite, value, d.abs())


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ_l p(l)·(log p(l) − log q(l)), exact. [..., L] → [...], nats.

    Classes with p = 0 add 0, whatever q is there; infinite where q = 0 < p.

    Raises:
        ValueError: shapes that differ.
    """
    require_same_shape(log_p=log_p, log_q=log_q)
    log_p, log_q = promote(log_p, log_q)
    # exp underflows to 0 long before log p is −inf; NaN stays in, so that it is seen.
    counted = log_p.exp() != 0
    zero = torch.zeros((), dtype=log_p.dtype, device=log_p.device)
    log_p, log_q = torch.where(counted, log_p, zero), torch.where(counted, log_q, zero)
    return torch.where(counted, log_p.exp() * (log_p - log_q), zero).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½KL(p‖m) + ½KL(q‖m), m = (p+q)/2, exact. [..., L] → [...], nats, never above ln 2.

    Source: Lin 1991, eq. 4.1 (with equal weights).

    Raises:
        ValueError: shapes that differ.
    """
    require_same_shape(log_p=log_p, log_q=log_q)
    log_p, log_q = promote(log_p, log_q)
    both_zero = (log_p == -math.inf) & (log_q == -math.inf)
    zero = torch.zeros((), dtype=log_p.dtype, device=log_p.device)
    log_m = torch.logaddexp(torch.where(both_zero, zero, log_p), torch.where(both_zero, zero, log_q)) - math.log(2)
    divergence = (categorical_kl(log_p, log_m) + categorical_kl(log_q, log_m)) / 2
    return divergence.clamp(max=_ln2_below(divergence.dtype))


def _log_ratio(logp: Tensor, ref_logp: Tensor) -> Tensor:
    require_same_shape(logp=logp, ref_logp=ref_logp)
    logp, ref_logp = promote(logp, ref_logp)
    return logp - ref_logp


def _finite(d: Tensor) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(d)
    return finite, torch.where(finite, d, torch.zeros_like(d))


def _ln2_below(dtype: torch.dtype) -> float:
    """The largest number of this dtype that is not above ln 2: float32 rounds ln 2 up."""
    bound = torch.tensor(math.log(2), dtype=dtype)
    return float(bound if float(bound) <= math.log(2) else torch.nextafter(bound, torch.zeros_like(bound)))

"""KTO: answers that are each good or bad, against a reference point. Imported through `preference`.

B answers. Log-probs are sums over an answer's tokens, in nats. `kto_reference_point` and `kto_pair_loss` take all
answers of a step at once. A learner has them in micro-batches: `algorithms.kto` adds up the same sums and counts in a
pass before, and gives `kto_loss` the points.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rayalign.maths._collectives import sum_over_ranks
from rayalign.maths._tensors import divide, promote, require_non_negative, require_positive, require_same_shape


def kto_reference_point(policy_kl: Tensor, ref_kl: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """z = max(0, mean(policy_kl − ref_kl)) over mismatched pairs (x_i, y_{i+1}), detached. [M], [M] → scalar.

    Args:
        policy_kl: [M] log π(y_{i+1}|x_i); M may differ between ranks, and may be 0.
        ref_kl: [M] log π_ref(y_{i+1}|x_i).
        group: sum and count are pooled over its ranks before the max.

    Source: Ethayarajh et al. 2024 (KTO) section 4.1.

    Raises:
        ValueError: shapes that differ.
    """
    require_same_shape(policy_kl=policy_kl, ref_kl=ref_kl)
    policy_kl, ref_kl = promote(policy_kl.detach(), ref_kl.detach())
    return _pooled_mean(policy_kl - ref_kl, group).clamp(min=0)


def kto_loss(
    policy: Tensor,
    ref: Tensor,
    desirable: Tensor,
    *,
    z_ref: float | Tensor,
    beta: float,
    weight_desirable: float = 1.0,
    weight_undesirable: float = 1.0,
) -> Tensor:
    """λ_D(1 − σ(β(d − z))) if desirable, else λ_U(1 − σ(β(z − d))), d = policy − ref. Three [B] → [B].

    Args:
        policy: [B] log π(y|x).
        ref: [B] log π_ref(y|x).
        desirable: [B] bool.
        z_ref: of `kto_reference_point`; no gradient goes into it.

    Source: Ethayarajh et al. 2024 (KTO) eq. 8.

    Raises:
        ValueError: beta not above 0, a negative weight, shapes that differ, desirable of a floating dtype.
    """
    require_positive(beta=beta)
    require_non_negative(weight_desirable=weight_desirable, weight_undesirable=weight_undesirable)
    require_same_shape(policy=policy, ref=ref, desirable=desirable)
    if desirable.is_floating_point():
        raise ValueError(f"desirable must be bool, it is {desirable.dtype}")
    policy, ref = promote(policy, ref)
    z = torch.as_tensor(z_ref, dtype=policy.dtype, device=policy.device).detach()
    lead = beta * (policy - ref - z)
    # 1 − σ(x) is σ(−x), which keeps its digits where σ(x) has become 1.
    return torch.where(
        desirable.bool(), weight_desirable * torch.sigmoid(-lead), weight_undesirable * torch.sigmoid(lead)
    )


def kto_pair_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The paired variant of KTO: each half's reference point is the other half's mean log-ratio. Four [B] → [2B].

    The chosen half comes first. A chosen answer's z is max(0, mean of the rejected d), the other way round
    for a rejected one; both detached, the means over all ranks of the group.

    Source: the paired loss of the first KTO code (Ethayarajh et al. 2023); `kto_loss` is the official one.

    Raises:
        ValueError: beta not above 0, shapes that differ.
    """
    require_positive(beta=beta)
    require_same_shape(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = promote(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected
    )
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    z_chosen = _pooled_mean(chosen.detach(), group).clamp(min=0)
    z_rejected = _pooled_mean(rejected.detach(), group).clamp(min=0)
    return torch.cat([torch.sigmoid(-beta * (chosen - z_rejected)), torch.sigmoid(-beta * (z_chosen - rejected))])


def _pooled_mean(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean over the elements of all ranks, in x's dtype; 0 where there are none."""
    total = torch.stack([x.double().sum(), torch.tensor(float(x.numel()), dtype=torch.float64, device=x.device)])
    total = sum_over_ranks(total, group)
    return divide(total[0], total[1]).to(x.dtype)

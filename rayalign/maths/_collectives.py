"""Two sums over ranks that carry gradients: the gradient of the sum of all ranks' losses.

Every rank of the group must make the same calls, and run backward where any of them does, or the
others wait. Ranks may hold different numbers of rows, none included.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Σ over ranks of x (same shape everywhere), differentiable. Without a group: x itself."""
    return x if group is None else _SumOverRanks.apply(x, group)


def stack_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, *x.shape], differentiable: each rank's own gradient is summed over all ranks' losses."""
    return x.unsqueeze(0) if group is None else _StackOverRanks.apply(x, group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.detach().clone().contiguous()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad.clone().contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _StackOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        mine = x.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad.clone().contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None

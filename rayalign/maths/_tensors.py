"""What the maths modules share: argument checks, float32 promotion, masked sums, safe division."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def promote(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one common floating dtype, float32 at least; float64 stays float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def require_dims(dims: int, **tensors: Tensor) -> None:
    """Raise ValueError for a tensor with another number of dimensions."""
    for name, tensor in tensors.items():
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimension(s), its shape is {tuple(tensor.shape)}")


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, with all shapes, unless they are equal: broadcasting would hide a mistake."""
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must be the same: {shapes}")


def require_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number above 0, it is {value}")


def require_non_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, it is {value}")


def require_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, it is {value}")


def require_probability(**values: float | Tensor) -> None:
    """Raise ValueError unless every number lies in [0, 1]; NaN does not."""
    for name, value in values.items():
        inside = torch.as_tensor(value).ge(0) & torch.as_tensor(value).le(1)
        if not bool(inside.all()):
            raise ValueError(f"{name} must lie in [0, 1], it holds {_first_outside(value, inside)}")


def require_no_nan(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if bool(torch.isnan(tensor).any()):
            raise ValueError(f"{name} holds NaN")


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """x·mask, with an exact 0 and zero gradient where the mask is 0, whatever x holds there.

    A multiplication alone would turn a masked NaN or infinity into NaN.
    """
    counted = mask != 0
    kept = torch.where(counted, x, torch.zeros((), dtype=x.dtype, device=x.device))
    return kept if mask.dtype == torch.bool else kept * mask.to(kept.dtype)


def count(mask: Tensor, dim: int | None = None, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Σ mask, never in a 16-bit dtype, where counts above 256 would be rounded."""
    return mask.sum(dtype=dtype) if dim is None else mask.sum(dim, dtype=dtype)


def divide(total: Tensor, count: Tensor | float) -> Tensor:
    """total/count, and 0 with zero gradient where the count is 0."""
    count = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    empty = count == 0
    quotient = total / torch.where(empty, torch.ones_like(count), count)
    return torch.where(empty, torch.zeros_like(quotient), quotient)


def clamped_exp(x: Tensor, limit: float = 20.0) -> Tensor:
    """exp(min(x, limit)), with zero gradient beyond the limit, and for NaN (the value stays NaN).

    The inner `where` keeps a masked NaN out of the gradient: 0·NaN is NaN.
    """
    unknown = torch.isnan(x)
    result = torch.exp(torch.where(unknown, torch.zeros_like(x), x).clamp(max=limit))
    return torch.where(unknown, torch.full_like(result, math.nan), result)


def _first_outside(value: float | Tensor, inside: Tensor) -> float:
    return float(torch.as_tensor(value)[~inside].flatten()[0])

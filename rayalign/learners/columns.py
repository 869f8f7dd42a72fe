"""From hidden states to columns: the output head and what is read off its logits, some positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rayalign.errors import ConfigError
from rayalign.maths.cringe import label_and_top
from rayalign.maths.logprobs import token_entropy, token_logprobs
from rayalign.types import AnyColumn, Column, TopLogits


@dataclass(frozen=True)
class Teacher:
    """What the reference's next-token distributions are made from, at the completion tokens of a micro-batch.

    Attributes:
        hidden: [N, H'] its last hidden states.
        weight, bias: of its output head, [V, H'] and [V]; whole, also where the parameters are partitioned.
        scale: what its architecture does to logits after the head.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Callable[[Tensor], Tensor]


class ColumnHead(nn.Module):
    """The output head, from hidden states to columns, some positions at a time.

    It holds the parameters of the model's own head (tied to the embeddings or not) and is called once a forward
    pass, whatever the number of positions: ZeRO-3 gathers parameters once a call of a module, on all ranks
    together, and ranks differ in positions.
    """

    def __init__(self, linear: nn.Linear, scale: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] → [N, V]."""
        return self.scale(nn.functional.linear(hidden, self.weight, self.bias))

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        columns: tuple[AnyColumn, ...],
        temperature: float,
        chunk: int,
        teacher: Teacher | None = None,
        teaching: bool = False,
    ):
        """hidden [N, H] and labels [N] → for each column [N, …].

        With `teaching` instead the head itself, (weight, bias): ZeRO-3 has them whole only in here.
        """
        if teaching:
            return tuple(None if each is None else _kept(each) for each in (self.weight, self.bias))

        def compute(hidden: Tensor, labels: Tensor, taught: Tensor | None) -> tuple[Tensor, ...]:
            logits = self.logits(hidden)  # [n, V]
            return tuple(_column(column, logits, labels, temperature, taught, teacher) for column in columns)

        taught = [None] * max(1, -(-len(hidden) // chunk)) if teacher is None else teacher.hidden.split(chunk)
        parts = list(zip(hidden.split(chunk), labels.split(chunk), taught, strict=True))
        if torch.is_grad_enabled() and (len(parts) > 1 or teacher is not None):
            # Not re-entrant: that kind would add to the gradient of the head once a chunk, which ZeRO-3 refuses.
            pieces = [checkpoint(compute, *part, use_reentrant=False) for part in parts]
        else:
            pieces = [compute(*part) for part in parts]
        return tuple(torch.cat(column) for column in zip(*pieces, strict=True))


def _kept(parameter: Tensor) -> Tensor:
    """A partitioned parameter is whole for the time of a call only; any other stays as it is."""
    return parameter.detach().clone() if hasattr(parameter, "ds_id") else parameter.detach()


def _column(
    column: AnyColumn,
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    taught: Tensor | None,
    teacher: Teacher | None,
) -> Tensor:
    """[n, V] logits → [n, …], float32 at least."""
    if column is Column.LOGPS:
        return token_logprobs(logits.unsqueeze(0), labels.unsqueeze(0), temperature=temperature)[0]
    if column is Column.ENTROPY:
        return token_entropy(logits.unsqueeze(0), temperature=temperature)[0]
    if column is Column.REFERENCE_KL and teacher is not None:
        with torch.no_grad():
            wanted = teacher.scale(nn.functional.linear(taught, teacher.weight, teacher.bias))
        return reference_kl(logits, wanted, temperature=temperature)
    if isinstance(column, TopLogits):
        return top_logits(logits, labels, column.k, temperature=temperature)
    raise refused("a language model", column)


def refused(what: str, column: AnyColumn) -> ConfigError:
    return ConfigError(
        f"{what} has no such column",
        value=column.value,
        rule="values, state_values and classes come from a score network (state_values also from a language model with "
        "a value head); logps, entropy, top_logits and reference_kl from a language model",
        remedy="set the network of the algorithm to the kind that has it",
    )


def top_logits(logits: Tensor, labels: Tensor, k: int, *, temperature: float = 1.0) -> Tensor:
    """The logit of each label, then the k largest of the other tokens, largest first; all divided by temperature.

    Args:
        logits: [N, V].
        labels: [N].
        k: from 1 to V − 1.

    Returns:
        [N, 1 + k], float32 at least.

    Raises:
        ConfigError: k out of range.
    """
    if not 1 <= k < logits.shape[-1]:
        raise ConfigError(
            "so many top logits cannot be had",
            value=k,
            rule=f"from 1 to {logits.shape[-1] - 1}, the size of the vocabulary without one",
            remedy="lower the algorithm's top_k",
        )
    own, top = label_and_top(logits, labels, k)
    return torch.cat([own.unsqueeze(-1), top], -1) / temperature


def reference_kl(logits: Tensor, reference: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Exact KL(π_ref‖π) of next-token distributions, with gradient into the policy's logits only.

    Args:
        logits, reference: [N, V] of policy and reference.

    Returns:
        [N] in nats, float32 at least.
    """
    return _ReferenceKL.apply(logits, reference, float(temperature))


class _ReferenceKL(torch.autograd.Function):
    """Forward: Σ p·(log p − log q). Backward: (q − p)/temperature."""

    @staticmethod
    def forward(ctx, logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        ctx.save_for_backward(logits, reference)
        ctx.temperature, ctx.dtype = temperature, dtype
        log_p = torch.log_softmax(reference.to(dtype) / temperature, -1)
        p, nothing = log_p.exp(), log_p == -torch.inf
        difference = log_p.sub_(torch.log_softmax(logits.to(dtype) / temperature, -1))
        return p.mul_(difference).masked_fill_(nothing, 0).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        logits, reference = ctx.saved_tensors
        weight = (grad / ctx.temperature).unsqueeze(-1)
        block = torch.softmax(logits.to(ctx.dtype) / ctx.temperature, -1)
        block.sub_(torch.softmax(reference.to(ctx.dtype) / ctx.temperature, -1)).mul_(weight)
        return block.masked_fill_(weight == 0, 0).to(logits.dtype), None, None


def scattered(keep: Tensor, numbers: Sequence[Tensor]) -> list[Tensor]:
    """[N, …] numbers of the places where keep [R, T] is true → [R, T, …] float32, 0 elsewhere."""
    found = []
    for each in numbers:
        trailing = each.shape[1:]
        empty = torch.zeros(*keep.shape, *trailing, dtype=torch.float32, device=keep.device)
        found.append(empty.masked_scatter(keep.reshape(*keep.shape, *(1 for _ in trailing)), each.float()))
    return found

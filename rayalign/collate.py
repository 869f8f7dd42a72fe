"""Examples → one padded Batch. Masks are carried from the lengths, never inferred from a pad id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayalign.errors import DataError
from rayalign.types import Batch, Example
from rayalign.types import Sequence as Row


def collate(examples: Sequence[Example], *, pad_id: int, weight: Sequence[float] | None = None) -> Batch:
    """Pad examples on the right into one batch.

    Args:
        examples: B examples with the same number of rows n each.
        pad_id: what stands in `input_ids` and `labels` where there is no token (any valid id, the end token too).
        weight: [B], 1.0 for a real example and 0.0 for one that only keeps ranks in step. Default: all 1.0. What an
            example counts is this times the trust in the row that is trusted least.

    Returns:
        A Batch of R = B·n rows. Padding holds 0 in `columns` and NaN in `rollout_logps`.

    Raises:
        DataError: a row without prompt or completion, or numbers a token that are not one a token.
        ValueError: no examples, examples with different numbers of rows, or with different columns or values; a
            value that is neither one number nor one a row.
    """
    if not examples:
        raise ValueError("collate needs at least one example")
    rows = [row for example in examples for row in example.sequences]
    per_example = len(examples[0].sequences)
    if any(len(example.sequences) != per_example for example in examples):
        counts = sorted({len(example.sequences) for example in examples})
        raise ValueError(f"examples of one batch must have the same number of rows, found {counts}")
    real = [1.0] * len(examples) if weight is None else list(weight)
    if len(real) != len(examples):
        raise ValueError(f"weight has {len(real)} entries for {len(examples)} examples")
    for row in rows:
        check_row(row)
    width, steps = max(map(len, rows)), max(len(row.completion_ids) for row in rows)
    positions = np.zeros((len(rows), steps), dtype=np.int64)
    for index, row in enumerate(rows):
        # The logits at position i predict token i + 1: the last prompt token predicts the first label.
        start, count = len(row.prompt_ids) - 1, len(row.completion_ids)
        positions[index, :count] = np.arange(start, start + count)
    return Batch(
        input_ids=_pad([row.prompt_ids + row.completion_ids for row in rows], width, pad_id, np.int64),
        attention_mask=_pad([np.ones(len(row)) for row in rows], width, 0, np.int64),
        labels=_pad([row.completion_ids for row in rows], steps, pad_id, np.int64),
        positions=torch.from_numpy(positions),
        mask=_pad([np.ones(len(row.completion_ids)) for row in rows], steps, 0, np.int64),
        rollout_logps=_pad([row.rollout_logps for row in rows], steps, np.nan, np.float32),
        columns={name: _pad([row.columns[name] for row in rows], steps, 0.0, np.float32) for name in _columns(rows)},
        values={name: _values(examples, name) for name in _value_names(examples)},
        weight=torch.tensor([w * min(row.trust for row in e.sequences) for w, e in zip(real, examples, strict=True)]),
        rows=per_example,
        images=tuple(row.images for row in rows) if any(row.images for row in rows) else (),
    )


def check_row(row: Row) -> None:
    """Raises DataError when a row has no prompt, no completion, or numbers that are not one a token."""
    if not row.prompt_ids:
        raise DataError("a prompt has no tokens", rule="at least one prompt token predicts the first completion token")
    if not row.completion_ids:
        raise DataError("a completion has no tokens", rule="a completion has at least one token (the end token counts)")
    count = len(row.completion_ids)
    if row.rollout_logps and len(row.rollout_logps) != count:
        raise DataError(
            "rollout log-probs do not match the completion",
            value=len(row.rollout_logps),
            rule=f"one number a completion token, {count} here",
        )
    for name, numbers in row.columns.items():
        if np.shape(numbers)[:1] != (count,):
            raise DataError(
                f"column {name} does not match the completion",
                value=np.shape(numbers),
                rule=f"one number (or one row of them) a completion token, {count} here",
            )


def _pad(lists: Sequence, width: int, fill: float, dtype: type) -> torch.Tensor:
    """[R] lists of numbers, or of rows of numbers → [R, width, …]."""
    trailing = np.shape(lists[0])[1:]
    out = np.full((len(lists), width, *trailing), fill, dtype=dtype)
    for index, numbers in enumerate(lists):
        out[index, : len(numbers)] = numbers
    return torch.from_numpy(out)


def _columns(rows: Sequence[Row]) -> list[str]:
    names = set(rows[0].columns)
    for row in rows:
        if set(row.columns) != names:
            raise ValueError(f"rows of one batch have different columns: {sorted(names)} and {sorted(row.columns)}")
    return sorted(names)


def _value_names(examples: Sequence[Example]) -> list[str]:
    names = set(examples[0].values)
    for example in examples:
        if set(example.values) != names:
            raise ValueError(f"examples have different values: {sorted(names)} and {sorted(example.values)}")
    return sorted(names)


def _values(examples: Sequence[Example], name: str) -> torch.Tensor:
    """[B], or [B, n] where a value is one number a row."""
    shapes = {np.shape(example.values[name]) for example in examples}
    if len(shapes) > 1 or shapes - {(), (len(examples[0].sequences),)}:
        raise ValueError(f"value {name} must be one number an example, or one a row, found shapes {sorted(shapes)}")
    return torch.from_numpy(np.array([example.values[name] for example in examples], dtype=np.float32))

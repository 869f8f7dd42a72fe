"""What the ranks of a role found, put together; and terms of a loss, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rayalign.types import Batch, Example, Metrics, Terms

Annotation = tuple[int, tuple[dict[str, np.ndarray], ...]]  # index of an example, new columns of each of its rows
StepMetrics = tuple[dict[str, float], dict[str, float]]  # partial sums, and what is the same on all ranks


def merge_annotations(examples: Sequence[Example], shards: Sequence[Sequence[Annotation]]) -> list[Example]:
    """Examples with the columns that the ranks computed, in their own order.

    Raises:
        ValueError: an example that no rank annotated.
    """
    found = {index: columns for shard in shards for index, columns in shard}
    if len(found) != len(examples):
        raise ValueError(f"{len(examples)} examples, but columns for {len(found)}")
    merged = []
    for index, example in enumerate(examples):
        rows = (
            replace(row, columns={**row.columns, **new})
            for row, new in zip(example.sequences, found[index], strict=True)
        )
        merged.append(replace(example, sequences=tuple(rows)))
    return merged


def merge_metrics(ranks: Sequence[StepMetrics]) -> Metrics:
    """One record from what `update_shard` gave on each rank: sums are added, the rest is the first rank's."""
    merged: Metrics = {}
    for summed, _ in ranks:
        for name, value in summed.items():
            merged[name] = merged.get(name, 0.0) + value
    return {**merged, **ranks[0][1]}


def weighted_sum(terms: Terms, batch: Batch) -> Tensor:
    """Sum of the terms times the weight of their examples, in float32: a scalar with its gradient.

    Raises:
        ValueError: a loss that is neither [B] nor [R, T].
    """
    weight, loss = batch.weight, terms.loss.float()
    if loss.shape == batch.labels.shape:
        weight = weight.repeat_interleave(batch.rows).unsqueeze(1)
    elif loss.shape != weight.shape:
        raise ValueError(
            f"a loss is [B] = {tuple(weight.shape)} or [R, T] = {tuple(batch.labels.shape)}, "
            f"this one is {tuple(loss.shape)}"
        )
    return torch.where(weight > 0, loss * weight, 0.0).sum()

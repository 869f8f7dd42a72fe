"""Weights between actors through Ray's object store: shared memory on a node, the network between nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import ray

from rayalign.protocols import WeightPush


def put_chunk(array: np.ndarray) -> Any:
    """A handle that other actors resolve; on the same node without a copy."""
    return ray.put(array)


def resolve_push(push: WeightPush) -> WeightPush:
    """The same push with its bytes at hand. Called in the process that loads it."""
    arrays = ray.get([chunk.data for chunk in push.chunks])
    return replace(push, chunks=tuple(replace(c, data=a) for c, a in zip(push.chunks, arrays, strict=True)))

"""Where metrics go besides metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rayalign.record import Record

TRACKERS = {"tensorboard": "rayalign.trackers:TensorBoard"}


class TensorBoard(Record):
    """Event files in the run directory's folder tensorboard/."""

    name: Literal["tensorboard"] = "tensorboard"

    def start(self, run_dir: Path, first_step: int) -> TensorBoardTracker:
        return TensorBoardTracker(run_dir / "tensorboard", first_step)


class TensorBoardTracker:
    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()

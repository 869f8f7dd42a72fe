"""Preference optimisation on answers about images: also on what the same answer owes to the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from rayalign.algorithms.base import Regularised
from rayalign.algorithms.groups import paired, row
from rayalign.algorithms.preference import pair_metrics, pair_of
from rayalign.maths.preference import dpo_loss, mdpo_loss
from rayalign.types import Batch, Column, Example, Group, Metrics, Terms
from rayalign.types import Sequence as Row

ASPECT = 4 / 3  # of a crop, against that of the whole image, at most; and 3 / 4 at least
Box = tuple[float, float, float, float]


class MDPO(Regularised):
    """Multimodal DPO: pairs of answers, the chosen answer with its image and with a crop of it, and an anchor."""

    paper: ClassVar = "Wang et al. 2024, arXiv:2406.11839"
    rows: ClassVar = ("pair", "ranked")
    images: ClassVar = True
    by_row: ClassVar = True
    needs: ClassVar = (("reference", Column.LOGPS),)

    name: Literal["mdpo"] = "mdpo"
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    anchor: float = Field(0.0, description="what the chosen answer's β·log(π/π_ref) is kept above")
    crop: float = Field(0.2, gt=0, le=1, description="largest share of an image that a crop of it keeps; smallest: 0")
    crop_seed: int = Field(0, ge=0, lt=2**31, description="with a row's number: its crops, the same in each epoch")
    nll_weight: float = Field(0.0, ge=0, description="adds the chosen answer's mean negative log-likelihood")
    pairs: Literal["best_worst", "all"] = Field("all", description="which pairs of ranked answers are trained on")

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """Examples of three rows: chosen, rejected, and the chosen answer to crops of the images. What
        `groups.paired` leaves out, and pairs without an image, are counted in pairs/dropped."""
        examples, (pairs, metrics) = [], paired(groups, self.pairs)
        for group, better, worse in pairs:
            if group.prompt.images:
                chosen = row(group, better)
                examples.append(Example((chosen, row(group, worse), self._cropped(chosen, group.prompt.index))))
        metrics["pairs/dropped"] += len(pairs) - len(examples)
        return examples, {**metrics, "pairs/kept": float(len(examples))}

    def _cropped(self, chosen: Row, index: int) -> Row:
        """The same tokens; of each image a part, as large as the whole was, so that it has as many tokens."""
        boxes = crops(len(chosen.images), self.crop, seed=(self.crop_seed, index))
        images = (replace(image, box=box) for image, box in zip(chosen.images, boxes, strict=True))
        return replace(chosen, images=tuple(images))

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        pair = pair_of(batch, columns)
        chosen, rejected, cropped = pair.ratio.unbind(1)
        gap, image_gap = chosen - rejected, chosen - cropped
        loss = mdpo_loss(gap, image_gap, chosen, beta=self.beta, anchor=self.anchor)
        if self.nll_weight:
            loss = loss - self.nll_weight * pair.means[:, 0]
        metrics = {
            **pair_metrics(pair, self.beta * pair.ratio),
            "rewards/cropped": self.beta * cropped,
            "rewards/image_margins": self.beta * image_gap,
            "rewards/image_accuracies": (image_gap > 0).to(gap.dtype),
            "logps/cropped": pair.policy[:, 2],
            "loss/answers": dpo_loss(gap, beta=self.beta),
            "loss/images": dpo_loss(image_gap, beta=self.beta),
        }
        terms = Terms(loss, {name: value.detach() for name, value in metrics.items()})
        return self.regularised(terms, batch, columns, rows=2)


def crops(count: int, largest: float, *, seed: Sequence[int]) -> list[Box]:
    """Random parts of images, as shares of width and height.

    Args:
        largest: share of the area that is kept at most; it is drawn evenly between 0 and this.
        seed: all that they depend on.
    """
    random, found = np.random.default_rng(list(seed)), []
    for _ in range(count):
        area = random.uniform(0.0, largest)
        aspect = math.exp(random.uniform(-math.log(ASPECT), math.log(ASPECT)))
        width, height = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
        left, top = random.uniform(0.0, 1.0 - width), random.uniform(0.0, 1.0 - height)
        found.append((left, top, left + width, top + height))
    return found

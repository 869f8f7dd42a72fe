"""Groups with images, and what the plain models of transformers say of the rows that come of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from rayalign.learners.vision import decoded
from rayalign.types import Completion, Example, Group, Prompt
from tests.tiny_vision import IMAGE_ID, picture


def group(index: int, images: int = 1, scores: Sequence[float] = (1.0, 0.0)) -> Group:
    """A prompt about some images, with answers of different lengths."""
    rng = random.Random(index)
    pictures = tuple(picture(10 * index + place) for place in range(images))
    prompt = [rng.randrange(10, 150), *[IMAGE_ID] * (4 * images), rng.randrange(10, 150)]
    answers = [tuple(rng.randrange(10, 150) for _ in range(rng.randint(2, 5))) for _ in scores]
    completions = tuple(Completion(f"{index}/{k}", (*ids, 1), (), "stop", -1) for k, ids in enumerate(answers))
    return Group(
        f"0/0/{index}",
        Prompt(index, "what is it", tuple(prompt), images=pictures),
        completions,
        ("x",) * len(scores),
        scores=tuple(scores),
    )


@torch.no_grad()
def plain_logps(folder: Path, example: Example) -> list[float]:
    """Of each row's completion, summed over its tokens, by the whole model on this row alone."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for row in example.sequences:
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        images = [decoded(each) for each in row.images]
        pixels = processor.image_processor(images=images, return_tensors="pt") if images else {}
        logps = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits[0].log_softmax(-1)
        start = len(row.prompt_ids) - 1
        found.append(float(logps[start:-1].gather(1, torch.tensor(row.completion_ids)[:, None]).sum()))
    return found

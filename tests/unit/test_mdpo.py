"""mDPO: its rows and crops, and its loss against log-probs of plain transformers put together by hand."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rayalign.algorithms.cringe import Cringe
from rayalign.algorithms.kto import KTO
from rayalign.algorithms.mdpo import MDPO, crops
from rayalign.algorithms.preference import Preference
from rayalign.algorithms.sft import SFT
from rayalign.learners.base import LearnerSpec, OptimizerConfig
from rayalign.learners.torch import TorchLearnerConfig
from rayalign.protocols import UpdatePlan, needs_reference
from rayalign.types import Column, Picture
from tests.tiny_vision import build_tiny_llava, png
from tests.vision_cases import group, plain_logps


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return build_tiny_llava(folder / "policy"), build_tiny_llava(folder / "reference", seed=3)


def build(models, algorithm, **settings):
    config = TorchLearnerConfig(dtype="float32", threads=1, **settings)
    common = dict(settings=config, total_steps=9)
    specs = [LearnerSpec("policy", str(models[0]), optimizer=OptimizerConfig(lr=1e-3), **common)]
    if needs_reference(algorithm):
        specs.append(LearnerSpec("reference", str(models[1]), trainable=False, **common))
    return config.build(specs, rank=0, world_size=1, address=("", 0))


def prepared(roles, algorithm, groups):
    examples, _ = algorithm.examples(groups)
    for role, column in algorithm.needs:
        examples = roles[role].annotate(examples, (column,))
    return examples


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def test_rows_are_chosen_rejected_and_chosen_with_crops():
    groups = [group(0), group(1, images=2)]
    examples, metrics = MDPO(crop_seed=7).examples(groups)
    assert metrics == {"pairs/kept": 2.0, "pairs/dropped": 0.0, "pairs/same_answer": 0.0}
    for each, example in zip(groups, examples, strict=True):
        chosen, rejected, cropped = example.sequences
        assert chosen.images == rejected.images == each.prompt.images
        assert cropped.completion_ids == chosen.completion_ids == each.completions[0].token_ids
        assert cropped.prompt_ids == chosen.prompt_ids
        for part, whole in zip(cropped.images, each.prompt.images, strict=True):
            assert part.data is whole.data and part.size == whole.size and part.box is not None
    assert len({part.box for example in examples for part in example.sequences[2].images}) == 3


def test_an_image_travels_once_and_as_its_file(tmp_path):
    """Pickled, as they go to other processes, the rows of an example share the bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = Picture(png(Image.fromarray(noise)), (64, 64))
    base = group(0)
    shown = replace(base, prompt=replace(base.prompt, images=(whole,)))
    examples, _ = MDPO().examples([shown])
    assert len(whole.data) > 10_000 and len(pickle.dumps(examples)) < 1.1 * len(whole.data)
    again = pickle.loads(pickle.dumps(examples))
    assert again == examples and len({id(row.images[0].data) for row in again[0].sequences}) == 1


def test_crops_are_those_of_the_seed_and_the_row():
    boxes = [MDPO(crop_seed=seed).examples([group(row)])[0][0].sequences[2].images[0].box for seed, row in SEEDS]
    assert boxes[0] == boxes[1] and len(set(boxes)) == 3


SEEDS = [(0, 1), (0, 1), (0, 2), (1, 1)]


def test_crops_keep_what_was_asked_for():
    found = np.array([crops(1, 0.2, seed=(0, row))[0] for row in range(4000)])
    assert found.min() >= 0 and found.max() <= 1
    width, height = found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]
    area = width * height
    assert area.min() > 0 and area.max() <= 0.2 + 1e-9
    assert abs(area.mean() - 0.1) < 0.005  # drawn evenly
    assert (width / height).min() >= 0.75 - 1e-9 and (width / height).max() <= 4 / 3 + 1e-9
    assert abs(found.mean(0) - (1 - found.mean(0)[[2, 3, 0, 1]])).max() < 0.02  # anywhere
    assert np.array([crops(1, 1.0, seed=(0, row))[0] for row in range(100)]).max() <= 1


def test_pairs_without_an_image_are_dropped_and_counted():
    examples, metrics = MDPO().examples([group(0, images=0), group(1), group(2, scores=(1.0, 1.0))])
    assert len(examples) == 1 and (metrics["pairs/kept"], metrics["pairs/dropped"]) == (1.0, 2.0)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.5, "anchor": 0.3, "nll_weight": 0.2, "crop": 0.05}])
def test_the_loss_is_that_of_plain_log_probs(models, settings):
    algorithm = MDPO(**settings)
    roles = build(models, algorithm, micro_batch_tokens=40)  # several micro-batches
    examples = prepared(roles, algorithm, [group(0), group(1, images=2), group(2)])
    want, image_gaps = [], []
    for example in examples:
        ratios = np.subtract(*(plain_logps(folder, example) for folder in models))
        beta = algorithm.beta
        terms = beta * np.array([ratios[0] - ratios[1], ratios[0] - ratios[2]])
        loss = sum(softplus(-term) for term in terms) + softplus(-(beta * ratios[0] - algorithm.anchor))
        chosen = example.sequences[0].completion_ids
        loss -= algorithm.nll_weight * plain_logps(models[0], example)[0] / len(chosen)
        want.append(loss)
        image_gaps.append(terms[1])
    found = roles["policy"].measure(examples, algorithm)
    assert found["loss"] == pytest.approx(np.mean(want), abs=2e-4)
    assert found["rewards/image_margins"] == pytest.approx(np.mean(image_gaps), abs=2e-4)
    assert np.ptp(image_gaps) > 1e-3


def test_training_moves_both_gaps(models):
    algorithm = MDPO()
    roles = build(models, algorithm)
    examples = prepared(roles, algorithm, [group(row) for row in range(4)])
    found = [roles["policy"].update(examples, algorithm, UpdatePlan(step=step)) for step in range(8)]
    for name in ("rewards/margins", "rewards/image_margins"):
        assert found[-1][name] > found[0][name] + 0.1
    assert found[-1]["loss"] < found[0]["loss"]


def test_the_kl_is_that_of_the_rows_with_the_whole_image(models):
    algorithm = MDPO(kl_weight=0.1)
    roles = build(models, algorithm)
    examples = prepared(roles, algorithm, [group(0), group(1, images=2)])
    found = roles["policy"].measure(examples, algorithm)
    column = [e.sequences for e in roles["policy"].annotate(examples, (Column.REFERENCE_KL,))]
    want = np.mean([sum(row.columns["policy/reference_kl"].sum() for row in rows[:2]) for rows in column])
    assert found["kl/exact"] == pytest.approx(want, rel=1e-4) and want > 0.1


@pytest.mark.parametrize("algorithm", [KTO(), Cringe(top_k=3)], ids=lambda each: each.name)
def test_objectives_on_answers_see_images(models, algorithm):
    roles = build(models, algorithm)
    examples = prepared(roles, algorithm, [group(0), group(1, images=2), group(2)])
    found = [roles["policy"].update(examples, algorithm, UpdatePlan(step=step))["loss"] for step in range(4)]
    assert found[-1] < found[0]
    if algorithm.name == "kto":  # another prompt's answer, to the images of this one
        for example in examples:
            own, mismatched = example.sequences
            assert mismatched.images == own.images and mismatched.prompt_ids == own.prompt_ids
            assert mismatched.completion_ids != own.completion_ids


@pytest.mark.parametrize("algorithm", [Preference(), SFT()], ids=lambda each: each.name)
def test_other_objectives_see_images(models, algorithm):
    """DPO and SFT, rows with one image, two, or none in one step: as plain log-probs say."""
    roles = build(models, algorithm, micro_batch_tokens=40)
    examples = prepared(roles, algorithm, [group(0), group(1, images=2), group(2, images=0)])
    logps = [[plain_logps(folder, example) for folder in models] for example in examples]
    found = roles["policy"].measure(examples, algorithm)
    if algorithm.name == "preference":
        gaps = [policy[0] - policy[1] - reference[0] + reference[1] for policy, reference in logps]
        assert found["loss"] == pytest.approx(np.mean([softplus(-0.1 * gap) for gap in gaps]), abs=2e-4)
    else:
        tokens = sum(len(example.sequences[0].completion_ids) for example in examples)
        assert found["loss"] == pytest.approx(-sum(policy[0] for policy, _ in logps) / tokens, abs=2e-4)
    before = found["loss"]
    roles["policy"].update(examples, algorithm, UpdatePlan(step=0))
    assert roles["policy"].measure(examples, algorithm)["loss"] < before

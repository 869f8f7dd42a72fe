"""The columns of VisionPolicy against the plain model of transformers on tokens and pixels, row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rayalign.collate import collate
from rayalign.errors import ConfigError
from rayalign.learners.base import LearnerSpec, OptimizerConfig
from rayalign.learners.models import CausalPolicy
from rayalign.learners.score import load_network
from rayalign.learners.settings import LearnerSettings
from rayalign.learners.vision import VisionPolicy, decoded
from rayalign.types import Column, Example, Sequence
from tests.tiny_models import build_tiny_llama
from tests.tiny_vision import IMAGE_ID, build_tiny_llava, build_tiny_qwen2_vl, picture

# Tokens of an image: llava sees 16×16 as 2×2 patches of 8; qwen2-vl 28×28 as 4×4 patches of 7, merged by fours.
TOKENS = {"llava": lambda size: 4, "qwen2_vl": lambda size: (size[0] // 14) * (size[1] // 14)}
BUILD = {"llava": build_tiny_llava, "qwen2_vl": build_tiny_qwen2_vl}


@pytest.fixture(scope="module", params=BUILD)
def model(request, tmp_path_factory):
    return request.param, BUILD[request.param](tmp_path_factory.mktemp(request.param))


def load(folder, **settings):
    torch.set_num_threads(1)
    spec = LearnerSpec("policy", str(folder), optimizer=OptimizerConfig(), settings=LearnerSettings(**settings))
    return load_network(spec, torch.float32)


def row(kind, pictures, completion, words=(20, 21, 22)):
    ids = [words[0]]
    for each in pictures:
        ids += [5, *[IMAGE_ID] * TOKENS[kind](each.size), 6]
    return Sequence((*ids, *words[1:]), tuple(completion), images=tuple(pictures))


def examples(kind):
    first, second = picture(0, 28, 28), picture(1, 56, 28)
    cropped = replace(first, box=(0.25, 0.5, 0.5, 0.75))
    return [
        Example((row(kind, [first], (8, 9, 1)), row(kind, [cropped], (8, 9, 1)))),
        Example((row(kind, [second, first], (10, 1)), row(kind, [], (11, 12, 13, 1)))),
    ]


def forward(policy, batch, columns=(Column.LOGPS,)):
    images = (policy.image_inputs(batch.images, torch.device("cpu")),) if batch.images else ()
    fields = (batch.input_ids, batch.attention_mask, batch.labels, batch.positions, batch.mask)
    return policy(*fields, columns, 1.0, 2048, None, False, *images)


def plain_logps(folder, policy, each):
    """By the model's own forward pass on one row, its images one by one through the image processor."""
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    ids = torch.tensor([[*each.prompt_ids, *each.completion_ids]])
    extra = {}
    if each.images:
        processor = getattr(policy.processor, "image_processor", policy.processor)
        extra = dict(processor(images=[decoded(picture) for picture in each.images], return_tensors="pt"))
        if "image_grid_thw" in extra:
            extra["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    with torch.no_grad():
        logps = plain(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0].log_softmax(-1)
    start = len(each.prompt_ids) - 1
    return logps[start:-1].gather(1, torch.tensor(each.completion_ids)[:, None])[:, 0]


def test_log_probs_are_those_of_the_plain_model(model):
    kind, folder = model
    policy, found = load(folder), examples(kind)
    assert isinstance(policy, VisionPolicy)
    logps = forward(policy, collate(found, pad_id=0))["logps"]
    for index, each in enumerate(row for example in found for row in example.sequences):
        want = plain_logps(folder, policy, each)
        assert torch.allclose(logps[index, : len(want)], want, atol=2e-5), index
        assert (logps[index, len(want) :] == 0).all()
    assert (logps[0, :3] - logps[1, :3]).abs().max() > 1e-3  # what is cut out is seen


def test_images_that_rows_share_are_looked_at_once(model):
    kind, folder = model
    policy = load(folder)
    inputs = policy.image_inputs(collate(examples(kind), pad_id=0).images, torch.device("cpu"))
    assert inputs["order"].tolist() == [0, 1, 2, 0]
    counts = {"llava": lambda pixels: len(pixels["pixel_values"]), "qwen2_vl": lambda p: len(p["image_grid_thw"])}
    assert counts[kind](inputs["pixels"]) == 3


def test_a_backbone_that_cannot_share_gives_the_same(model):
    kind, folder = model
    policy, batch = load(folder), collate(examples(kind), pad_id=0)
    shared = forward(policy, batch)["logps"]
    policy._shares = False
    assert torch.allclose(forward(policy, batch)["logps"], shared, atol=1e-5)


def test_the_part_that_sees_is_frozen_unless_asked_for(model):
    kind, folder = model
    gradients = []
    for train_vision in (False, True):
        policy = load(folder, train_vision=train_vision, gradient_checkpointing=train_vision)
        policy.train()
        forward(policy, collate(examples(kind), pad_id=0))["logps"].sum().backward()
        gradients.append({name for name, each in policy.named_weights() if each.grad is not None})
    seeing = {name for name in gradients[1] if "vision_tower" in name or ".visual." in name}
    assert seeing and gradients[0] == gradients[1] - seeing


def test_rows_without_images_use_the_same_layers(model):
    """A micro-batch of a step in which only others have images: the same numbers, and gradients of the same layers."""
    kind, folder = model
    policy = load(folder, train_vision=True)
    batch = collate([Example((examples(kind)[1].sequences[1],))], pad_id=0)
    alone = forward(policy, batch)["logps"]
    together = forward(policy, replace(batch, images=((),)))["logps"]
    assert torch.allclose(alone, together, atol=1e-6)
    together.sum().backward()
    assert any(each.grad is not None for name, each in policy.named_weights() if "vision" in name or "visual" in name)


def test_a_text_model_sees_nothing(tmp_path):
    policy = load(build_tiny_llama(tmp_path))
    assert type(policy) is CausalPolicy
    with pytest.raises(ConfigError, match="sees no images"):
        policy.image_inputs(((picture(0),),), torch.device("cpu"))


def test_rows_with_images_cannot_be_packed(model):
    with pytest.raises(ConfigError, match="cannot be packed"):
        load(model[1], packing=True).image_inputs(((picture(0),),), torch.device("cpu"))


def test_a_checkpoint_without_a_processor(tmp_path):
    folder = build_tiny_llava(tmp_path)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="turns images into tensors"):
        load(folder).image_inputs(((picture(0),),), torch.device("cpu"))


def test_an_export_has_its_processor(tmp_path):
    policy = load(build_tiny_llava(tmp_path / "model"))
    (tmp_path / "export").mkdir()
    policy.export(tmp_path / "export", dict(policy.named_weights()), torch.float32)
    again = load(tmp_path / "export")
    batch = collate(examples("llava"), pad_id=0)
    assert torch.equal(forward(again, batch)["logps"], forward(policy, batch)["logps"])


def test_crops_keep_the_size_and_show_a_part():
    whole, part = picture(3, 40, 20), replace(picture(3, 40, 20), box=(0.0, 0.0, 0.25, 0.25))
    assert decoded(part).size == decoded(whole).size == (40, 20)
    colours = [len(each.getcolors()) for each in (decoded(part), decoded(whole))]
    assert colours[0] == 1 < colours[1]  # one of 4×4 patches
    assert decoded(replace(part, box=(0.999, 0.999, 1.0, 1.0))).size == (40, 20)

"""Training a model that sees, on rows with images: the same loop; crops and runs that are killed come out the same."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from rayalign.api import run_evaluation, run_training
from rayalign.compare import run_comparison
from rayalign.config import parse_config, save_config
from rayalign.errors import ConfigError, DataError
from tests.loop.conftest import records, timeless
from tests.parts import PowerCut, tiny_config
from tests.tiny_models import build_tiny_llama
from tests.tiny_vision import build_tiny_llava, build_tiny_qwen2_vl, painted

THINGS = "a film,a story,an actor,an opera".split(",")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return build_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def config(tmp_path, seeing):
    """A tiny config of mDPO, or of another algorithm, on 16 rows about images in a folder beside the file."""
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(16):
        painted(index, 20 + index, 20).save(tmp_path / "images" / f"{index}.png")
        chosen, rejected = THINGS[index % 4], THINGS[(index + 1) % 4]
        row = {"prompt": f"what is this {index}", "chosen": chosen, "rejected": f"not {rejected} at all"}
        rows.append(row | {"images": [f"images/{index}.png"]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(algorithm="mdpo", **changes):
        base = tiny_config(tmp_path, seeing)
        for key in ("scorer", "sampling", "engine"):
            del base[key]
        base |= {
            "algorithm": algorithm if isinstance(algorithm, dict) else {"name": algorithm},
            "data": {"examples": str(tmp_path / "pairs.jsonl"), "held_out": 0.25, "max_tokens": 64},
            "rollout": {"prompts": 4},
            "optimizer": {"lr": 3e-3},
            "evaluation": {},
            "train": {"steps": 6},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            base[section] = {**base[section], name: value} if name else value
        return parse_config(base)

    return build


def test_mdpo_learns_what_answers_owe_to_images(config, tmp_path):
    result = run_training(config())
    before, after = (result.evaluations[step].metrics for step in (0, 6))
    assert before["held_out/rewards/image_margins"] == pytest.approx(0, abs=1e-5)
    last = records(result.run_dir)[-1]
    assert last["rewards/image_margins"] > 0.05 and last["rewards/margins"] > 0.05
    assert after["held_out/loss"] < before["held_out/loss"]
    exported = result.run_dir / "checkpoints" / "step-6"
    assert AutoProcessor.from_pretrained(exported).image_processor is not None
    AutoModelForImageTextToText.from_pretrained(exported)


@pytest.mark.parametrize("algorithm", ["preference", "sft"])
def test_other_objectives_learn_from_the_same_rows(config, algorithm):
    result = run_training(config(algorithm))
    before, after = (result.evaluations[step].metrics["held_out/loss"] for step in (0, 6))
    assert after < before


def test_a_killed_run_goes_on_as_if_it_had_not_been(config, tmp_path):
    settings = {"checkpoint__every": 1, "checkpoint__keep": 9, "train__steps": 4}
    whole = run_training(config(**settings, run_dir=str(tmp_path / "whole"))).run_dir
    killed = {**settings, "run_dir": str(tmp_path / "killed")}
    with pytest.raises(PowerCut):
        run_training(config(**killed, trackers=[{"name": "tests.parts:Stop", "step": 3}]))
    resumed = run_training(config(**killed, resume=True)).run_dir
    assert [timeless(r) for r in records(resumed)] == [timeless(r) for r in records(whole)]
    assert records(resumed, "evaluations") == records(whole, "evaluations")


def test_cached_log_probs_of_the_reference_know_crops_apart(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    live = run_training(config(run_dir=str(tmp_path / "live"))).run_dir
    cached = {"name": "mdpo", "reference": {"cached": True}}
    found = run_training(config(cached, run_dir=str(tmp_path / "cached"))).run_dir
    for old, new in zip(records(live), records(found), strict=True):
        assert new["loss"] == pytest.approx(old["loss"], abs=1e-6)


def test_adapters_stand_beside_what_speaks_not_beside_what_sees(config, seeing):
    model = {"path": str(seeing), "dtype": "float32", "lora": {"rank": 4, "alpha": 8}}
    result = run_training(config(model=model, optimizer__lr=3e-2))
    assert records(result.run_dir)[-1]["rewards/image_margins"] > 0.02
    exported = result.run_dir / "checkpoints" / "step-6"
    adapted = load_file(exported / "adapter" / "adapter_model.safetensors")
    assert any("language_model" in name for name in adapted) and any("projector" in name for name in adapted)
    assert not any("vision_tower" in name for name in adapted)
    before, after = (AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (seeing, exported))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name.partition(".")[2].partition(".")[0] for name in changed} == {"language_model", "multi_modal_projector"}


def test_a_checkpoint_is_evaluated(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_training(config())
    found = run_evaluation(config(), model=str(result.run_dir / "checkpoints" / "step-6")).metrics
    assert found["held_out/loss"] == pytest.approx(result.evaluations[6].metrics["held_out/loss"], abs=1e-5)


def test_a_text_model_is_refused_before_anything_starts(config, tmp_path):
    text = {"path": str(build_tiny_llama(tmp_path / "text")), "dtype": "float32"}
    for algorithm in ("mdpo", "preference"):
        with pytest.raises(ConfigError, match="sees no images"):
            run_training(config(algorithm, model=text))
    with pytest.raises(ConfigError, match="scalar head sees no images"):
        run_training(config("reward_model"))


def test_a_processor_without_its_library_is_said(config, tmp_path):
    if find_spec("torchvision") is not None:
        pytest.skip("torchvision is here")
    model = {"path": str(build_tiny_qwen2_vl(tmp_path / "qwen")), "dtype": "float32"}
    with pytest.raises(ConfigError, match="needs a library") as caught:
        run_training(config(model=model))
    assert "torchvision" in str(caught.value).lower()


def test_a_missing_image_stops_the_run_or_is_skipped(config, tmp_path):
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(DataError, match="an image cannot be read") as caught:
        run_training(config())
    assert str(caught.value.where).endswith("pairs.jsonl:4") and "3.png" in str(caught.value.value)
    result = run_training(config(data__on_bad_row="skip", train__steps=1))
    assert result.step == 1


def test_what_is_asked_about_images_is_not_compared(config, seeing, model, tmp_path):
    """An engine would answer without having seen them."""
    engine = {"name": "transformers", "max_context": 128}
    said = config(scorer={"name": "rules", "rule": "brevity"}, engine=engine, sampling={"max_tokens": 8})
    save_config(said, tmp_path / "said.yaml")
    with pytest.raises(ConfigError, match="engines here see no images"):
        run_comparison(seeing, model, config=tmp_path / "said.yaml", out=tmp_path / "out")

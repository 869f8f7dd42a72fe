"""LoRA on DeepSpeed, one rank and two, under every ZeRO stage that differs: what one process with torch gives."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.contract.learner_cases import PROBES, smooth
from tests.contract.lora_rank import LORA, Story, launch
from tests.tiny_models import build_tiny_llama

BY_RANKS = {2: (0, 2, 3), 1: (2,)}  # one rank is the easy case: one stage of it
CASES = ["torch", *(f"zero{stage}-{ranks}" for ranks, stages in BY_RANKS.items() for stage in stages)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_llama(tmp_path_factory.mktemp("model"), tied=True)


@pytest.fixture(scope="module")
def wanted(model, tmp_path_factory):
    torch.set_num_threads(1)
    story = Story(tmp_path_factory.mktemp("torch"), model)
    story.tell()
    return story.out


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """The ranks run once for each number of ranks."""
    done = {}

    def found(ranks: int):
        if ranks not in done:
            done[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
            launch(ranks, list(BY_RANKS[ranks]), model, done[ranks], timedelta(seconds=280))
        return done[ranks]

    return found


@pytest.fixture(scope="module", params=CASES)
def out(request, wanted, folders):
    if request.param == "torch":
        return wanted
    stage, ranks = request.param.removeprefix("zero").split("-")
    return folders(int(ranks)) / f"stage{stage}"


def read(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=False)


def assert_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=tolerance), name


@pytest.mark.parametrize("name", ["off", "followed", "scored"])
def test_losses_norms_and_adapters_are_those_of_one_process(out, wanted, name):
    found, want = read(out, name), read(wanted, name)
    assert [smooth(step) for step in found["metrics"]] == [
        pytest.approx(smooth(step), abs=1e-5, rel=1e-5) for step in want["metrics"]
    ]
    assert_close(found["own"], want["own"], 1e-5)


def test_the_policy_starts_as_the_model_and_the_reference_stays_it(out, model):
    found = read(out, "off")
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    assert_close(found["first"], {name: p.detach() for name, p in plain.named_parameters()}, 0.0)
    for row in (row for example in found["reference"] for row in example.sequences):
        ids, start = row.prompt_ids + row.completion_ids, len(row.prompt_ids) - 1
        with torch.no_grad():
            logps = (plain(torch.tensor([ids])).logits[0] / 0.8).log_softmax(-1)[start:-1]
        want = logps.gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0]
        assert np.allclose(row.columns["reference/logps"], want, atol=1e-5)


def test_a_second_adapter_follows_the_policy(out, wanted):
    found, want = read(out, "followed"), read(wanted, "followed")
    assert_close(found["averaged"], want["averaged"], 1e-5)
    assert_close(found["replaced"], want["replaced"], 1e-5)
    moved = [(found["averaged"][name] - found["replaced"][name]).abs().max() for name in found["averaged"]]
    assert max(moved) > 1e-4
    for name in ("logps", "same", "policy"):
        assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(found[name], want[name], strict=True)), name
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(found["logps"][:-1], found["same"][:-1], strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restored_run_goes_on_as_if_never_stopped(out, wanted, dtype):
    found = read(out, f"resumed-{dtype}")
    tolerance = 0.0 if out == wanted else 1e-6
    assert found["got"] == [pytest.approx(step, rel=0, abs=tolerance) for step in found["want"]]
    for role, tensors in found["straight"].items():
        assert_close(found["again"][role], tensors, tolerance)


def test_checkpoints_hold_adapters_and_optimiser_only(out, model):
    """Adapter, its float32 master and two moments, and a second adapter: less than the model alone."""
    adapter = 4 * sum(tensor.numel() for tensor in read(out, "followed")["own"].values())
    size = sum(path.stat().st_size for path in (out / "saved-float32").rglob("*") if path.is_file())
    assert adapter < size < 6 * adapter + 200_000
    base = read(out, "merged")["base"]
    for path in (out / "saved-float32").rglob("*model_states.pt"):
        assert all(".lora_" in name for name in torch.load(path, weights_only=False)["module"])
    assert any(".lora_" in name for name in base)


def test_pushes_and_exports_are_what_peft_merges(out, model):
    found = read(out, "merged")
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    merged = PeftModel.from_pretrained(plain, out / "merged" / "adapter").merge_and_unload()
    want = {name: parameter.detach() for name, parameter in merged.named_parameters()}
    if found["pushed"]:
        assert_close(found["pushed"], want, 1e-6)
    assert_close(found["weights"], want, 1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    assert_close(dict(loaded.named_parameters()), found["weights"], 0.0)
    assert not (out / "merged" / "adapter_config.json").exists()
    assert_logps(loaded, found["logps"])


def test_an_adapter_alone_loads_in_transformers(out):
    assert not list((out / "adapter").glob("model*")) and (out / "adapter" / "adapter" / "adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(out / "adapter").eval()
    assert any("lora_A" in name for name, _ in loaded.named_parameters())
    assert_logps(loaded, read(out, "adapter")["logps"])


def assert_logps(model, wanted):
    for ids, logps in zip(PROBES, wanted, strict=True):
        with torch.no_grad():
            plain = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        assert np.allclose(logps, plain.gather(1, torch.tensor(ids[1:]).long()[:, None])[:, 0], atol=2e-5)


def test_a_reward_model_is_exported_with_its_head(out, model):
    found = read(out, "scored")
    head = [name for name in found["own"] if ".lora_" not in name]
    assert head == ["score.weight"] and LORA.rank in found["own"]["model.layers.0.mlp.up_proj.lora_A.weight"].shape
    merged = AutoModelForSequenceClassification.from_pretrained(out / "reward").eval()
    fresh = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).eval()
    adapted = PeftModel.from_pretrained(fresh, out / "reward" / "adapter").eval()
    for row in (row for example in found["values"] for row in example.sequences):
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        adapted.config.get_text_config().pad_token_id = None
        with torch.no_grad():
            scores = [float(each(ids).logits[0, 0]) for each in (merged, adapted)]
        assert scores == pytest.approx([float(row.columns["policy/values"][-1])] * 2, abs=1e-5)

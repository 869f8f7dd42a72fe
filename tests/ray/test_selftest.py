"""The self-test, run as a user runs it, on this machine's cores."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayalign.doctor.startup import ray_findings
from rayalign.selftest import _engine, selftest, two_ranks
from rayalign.selftest.stage import (
    CHECKPOINT,
    OBJECT_STORE,
    PUSH,
    PUSH_TP,
    RANKS,
    START,
    START_TP,
    TRAINING,
    WAKE,
)
from rayalign.selftest.tiny_model import VOCAB, build_model


def test_every_stage_passes_or_says_what_it_needs() -> None:
    done = {stage.name: stage for stage in selftest()}
    tried = [TRAINING, OBJECT_STORE, START, CHECKPOINT, PUSH, WAKE]
    assert list(done) == [*tried, START_TP, PUSH_TP, RANKS]
    assert {name: done[name].outcome for name in tried} == dict.fromkeys(tried, "passed"), done
    assert all(done[name].outcome == "skipped" and "2 GPUs" in done[name].found for name in (START_TP, PUSH_TP, RANKS))
    assert "no memory to free" in done[WAKE].found  # a CPU


def test_tensor_parallel_and_two_ranks_pass_where_they_are_asked_for(tmp_path: Path) -> None:
    """What needs GPUs in the self-test runs on cores as well, with gloo for nccl."""
    model, other = build_model(tmp_path / "model"), build_model(tmp_path / "other", seed=1)
    done = [*_engine(model, tmp_path, (), weights=other, ranks=2), *two_ranks(model, tmp_path)]
    assert [(stage.name, stage.outcome) for stage in done] == [
        (START_TP, "passed"),
        (CHECKPOINT, "passed"),
        (PUSH_TP, "passed"),
        (RANKS, "passed"),
    ], done


def test_a_model_that_does_not_load_fails_its_stages_with_log_and_cause(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"not weights")
    done = list(_engine(model, tmp_path, (), weights=model))
    assert [stage.outcome for stage in done] == ["failed", "skipped", "skipped", "skipped"]
    assert "Safetensor" in done[0].found or "safetensors" in done[0].found
    assert "engine-1.log" in done[0].remedy and (tmp_path / "engine-1.log").stat().st_size


def test_ray_starts() -> None:
    found = list(ray_findings())
    assert [finding.level for finding in found] == ["ok"] and "ran a task" in found[0].found


@torch.no_grad()
def test_the_tiny_model_is_one_that_transformers_reads(tmp_path: Path) -> None:
    path = build_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = tokenizer("a film (2)\n")["input_ids"]
    assert tokenizer.decode(ids) == "a film (2)\n" and len(tokenizer) == len(VOCAB)
    logits = model(torch.tensor([ids])).logits[0]
    assert torch.isfinite(logits).all() and logits.softmax(-1).max() > 0.05  # far from 1 in 128

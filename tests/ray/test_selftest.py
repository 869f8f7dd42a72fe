"""The self-test, run as a user runs it, on this machine's cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayalign.doctor import STOPPED
from rayalign.doctor.startup import ray_findings
from rayalign.selftest import engines, selftest
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


def test_every_stage_runs_and_passes_on_cores() -> None:
    done = {stage.name: stage for stage in selftest()}
    tried = [TRAINING, OBJECT_STORE, CHECKPOINT, RANKS, START, PUSH, WAKE, START_TP, PUSH_TP]
    assert {name: stage.outcome for name, stage in done.items()} == dict.fromkeys(tried, "passed"), done
    assert "no memory to free" in done[WAKE].found  # a CPU


def test_a_model_that_does_not_load_fails_its_stages_with_log_and_cause(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"not weights")
    done = list(filter(None, engines(model, tmp_path, weights=model)))
    assert [stage.outcome for stage in done] == ["failed", "skipped", "skipped"]
    assert "Safetensor" in done[0].found or "safetensors" in done[0].found
    assert "engine-1.log" in done[0].remedy and (tmp_path / "engine-1.log").stat().st_size


@pytest.fixture
def temporary():
    """A folder with a short path: Ray's sockets are in it, whose paths may not have more than 107 characters."""
    with tempfile.TemporaryDirectory(prefix="t-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_that_was_started(temporary: Path, number: signal.Signals, code: int) -> None:
    """While Ray, its actors and an engine start: nothing of them stays, no folder, and one calm line."""
    command = [sys.executable, "-m", "rayalign.cli", "doctor", "--selftest"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as doctor:
        limit = time.monotonic() + 120
        while not (actors := in_temporary(temporary, b"ray::")) and time.monotonic() < limit:
            time.sleep(0.2)
        doctor.send_signal(number)
        out, err = doctor.communicate(timeout=60)
    assert actors and (doctor.returncode, out.splitlines()[-1], err) == (code, STOPPED, "")
    assert not list(temporary.glob("rayalign-*"))
    limit = time.monotonic() + 20  # Ray's processes end when they see that their driver has
    while (left := in_temporary(temporary)) and time.monotonic() < limit:
        time.sleep(0.2)
    assert not left


def in_temporary(folder: Path, name: bytes = b"") -> list[str]:
    """Commands of living processes that have this TMPDIR and a command that begins so."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes()
                found += [command.decode()] if command.startswith(name) else []
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


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

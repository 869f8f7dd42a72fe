"""The self-test on this machine's GPUs. Not among the suites of launch/test.sh: `launch/test.sh tests/gpu`."""

from __future__ import annotations

import pytest
import torch

from rayalign.doctor import diagnose
from rayalign.doctor.gpus import gpu_findings
from rayalign.selftest import selftest
from rayalign.selftest.stage import PUSH_TP, RANKS, START_TP, WAKE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_every_stage_passes_and_sleep_frees_memory() -> None:
    found, gpus = gpu_findings()
    assert len(gpus) == torch.cuda.device_count(), found
    done = {stage.name: stage for stage in selftest(gpus=gpus)}
    needs_two = (START_TP, PUSH_TP, RANKS)
    for name, stage in done.items():
        skipped = name in needs_two and len(gpus) < 2
        assert stage.outcome == ("skipped" if skipped else "passed"), stage
    assert "GiB of the GPU freed" in done[WAKE].found


def test_doctor_finds_this_machine_ready(capsys: pytest.CaptureFixture[str]) -> None:
    problems = diagnose()
    assert problems == 0, capsys.readouterr().out

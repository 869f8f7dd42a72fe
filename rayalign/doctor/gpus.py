"""GPUs: what torch can use, what the driver says, and whether the two fit."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayalign.doctor.finding import Finding, gib
from rayalign.doctor.torch_facts import MARK
from rayalign.selftest.child import Child
from rayalign.selftest.devices import BFLOAT16_FROM, Gpu

QUERY = ["nvidia-smi", "--query-gpu=index,driver_version,compute_mode", "--format=csv,noheader"]
DEADLINE_S = 60.0


def gpu_findings() -> tuple[list[Finding], list[Gpu]]:
    """The findings, and each GPU that torch can use."""
    facts, trouble = torch_facts()
    if facts is None:
        remedy = "bash launch/demo.sh installs the locked versions into .venv"
        return [Finding("problem", "torch", f"cannot be imported: {trouble}", remedy)], []
    usable = [Gpu(gpu["total"] / 2**30, float(gpu["capability"])) for gpu in facts["gpus"] if facts["available"]]
    return device_findings(facts, driver_facts()), usable


def torch_facts() -> tuple[dict[str, Any] | None, str]:
    """What torch says in a process of its own, or None and why not."""
    with tempfile.TemporaryDirectory(prefix="rayalign-doctor-") as folder:
        child = Child(["rayalign.doctor.torch_facts"], deadline_s=DEADLINE_S, log=Path(folder) / "torch.log")
        lines = [line for line in child.run() if line.startswith(MARK)]
        return (json.loads(lines[0].removeprefix(MARK)), "") if lines else (None, child.trouble())


def driver_facts() -> list[dict[str, str]]:
    """Of each GPU that nvidia-smi lists: index, driver, mode; empty without it."""
    try:
        run = subprocess.run(QUERY, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in run.stdout.splitlines() if line.count(",") == 2]
    return [dict(zip(("index", "driver", "mode"), row, strict=True)) for row in rows]


def device_findings(torch: Mapping[str, Any], driver: Sequence[Mapping[str, str]]) -> list[Finding]:
    """`torch`: as torch_facts gives it; `driver`: as driver_facts does."""
    if torch["cuda"] is None:
        if not driver:
            return [Finding("ok", "GPUs", f"none; torch {torch['version']} computes on the CPU")]
        found = f"{len(driver)} in this machine, and torch {torch['version']} is built for CPUs"
        return [Finding("note", "GPUs", found, "RAYALIGN_STACK=gpu bash launch/test.sh installs the GPU versions")]
    if not torch["available"]:
        return [_unusable(torch, driver)]
    findings = [
        Finding("ok", f"GPU {i}", f"{gpu['name']}, {gib(gpu['total'])}, capability {gpu['capability']}")
        for i, gpu in enumerate(torch["gpus"])
    ]
    findings += [note for i, gpu in enumerate(torch["gpus"]) for note in _device_notes(i, gpu)]
    findings += [_compute_mode(gpu) for gpu in driver if gpu["mode"] not in ("Default", "[N/A]")]
    version = f"driver {driver[0]['driver']}, " if driver else ""
    findings.append(Finding("ok", "CUDA", f"{version}CUDA {torch['cuda']} of torch, nccl {torch['nccl']}"))
    if torch["no_peer"]:
        pairs = ", ".join(f"{a}–{b}" for a, b in torch["no_peer"][:4])
        remedy = "it works, slower: nccl goes through host memory, which needs /dev/shm"
        findings.append(Finding("note", "peer access", f"GPUs {pairs} cannot read each other's memory", remedy))
    return findings


def _unusable(torch: Mapping[str, Any], driver: Sequence[Mapping[str, str]]) -> Finding:
    build = f"torch {torch['version']} is built for CUDA {torch['cuda']}"
    if not driver:
        found = f"{build}, and there is no NVIDIA driver here: {torch['error']}"
        remedy = (
            "install the driver, give the container its GPUs (--gpus all), or RAYALIGN_STACK=cpu bash launch/test.sh"
        )
    else:
        found = f"{build}, which driver {driver[0]['driver']} does not run: {torch['error'] or 'no device is visible'}"
        remedy = "update the driver, or unset CUDA_VISIBLE_DEVICES if it hides the GPUs"
    return Finding("problem", "GPUs", found, remedy)


def _device_notes(index: int, gpu: Mapping[str, Any]) -> list[Finding]:
    findings = []
    if gpu["free"] < 0.9 * gpu["total"]:
        found = f"{gib(gpu['free'])} free of {gib(gpu['total'])}: another program holds the rest"
        remedy = "nvidia-smi shows which; end it, or lower engine.gpu_memory to the share that is free"
        findings.append(Finding("note", f"GPU {index} memory", found, remedy))
    if float(gpu["capability"]) < BFLOAT16_FROM:
        found = f"capability {gpu['capability']} has no bfloat16 in hardware (8.0 has)"
        findings.append(Finding("note", f"GPU {index} bfloat16", found, "model.dtype=float32 engine.dtype=float16"))
    return findings


def _compute_mode(gpu: Mapping[str, str]) -> Finding:
    found = f"{gpu['mode']}: only one process may use it at a time, so engine and learner cannot share it"
    remedy = f"sudo nvidia-smi -i {gpu['index']} -c DEFAULT"
    return Finding(
        "problem" if gpu["mode"] == "Prohibited" else "note", f"GPU {gpu['index']} compute mode", found, remedy
    )

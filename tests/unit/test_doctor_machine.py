"""What is said of cores, memory, disk, network, environment and GPUs, with values made by hand, and once for real."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest

from rayalign.doctor import environment, gpus, machine, network
from rayalign.doctor.finding import Finding, guarded

GIB = 2**30
UNLIMITED = resource.RLIM_INFINITY


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1
    assert findings[0].remedy or findings[0].level == "ok"
    return findings[0]


@pytest.mark.parametrize(
    ("cores", "quota", "level"), [(8, None, "ok"), (8, 8.0, "ok"), (8, 1.5, "note"), (1, None, "note")]
)
def test_cores(cores, quota, level) -> None:
    assert only(machine.core_findings(cores, quota)).level == level


def test_bfloat16() -> None:
    assert only(machine.bfloat16_findings("model name: x\nflags\t\t: sse avx512_bf16 amx_bf16\n")).level == "ok"
    assert only(machine.bfloat16_findings("Features : fp asimd bf16\n")).level == "ok"
    assert only(machine.bfloat16_findings("flags : sse avx2\nbugs : bf16\n")).level == "note"


@pytest.mark.parametrize(
    ("total", "available", "whole", "level"),
    [(24, 20, 24, "ok"), (12, 10, 256, "ok"), (8, 7, 24, "note"), (24, 2, 24, "problem"), (16, 1, 256, "problem")],
)
def test_memory(total, available, whole, level) -> None:
    found = only(machine.memory_findings(total * GIB, available * GIB, machine=whole * GIB))
    assert found.level == level and ("cgroup" in found.found) == (total < whole)
    assert f"{available:.1f} GiB available of {total:.1f} GiB" in found.found


@pytest.mark.parametrize(
    ("free", "total", "memory", "level"),
    [
        (None, None, 16 * GIB, "problem"),
        (64 * 2**20, 64 * 2**20, 16 * GIB, "problem"),  # docker's default
        (2 * GIB, 2 * GIB, 16 * GIB, "note"),
        (8 * GIB, 8 * GIB, 16 * GIB, "ok"),
        (12 * GIB, 12 * GIB, 512 * GIB, "ok"),  # Ray takes no more than 95 % of it
    ],
)
def test_shared_memory(free, total, memory, level) -> None:
    found = only(machine.shm_findings(free, total, memory=memory))
    assert found.level == level
    assert level != "note" or "--shm-size=5g" in found.remedy and "object_store_gib=1" in found.remedy


@pytest.mark.parametrize(
    ("free", "total", "level"), [(50, 250, "ok"), (10, 250, "problem"), (4, 40, "note"), (3, 4, "note")]
)
def test_disk(free, total, level) -> None:
    assert only(machine.disk_findings("disk", "/here", free * GIB, total * GIB)).level == level


@pytest.mark.parametrize(
    ("soft", "hard", "level"),
    [(1024, 1024, "problem"), (1024, 4096, "ok"), (1024, UNLIMITED, "ok"), (UNLIMITED, UNLIMITED, "ok")],
)
def test_open_files(soft, hard, level) -> None:
    found = only(machine.open_file_findings(soft, hard))
    assert found.level == level and "-1" not in found.found


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
        ("3:cpu,cpuacct:/j", {"cpu/j/cpu.cfs_quota_us": "250000", "cpu/j/cpu.cfs_period_us": "100000"}, 2.5),
        ("3:cpu:/j", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_cgroup_cores(tmp_path: Path, group, files, cores) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()} | {"proc/self/cgroup": group}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert machine.cgroup_cores(tmp_path) == cores


def test_ports() -> None:
    assert only(network.port_findings({6379: True, 8265: True}, ray_runs=False)).level == "ok"
    taken = only(network.port_findings({6379: False, 8265: True}, ray_runs=False))
    assert taken.level == "note" and "another program" in taken.found and "RAYALIGN_RAY_PORT" in taken.remedy
    assert "Ray runs here" in only(network.port_findings({6379: False}, ray_runs=True)).found
    agent = only(network.port_findings({52365: False}, ray_runs=True))
    assert 52365 in network.PORTS and "ray start --dashboard-agent-listen-port=" in agent.remedy
    with socket.create_server(("", 0)) as server:
        assert not network.port_is_free(server.getsockname()[1])
    assert network.loopback_error() == ""
    assert only(network.loopback_findings("refused")).level == "problem"


def test_names_and_what_runs(tmp_path: Path) -> None:
    assert only(network.hostname_findings("box", "10.0.0.2")).level == "ok"
    assert "/etc/hosts" in only(network.hostname_findings("box", "")).remedy
    assert network.resolve("localhost") == "127.0.0.1" and network.resolve("no-such-host.invalid") == ""
    for number, name in ((11, "raylet"), (12, "python"), (13, "raylet")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "comm").write_text(f"{name}\n")
    assert network.ray_processes(tmp_path) == [11, 13]
    assert only(network.ray_findings(2)).level == "note" and only(network.ray_findings(0)).level == "ok"


@pytest.mark.parametrize(
    ("variables", "topics"),
    [
        ({}, ["environment"]),
        ({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "0"}, ["HF_HUB_OFFLINE"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["CUDA_VISIBLE_DEVICES"]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ["environment"]),
        ({"RAY_ADDRESS": "auto", "LD_PRELOAD": "x.so"}, ["RAY_ADDRESS", "LD_PRELOAD"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, ["PYTORCH_CUDA_ALLOC_CONF"]),
        ({"http_proxy": "http://proxy:3128"}, ["http_proxy"]),
        ({"ALL_PROXY": "http://proxy:3128", "no_proxy": "localhost"}, ["ALL_PROXY"]),
        ({"https_proxy": "http://proxy:3128", "grpc_proxy": "http://proxy:3128"}, ["environment"]),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "localhost, 127.0.0.1,.lan"}, ["environment"]),
        ({"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "*"}, ["environment"]),
        ({"http_proxy": ""}, ["environment"]),
    ],
)
def test_variables(variables, topics) -> None:
    found = environment.variable_findings(variables, gpu_machine=True)
    assert [finding.topic for finding in found] == topics
    assert all(finding.level != "problem" for finding in found)  # a run works with any of them


def test_an_empty_device_list_says_nothing_without_a_gpu() -> None:
    assert only(environment.variable_findings({"CUDA_VISIBLE_DEVICES": ""}, gpu_machine=False)).level == "ok"


@pytest.mark.parametrize(
    ("modes", "level"),
    [
        ([], "ok"),
        ([0o100600, 0o700, 0o755], "ok"),
        ([0o100644, 0o755, 0o755], "problem"),
        ([0o100644, 0o755, 0o700], "note"),
        ([0o100640, 0o750, 0o755], "problem"),
    ],
)
def test_token(modes, level) -> None:
    found = only(environment.token_findings({}, "/home/a/.ray/auth_token", modes))
    assert found.level == level
    assert level == "ok" or found.remedy == "chmod 600 /home/a/.ray/auth_token"
    assert only(environment.token_findings({"RAY_AUTH_MODE": "disabled"}, "", modes)).level == "problem"


TORCH = {
    "version": "2.13.0",
    "cuda": "13.0",
    "available": True,
    "error": "",
    "nccl": "2.29.7",
    "no_peer": [],
    "gpus": [],
}
CARD = {"name": "A card", "free": 79 * GIB, "total": 80 * GIB, "capability": "9.0"}
DRIVER = {"index": "0", "driver": "580.1", "mode": "Default"}


@pytest.mark.parametrize(
    ("torch", "driver", "expected"),
    [
        ({"cuda": None, "available": False}, [], {"GPUs": "ok"}),
        ({"cuda": None, "available": False}, [DRIVER], {"GPUs": "note"}),
        ({"available": False, "error": "Found no NVIDIA driver"}, [], {"GPUs": "problem"}),
        ({"available": False, "error": "the driver is too old"}, [DRIVER], {"GPUs": "problem"}),
        ({"gpus": [CARD]}, [DRIVER], {"GPU 0": "ok", "CUDA": "ok"}),
        ({"gpus": [CARD | {"free": GIB}]}, [DRIVER], {"GPU 0": "ok", "GPU 0 memory": "note", "CUDA": "ok"}),
        ({"gpus": [CARD | {"capability": "7.5"}]}, [], {"GPU 0": "ok", "GPU 0 bfloat16": "note", "CUDA": "ok"}),
        (
            {"gpus": [CARD, CARD], "no_peer": [[0, 1]]},
            [DRIVER, DRIVER | {"index": "1", "mode": "Exclusive_Process"}],
            {"GPU 0": "ok", "GPU 1": "ok", "GPU 1 compute mode": "note", "CUDA": "ok", "peer access": "note"},
        ),
    ],
)
def test_gpus(torch, driver, expected) -> None:
    found = gpus.device_findings(TORCH | torch, driver)
    assert {finding.topic: finding.level for finding in found} == expected
    assert all(finding.remedy for finding in found if finding.level != "ok")


def test_a_check_that_fails_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise FileNotFoundError("/proc/meminfo")

    found = only(list(guarded("machine", broken)))
    assert (found.level, found.topic) == ("problem", "machine") and "/proc/meminfo" in found.found


def test_this_machine() -> None:
    found = [*machine.machine_findings(), *network.network_findings(), *environment.environment_findings()]
    assert {"CPU cores", "memory", "/dev/shm", "open files", "loopback", "Ray's token"} <= {f.topic for f in found} | {
        "RAY_AUTH_MODE" if os.environ.get("RAY_AUTH_MODE") == "disabled" else "Ray's token"
    }
    assert all(finding.remedy for finding in found if finding.level == "problem")

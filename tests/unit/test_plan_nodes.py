"""Nodes as text, from this machine, and what is wrong with text that cannot be read."""

from __future__ import annotations

import os
import re

import pytest
from ray._private.accelerators.amd_gpu import AMDGPUAcceleratorManager
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from rayalign.errors import ConfigError
from rayalign.plan.batches import prompt_lengths
from rayalign.plan.fit import evaluate
from rayalign.plan.nodes import GPU_GIB, find_nodes, parse_nodes, this_machine, with_gpu_memory, write_nodes
from rayalign.plan.shapes import read_shape
from rayalign.runtime.placement import LocalPlacement, Node, RayPlacement


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("2x8xH100", 2, (8, 96, "H100", 79.1, 0.0)),
        ("1x8xh200/128cpu/2000GiB", 1, (8, 128, "H200", 139.7, 2000.0)),
        ("1×1×24GiB", 1, (1, 12, "24GiB", 24.0, 0.0)),
        ("4x16cpu/64GiB", 4, (0, 16, "", 0.0, 64.0)),
        ("3x4xA100-40", 3, (4, 48, "A100-40", 39.4, 0.0)),
    ],
)
def test_text_becomes_nodes(text, count, expected):
    nodes = parse_nodes(text)
    assert len(nodes) == len({node.id for node in nodes}) == count
    for node in nodes:
        assert (node.gpus, node.cpus, node.gpu, node.gpu_gib, node.memory_gib) == expected


def test_parts_are_joined_and_written_back():
    text = "2x8xH100/96cpu/1800GiB + 1x32cpu"
    nodes = parse_nodes(text)
    assert [node.gpus for node in nodes] == [8, 8, 0]
    assert parse_nodes(write_nodes(nodes)) == nodes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2x8", ["2x8", "COUNTxGPUSxTYPE", "for instance 2x8xH100"]),
        ("2x8xPotato", ["no GPU of this name", "as 80GiB", "MI300X"]),
        ("2x8xH100+", ["these nodes cannot be read"]),
        ("0x8xH100", ["counts of at least 1"]),
        ("2x0xH100", ["counts of at least 1"]),
        ("2x8xH100/lots", ["after a slash", "96cpu"]),
    ],
)
def test_malformed_text_is_explained(text, expected):
    with pytest.raises(ConfigError) as error:
        parse_nodes(text)
    for part in expected:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1xL4", ["1x1xL4"]),
        ("L4", ["1x1xL4"]),
        ("4xRTX4090", ["1x4xRTX4090", "4x1xRTX4090"]),
        ("4xrtx-4090", ["1x4xRTX4090", "4x1xRTX4090"]),
        ("8xh100", ["1x8xH100", "8x1xH100"]),
        ("8xH100/1800GB", ["1x8xH100/1800GiB", "8x1xH100/1800GiB"]),
        ("64cpu", ["1x64cpu"]),
        ("64 CPUs / 256 GB", ["1x64cpu/256GiB"]),
        ("2x8xH10", ["2x8xH100"]),
        ("1x8x80GB", ["1x8x80GiB"]),
        ("1x8xH100/96cpus/1800", ["1x8xH100/96cpu/1800GiB"]),
    ],
)
def test_what_was_probably_meant_is_shown_and_can_be_read(text, meant):
    with pytest.raises(ConfigError) as error:
        parse_nodes(f"1x16cpu + {text}")
    assert error.value.value == text
    shown = re.findall(r"\d+x[^\s,?]+", error.value.remedy)
    assert error.value.remedy.startswith("did you mean") and shown == meant
    for each in shown:
        assert parse_nodes(each)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("99999999x8xH100", "at most 1,024 nodes"),
        (f"{'9' * 5000}x8xH100", "at most 1,024 nodes"),
        ("1000x8xH100 + 25x16cpu", "at most 1,024 nodes"),
        ("1x99999999xH100", "at most 64 GPUs"),
        ("1x99999999cpu", "4,096 cores"),
        ("1x8xH100/99999999cpu", "4,096 cores"),
    ],
)
def test_more_than_any_cluster_has_is_refused_before_it_is_made(text, rule):
    with pytest.raises(ConfigError) as error:
        parse_nodes(text)
    found = error.value
    assert found.where == "nodes" and found.value == text.split(" + ")[-1] and rule in found.rule and found.remedy


def test_the_largest_cluster_can_be_planned():
    assert len(parse_nodes("1024x64xH100/4096cpu")) == 1024


def test_without_text_or_cluster_it_is_this_machine(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for placement in (RayPlacement(), LocalPlacement()):
        nodes, source = find_nodes(placement, None)
        assert nodes == (this_machine(),) and source == "this machine"
    assert nodes[0].cpus == len(os.sched_getaffinity(0)) and nodes[0].memory_gib > 0.1
    assert len(find_nodes(LocalPlacement(), "2x4xL4")[0]) == 2


@pytest.mark.parametrize(
    ("device", "gpu", "gib"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", GPU_GIB["H100"]),
        ("NVIDIA A100-SXM4-40GB", "A100", 0.0),  # Ray says A100 of both
        ("NVIDIA A100-SXM4-80GB", "A100", 0.0),
        ("Tesla V100-SXM2-32GB", "V100", 0.0),
        ("NVIDIA GeForce RTX 4090", "RTX4090", GPU_GIB["RTX4090"]),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "GeForce-RTX-4090-Laptop-GPU", 0.0),  # another GPU, of 16 GB
        ("NVIDIA RTX A6000", "A6000", GPU_GIB["A6000"]),
        ("0x74a1", "MI300X", GPU_GIB["MI300X"]),
    ],
)
def test_gpus_are_known_by_the_names_that_ray_gives_them(device, gpu, gib):
    manager = AMDGPUAcceleratorManager if device.startswith("0x") else NvidiaGPUAcceleratorManager
    node = with_gpu_memory(Node("n", 8, 4, gpu=manager._gpu_name_to_accelerator_type(device)))
    assert (node.gpu, node.gpu_gib) == (gpu, gib)
    assert parse_nodes(write_nodes([node]))[0].gpu_gib == gib  # no size comes in by the name


def test_memory_that_ray_cannot_say_is_not_checked(make, monkeypatch):
    config = make(placement={"name": "ray"}, learner={"name": "deepspeed"}, engine={"name": "vllm"})
    node = with_gpu_memory(Node("n", 8, 4, "n", 64.0, "A100"))
    fit = evaluate(config, read_shape(config.model.path), prompt_lengths(config), [node])
    assert fit.fits and not any(load.has for load in fit.loads if load.of_gpu)
    assert any("(A100) is not known and not checked" in note and "nodes=1x4x80GiB" in note for note in fit.notes)


def test_a_cluster_that_is_not_there_is_said():
    with pytest.raises(ConfigError, match="does not answer"):
        find_nodes(RayPlacement(address="127.0.0.1:1"), None)

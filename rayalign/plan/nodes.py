"""The nodes that a plan is made for: from text like `2x8xH100`, from a running cluster, or this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rayalign.errors import ConfigError
from rayalign.memory import host_bytes
from rayalign.plan.meant import compact, probably_meant
from rayalign.runtime.placement import Node

# GiB that torch.cuda reports as the total of one device (the drivers keep a part of what the name promises).
GPU_GIB = {
    "A100": 79.2,
    "A100-40": 39.4,
    "A100-80": 79.2,
    "A10G": 22.0,
    "A6000": 47.4,
    "B200": 178.3,
    "GH200": 94.5,
    "H100": 79.1,
    "H20": 95.0,
    "H200": 139.7,
    "L4": 22.0,
    "L40S": 44.4,
    "MI250X": 63.9,
    "MI300X": 191.9,
    "RTX3090": 23.6,
    "RTX4090": 23.5,
    "RTX5090": 31.4,
    "T4": 14.5,
    "V100": 15.8,
    "V100-32": 31.7,
}
RAY_NAMES = {  # where the accelerator type that Ray gives a node has another name
    "A100-40G": "A100-40",
    "A100-80G": "A100-80",
    "AMD-Instinct-MI250X": "MI250X",
    "AMD-Instinct-MI250X-MI250": "MI250X",
    "AMD-Instinct-MI300X-HF": "MI300X",
    "AMD-Instinct-MI300X-OAM": "MI300X",
    "GeForce-RTX-3090": "RTX3090",
    "GeForce-RTX-4090": "RTX4090",
    "GeForce-RTX-5090": "RTX5090",
    "RTX-A6000": "A6000",
}
RAY_SHORT = {"A100", "V100"}  # Ray cuts the size off these, and there are two, one twice the other
CORES_A_GPU = 12  # of a node whose text does not say
EXAMPLE = "2x8xH100, 2x8xH100/96cpu/1800GiB, 1x1x24GiB, 4x16cpu/64GiB, or parts joined by +"
MOST_NODES, MOST_GPUS, MOST_CORES = 1024, 64, 4096  # of a text; GPUs and cores of one node

PART = re.compile(
    r"(?P<count>\d+)x(?:(?P<gpus>\d+)x(?P<type>[\w-]+(?:\.\d+)?[\w-]*)|(?P<cores>\d+)cpu)(?P<host>(?:/[^/]+)*)",
    re.IGNORECASE,
)
SIZE = re.compile(r"(\d+(?:\.\d+)?)GiB", re.IGNORECASE)
CPUS = re.compile(r"(\d+)cpu", re.IGNORECASE)


def find_nodes(placement: Any, text: str | None) -> tuple[tuple[Node, ...], str]:
    """The nodes, and in words where they are from: the text, a cluster that the config names, or this machine.

    Nothing is started; a cluster is joined to be asked, and left.

    Raises:
        ConfigError: text that cannot be read, or a cluster that does not answer.
    """
    if text:
        return parse_nodes(text), f"as given: {text}"
    address = getattr(placement, "address", None) or os.environ.get("RAY_ADDRESS")
    if placement.name == "local" or not address:
        return (this_machine(),), "this machine"
    from rayalign.runtime import cluster

    joined = cluster.connect(placement)
    try:
        return tuple(with_gpu_memory(node) for node in cluster.nodes()), f"cluster {address}"
    finally:
        if joined:
            cluster.disconnect()


def parse_nodes(text: str) -> tuple[Node, ...]:
    """`2x8xH100/96cpu/1800GiB + 1x32cpu` → nodes. Memory of a host that is not given is 0: not known.

    Raises:
        ConfigError: with the part that cannot be read, the rule, and the nearest known GPU.
    """
    nodes: list[Node] = []
    for part in text.split("+"):
        found = PART.fullmatch(compact(part))
        if not found:
            raise _malformed(part.strip() or text, EXAMPLE)
        cpus, memory = _host(found["host"], part)
        count, gpus = _number(found["count"]), _number(found["gpus"] or "0")
        kind, gib = _gpu(found["type"], part) if found["type"] else ("", 0.0)
        if found["cores"]:
            cpus = _number(found["cores"])
        if not count or (found["type"] and not gpus) or (not found["type"] and not cpus):
            raise _malformed(part.strip(), "counts of at least 1")
        if len(nodes) + count > MOST_NODES or gpus > MOST_GPUS or cpus > MOST_CORES:
            raise _too_many(part.strip())
        for _ in range(count):
            number = len(nodes) + 1
            name = f"node-{number}"
            nodes.append(Node(name, cpus or CORES_A_GPU * gpus, gpus, name, memory, kind, gib))
    return tuple(nodes)


def _number(digits: str) -> int:
    """Never of thousands of digits, which Python refuses: what is too large stays too large."""
    return int(digits[:9]) if len(digits) > 9 else int(digits)


def write_nodes(nodes: Sequence[Node]) -> str:
    """Nodes → the text that `parse_nodes` reads."""
    parts: list[tuple[int, str]] = []
    for node in nodes:
        gpu = node.gpu if GPU_GIB.get(node.gpu) == node.gpu_gib else f"{node.gpu_gib:g}GiB"
        core = f"x{node.gpus}x{gpu}/{node.cpus}cpu" if node.gpus else f"x{node.cpus}cpu"
        text = core + (f"/{node.memory_gib:.0f}GiB" if node.memory_gib else "")
        if parts and parts[-1][1] == text:
            parts[-1] = (parts[-1][0] + 1, text)
        else:
            parts.append((1, text))
    return "+".join(f"{count}{text}" for count, text in parts)


def this_machine() -> Node:
    """Cores that this process may use, memory, and GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(index) for index in range(gpus)]
    return Node(
        "this-machine",
        len(os.sched_getaffinity(0)),
        gpus,
        "this machine",
        host_bytes()[0] / 2**30,
        properties[0].name if properties else "",
        min((each.total_memory for each in properties), default=0) / 2**30,
    )


def with_gpu_memory(node: Node) -> Node:
    """Ray names the type of a node's GPUs, not their memory; where a name has several sizes it stays unknown."""
    kind = RAY_NAMES.get(node.gpu, node.gpu)
    known = 0.0 if kind in RAY_SHORT else GPU_GIB.get(kind, 0.0)
    return replace(node, gpu=kind, gpu_gib=known) if node.gpus else node


def _host(text: str, part: str) -> tuple[int, float]:
    cpus, memory = 0, 0.0
    for item in filter(None, text.split("/")):
        if found := CPUS.fullmatch(item):
            cpus = _number(found[1])
        elif found := SIZE.fullmatch(item):
            memory = float(found[1])
        else:
            raise _malformed(part.strip(), "after a slash: the node's cores as 96cpu, or its memory as 1800GiB")
    return cpus, memory


def _gpu(name: str, part: str) -> tuple[str, float]:
    if size := SIZE.fullmatch(name):
        return f"{float(size[1]):g}GiB", float(size[1])
    kind = {each.upper(): each for each in GPU_GIB}.get(name.upper())
    if kind is None:
        raise ConfigError(
            "no GPU of this name is known",
            where="nodes",
            value=part.strip(),
            rule="a known GPU, or the memory of one as 80GiB",
            remedy=probably_meant(part, GPU_GIB) or f"choose one of: {', '.join(GPU_GIB)}",
        )
    return kind, GPU_GIB[kind]


def _malformed(value: str, rule: str) -> ConfigError:
    return ConfigError(
        "these nodes cannot be read",
        where="nodes",
        value=value,
        rule=rule if rule != EXAMPLE else "COUNTxGPUSxTYPE or COUNTxCPUScpu, then /CPUScpu and /MEMORYGiB of the host",
        remedy=probably_meant(value, GPU_GIB) or f"for instance {EXAMPLE}",
    )


def _too_many(part: str) -> ConfigError:
    return ConfigError(
        "this is more than a plan is made for",
        where="nodes",
        value=part,
        rule=f"at most {MOST_NODES:,} nodes in all, each with at most {MOST_GPUS} GPUs and {MOST_CORES:,} cores",
        remedy="name the nodes that this run is to have, as in 2x8xH100",
    )

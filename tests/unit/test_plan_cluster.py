"""Nodes asked of a running Ray cluster: two nodes on one machine, one of which says that it has GPUs."""

from __future__ import annotations

import pytest
import ray
from ray.cluster_utils import Cluster

from rayalign.plan.fit import places_for
from rayalign.plan.nodes import GPU_GIB, find_nodes
from rayalign.runtime.placement import RayPlacement


@pytest.fixture(scope="module")
def address():
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=2, memory=2 * 2**30, object_store_memory=10**8)
        cluster.add_node(
            num_cpus=3,
            num_gpus=2,
            memory=3 * 2**30,
            object_store_memory=10**8,
            resources={"accelerator_type:A100": 1, "accelerator_type:A100-40G": 1},
        )
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("named_by", ["config", "environment"])
def test_a_running_cluster_says_what_it_has(address, named_by, monkeypatch, make):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if named_by == "environment":
        monkeypatch.setenv("RAY_ADDRESS", address)
    nodes, source = find_nodes(RayPlacement(address=address if named_by == "config" else None), None)
    assert source == f"cluster {address}" and not ray.is_initialized()  # asked, and left
    plain, gpus = nodes if not nodes[0].gpus else reversed(nodes)
    assert (plain.cpus, plain.gpus, plain.gpu, plain.gpu_gib) == (2, 0, "", 0.0)
    assert (gpus.cpus, gpus.gpus, gpus.gpu, gpus.gpu_gib) == (3, 2, "A100-40", GPU_GIB["A100-40"])
    assert plain.memory_gib == pytest.approx(2 + 10**8 / 2**30, rel=0.01) and gpus.memory_gib > plain.memory_gib
    places = places_for(make(placement={"name": "ray"}), nodes)
    assert {place.actor: place.node.gpus for place in places if place.gpus} == {"engine-0": 2, "learner-0": 2}

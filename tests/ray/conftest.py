"""Real Ray clusters on this machine. Most tests in this process share one; commands in processes of their own start and
end theirs."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import ray

from rayalign.build import load_tokenizer, start_parts
from rayalign.console import Console
from rayalign.runtime import cluster
from rayalign.runtime.placement import RayPlacement

RAY = {
    "placement": {"name": "ray", "object_store_gib": 0.2},
    "learner": {"name": "deepspeed", "zero_stage": 0, "deadline_s": 120},
    "engine": {"name": "vllm", "max_context": 64, "max_running": 16, "kv_cache_gib": 0.1, "deadline_s": 120},
}
LIGHT = {**RAY, "engine": {"name": "transformers", "max_context": 64, "deadline_s": 60}}


@pytest.fixture(scope="package", autouse=True)
def left_behind():
    """Nothing, for tests of other folders in this process: some ask whether there is a cluster."""
    yield
    ray.shutdown()


@pytest.fixture
def shared():
    """A cluster that is there already, and stays."""
    cluster.connect(RayPlacement(object_store_gib=RAY["placement"]["object_store_gib"]))


@pytest.fixture
def alone():
    """No cluster: what is tested starts its own."""
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def ended():
    """The shared cluster ends with the tests."""
    yield
    ray.shutdown()


@pytest.fixture
def start(tmp_path, shared):
    """The parts of a config, running: `with start(config) as parts`."""

    @contextmanager
    def running(config, name="parts"):
        with start_parts(config, load_tokenizer(config), tmp_path / name, Console()) as parts:
            yield parts

    return running

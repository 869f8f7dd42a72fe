"""Settings for all tests: the repository on the path, one thread, and no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

import torch  # noqa: E402  (after the environment is set)

torch.set_num_threads(1)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

from rayalign.config import parse_config  # noqa: E402
from tests.parts import tiny_config  # noqa: E402
from tests.tiny_models import build_tiny_llama  # noqa: E402

settings.register_profile("same", derandomize=True)
settings.load_profile("same")  # what passes once passes again: --hypothesis-profile=default looks further


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny random llama, as a folder."""
    return build_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make(tmp_path, model):
    """A checked config of the tiny model, with changes."""
    return lambda **changes: parse_config(tiny_config(tmp_path, model, **changes))


def pytest_xdist_make_scheduler(config, log):
    """Two workers: a file's tests stay in one (they share engines), and so do all Ray clusters, one at a time."""

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "tests/ray" if nodeid.startswith("tests/ray/") else nodeid.split("::")[0]

    return ByFile(config, log)

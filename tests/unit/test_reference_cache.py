"""The cache of a reference's log-probs: what it is known by, and files that are damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rayalign.errors import CheckpointError, ConfigError
from rayalign.learners.settings import LearnerSpec
from rayalign.learners.torch import TorchLearnerConfig
from rayalign.reference_cache import BATCH, PROGRESS, cached_reference, fingerprint
from rayalign.types import Column, Example, Sequence
from tests.tiny_models import build_tiny_llama


def rows(count: int) -> list[Example]:
    return [Example((Sequence((5, 6 + i % 90, 7 + i // 90), (8, 9)),)) for i in range(count)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    model = build_tiny_llama(tmp_path_factory.mktemp("model"))
    spec = LearnerSpec("policy", str(model), trainable=False, settings=TorchLearnerConfig(dtype="float32"))
    learner = spec.settings.build([spec], rank=0, world_size=1, address=("", 0))["policy"]
    yield learner
    learner.close()


def test_a_damaged_file_is_said_and_written_anew(policy, tmp_path):
    file, said = tmp_path / "cache" / "a.npz", []
    whole = cached_reference(iter([rows(5)]), policy, file, said.append)
    good = file.read_bytes()
    for damaged in (b"", b"no archive", good[: len(good) // 2], good[:200] + b"x" * 40 + good[240:]):
        file.write_bytes(damaged)
        said.clear()
        again = cached_reference(iter([rows(5)]), policy, file, said.append)
        assert "is damaged and is not used" in said[0]
        assert again.index == whole.index and np.array_equal(again.logps, whole.logps)
        said.clear()
        cached_reference(iter([rows(5)]), policy, file, said.append)
        assert said == []  # all of it was read


def test_long_computations_say_how_far_they_are(policy, tmp_path):
    said: list[str] = []
    many = BATCH * PROGRESS + 1
    found = cached_reference(iter([rows(many)]), policy, tmp_path / "a.npz", said.append)
    assert len(found.index) == many
    assert [line.rpartition(": ")[2] for line in said] == ["0 done", f"{BATCH * PROGRESS:,} done"]


def test_what_is_not_known_is_an_error(policy, tmp_path):
    found = cached_reference(iter([rows(2)]), policy, tmp_path / "a.npz", print)
    with pytest.raises(CheckpointError, match="does not know this row"):
        found.annotate(rows(3), (Column.LOGPS,))
    with pytest.raises(ConfigError, match="log-probs only"):
        found.annotate(rows(2), (Column.ENTROPY,))


def test_a_hub_id_is_known_by_its_commit(tmp_path, monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))

    def download(commit: str) -> str:
        """As a download leaves it."""
        folder = tmp_path / "models--some--model"
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / "config.json").write_text("{}")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return fingerprint("data", "some/model")

    absent = fingerprint("data", "some/model")
    first = download("a" * 40)
    assert len({absent, first, download("b" * 40)}) == 3
    assert download("a" * 40) == first


def test_a_folder_is_known_by_its_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = fingerprint("data", str(tmp_path), temperature=1.0)
    assert fingerprint("data", str(tmp_path), temperature=1.0) == first
    others = {fingerprint("other", str(tmp_path), temperature=1.0), fingerprint("data", str(tmp_path), temperature=2.0)}
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert first not in others | {fingerprint("data", str(Path(tmp_path)), temperature=1.0)}

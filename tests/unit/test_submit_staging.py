"""What travels with a job, and what does not: files here only, no cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rayalign
from rayalign.config import load_config, parse_config
from rayalign.errors import ConfigError, DataError
from rayalign.submit import check, collect
from tests.parts import tiny_config, write_prompts

REWARDS = """
from rayalign.scorers.base import ScorerConfig
class Politeness(ScorerConfig):
    name: str
    words: str = ""
    def start(self):
        from {helper} import score
        return score
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of a user's, which is the current one and importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


@pytest.fixture
def config(place, model):
    def make(**changes):
        changes = {"data__prompts": "prompts.jsonl", "scorer": {"name": "rules", "rule": "brevity"}, **changes}
        return parse_config(tiny_config(place, model, **{"run_dir": None, **changes}))

    return make


def write(path: Path, content: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def outside_the_package(upload) -> set[str]:
    return {name for name in upload.files if not name.startswith("rayalign/")}


def test_the_package_travels_without_caches_and_the_data_keep_their_relative_place(config, place):
    write(place / "data" / "film.jsonl", '{"prompt": "a"}\n')
    upload = collect(config(data__prompts="./data/film.jsonl"), name="my")
    assert outside_the_package(upload) == {"data/film.jsonl"}
    assert upload.config.data.prompts == "data/film.jsonl"
    package = Path(rayalign.__file__).parent
    sources = {f"rayalign/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    assert sources <= upload.files.keys()
    assert not [name for name in upload.files if "__pycache__" in name or name.endswith(".pyc")]


def test_the_written_folder_holds_a_config_that_loads_and_a_package_that_runs(config, tmp_path_factory):
    upload = collect(config(train__steps=7), name="my")
    folder = tmp_path_factory.mktemp("job")
    upload.write(folder)
    assert load_config(folder / "config.yaml") == upload.config
    assert upload.config.train.steps == 7
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        *upload.files,
        "config.yaml",
    }
    code = "import rayalign.cli, rayalign.schema; print(rayalign.__file__)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == folder / "rayalign" / "__init__.py"  # before any that is installed


def test_data_from_elsewhere_travel_and_absolute_paths_are_the_clusters(config, place, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for value, source in (("~/a.jsonl", home / "a.jsonl"), ("../b.jsonl", place.parent / "b.jsonl")):
        write_prompts(source)
        upload = collect(config(data__prompts=value), name="my")
        assert upload.config.data.prompts == f"inputs{source}"
        assert upload.files[f"inputs{source}"].samefile(source)
        source.unlink()
    for absolute in ("/data/not-here.jsonl", str(place / "prompts.jsonl")):
        upload = collect(config(data__prompts=absolute), name="my")
        assert outside_the_package(upload) == set()
        assert upload.config.data.prompts == absolute
        assert f"data.prompts {absolute}" in upload.stays


def test_a_model_never_travels(config, place, model):
    assert f"model.path {model}" in collect(config(), name="my").stays
    (place / "models").mkdir()
    (place / "models" / "mine").symlink_to(model)
    upload = collect(config(model__path="models/mine"), name="my")
    assert upload.config.model.path == str(place / "models" / "mine")
    assert outside_the_package(upload) == {"prompts.jsonl"}
    for kept in ("org/model-on-a-hub", "~/models/there-only", "/models/there-only"):
        assert collect(config(model__path=kept), name="my").config.model.path == kept


def test_the_run_directory_is_absolute_and_the_cluster_the_jobs_own(config, place):
    upload = collect(config(placement={"name": "ray", "address": "10.0.0.1:6379"}), name="my")
    assert upload.config.placement.address == "auto"
    assert upload.config.run_dir.startswith(f"{place}/runs/my-2")
    assert collect(config(run_dir="runs/a"), name="my").config.run_dir == f"{place}/runs/a"
    assert collect(config(run_dir="~/runs/a"), name="my").config.run_dir == "~/runs/a"


def test_ones_own_module_travels_with_what_it_imports_from_beside_it(config, place):
    write(place / "polite_rewards.py", REWARDS.format(helper="polite_helper"))
    write(place / "polite_helper" / "__init__.py", "import json, numpy, polite_third\nscore = len\n")
    write(place / "polite_helper" / "words.txt", "please")
    write(place / "polite_third.py", "")
    write(place / "unrelated.py", "")
    upload = collect(config(scorer={"name": "polite_rewards:Politeness"}), name="my")
    assert outside_the_package(upload) == {
        "prompts.jsonl",
        "polite_rewards.py",
        "polite_helper/__init__.py",
        "polite_helper/words.txt",
        "polite_third.py",
    }


def test_any_file_that_the_config_names_travels(config, place):
    write(place / "lexicon_rewards.py", REWARDS.format(helper="json"))
    write(place / "lexica" / "words.txt", "please")
    write(place / "head.pt")
    scorer = {"name": "lexicon_rewards:Politeness"}
    upload = collect(config(scorer={**scorer, "words": "lexica/words.txt"}), name="my")
    assert "lexica/words.txt" in upload.files
    upload = collect(config(scorer={**scorer, "words": "head.pt"}), name="my")
    assert "head.pt" not in upload.files
    assert upload.config.scorer.words == str(place / "head.pt")
    assert f"scorer.words {place / 'head.pt'}" in upload.stays
    write(place / "please")  # a word, and not a file's name
    assert "please" not in collect(config(scorer={**scorer, "words": "please"}), name="my").files


def test_outputs_weights_and_hidden_files_are_left_out_of_packages(config, place):
    package = place / "greedy_pkg"
    write(package / "__init__.py", "")
    write(package / "rewards.py", REWARDS.format(helper="json"))
    write(package / "outputs" / "__init__.py", "")  # a package that is called so
    for unwanted in (
        ".git/config",
        ".env",
        "runs/a/metrics.jsonl",
        "checkpoints/step-1/config.json",
        "wandb/log.txt",
        "weights.safetensors",
        "head.bin",
        "model.pt",
        "__pycache__/rewards.cpython-311.pyc",
        "greedy.egg-info/PKG-INFO",
    ):
        write(package / unwanted)
    upload = collect(config(scorer={"name": "greedy_pkg.rewards:Politeness"}), name="my")
    assert outside_the_package(upload) == {
        "prompts.jsonl",
        "greedy_pkg/__init__.py",
        "greedy_pkg/rewards.py",
        "greedy_pkg/outputs/__init__.py",
    }


def test_installed_packages_stay_where_they_are(config, place, monkeypatch):
    site = place / "lib" / "site-packages"
    write(site / "installed_rewards.py", REWARDS.format(helper="json"))
    monkeypatch.syspath_prepend(str(site))
    upload = collect(config(scorer={"name": "installed_rewards:Politeness"}), name="my")
    assert outside_the_package(upload) == {"prompts.jsonl"}


def test_too_much_is_refused_with_what_is_largest(config, place, tmp_path_factory):
    with (place / "huge.jsonl").open("wb") as file:
        file.truncate(130 * 2**20)  # sparse: takes no room
    folder = tmp_path_factory.mktemp("job")
    with pytest.raises(ConfigError) as error:
        collect(config(data__prompts="huge.jsonl"), name="my").write(folder)
    assert "largest: huge.jsonl 130.0 MiB, rayalign 0." in str(error.value)
    assert "at most 100 MiB" in str(error.value)
    assert not list(folder.iterdir())


def test_what_is_here_is_checked_before_anything_is_uploaded(config, place):
    check(config())
    with pytest.raises(DataError, match="there is no such file"):
        check(config(data__prompts="absent.jsonl"))
    write(place / "broken.jsonl", '{"prompt": "a"}\n{"prompt": \n')
    for model in ("org/on-a-hub", "/models/there-only"):
        with pytest.raises(DataError, match=r"broken.jsonl:2"):
            check(config(data__prompts="broken.jsonl", model__path=model))
    with pytest.raises(ConfigError, match="there is no such folder"):
        check(config(model__path="./absent"))
    with pytest.raises(ConfigError, match=r"key rollout\.prompts"):
        check(config(rollout__prompts=50))
    check(config(data__prompts="/data/not-here.jsonl"))
    check(config(data__prompts="/data/not-here.jsonl", model__path="/models/there-only"))

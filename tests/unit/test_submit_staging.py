"""What travels with a job, and what does not: files here only, no cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rayalign
from rayalign.config import load_config, parse_config, parse_job
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
    (line,) = upload.left_out
    assert line.startswith("greedy_pkg: ")
    for part in (
        "1 as possible secrets (.env)",
        "3 as outputs (checkpoints/, runs/, wandb/)",
        "3 neither sources nor small data (head.bin, model.pt, weights.safetensors)",
    ):
        assert part in line


def test_keys_never_travel_and_large_or_other_files_neither_which_is_said(config, place):
    package = place / "judge_pkg"
    sources = ("__init__.py", "rewards.py", "id_maps.py", "outputs/__init__.py", "py.typed")
    data = ("prompt.jinja", "words.JSON", "templates/page.html", "tokenizer.json", "special_tokens_map.json")
    for kept in (*sources, *data):
        write(package / kept, REWARDS.format(helper="json") if kept == "rewards.py" else "")
    secrets = (
        "credentials.json",
        "id_rsa",
        "id_work.txt",
        "keys/server.pem",
        "deploy.key",
        "secrets.py",
        "my-secret.txt",
    )
    secrets += ("prod.env", ".env.local", "secrets/openai.txt", "api_key.txt", "service-account.json", "auth.token")
    for unwanted in (*secrets, "outputs/samples.jsonl", "checkpoints_old/m.npz"):
        write(package / unwanted)
    for large, size in (("notebooks/big.npy", 20), ("big.jsonl", 3)):
        write(package / large)
        with (package / large).open("wb") as file:
            file.truncate(size * 2**20)  # sparse: takes no room
    upload = collect(config(scorer={"name": "judge_pkg.rewards:Politeness"}), name="my")
    assert outside_the_package(upload) == {"prompts.jsonl", *(f"judge_pkg/{kept}" for kept in (*sources, *data))}
    (line,) = upload.left_out
    assert f"{len(secrets)} as possible secrets (" in line
    assert "2 neither sources nor small data (notebooks/big.npy 20.0 MiB, checkpoints_old/m.npz)" in line
    assert "1 above 1 MiB (big.jsonl 3.0 MiB)" in line
    assert "1 as outputs (outputs/samples.jsonl)" in line
    assert "\n" not in line


def test_what_git_ignores_does_not_travel(config, place):
    subprocess.run(["git", "init", "-q", str(place)], check=True)
    package = place / "versioned_pkg"
    write(place / ".gitignore", "*.local.yaml\nversioned_pkg/scratch/\nversioned_private.py\n")
    write(package / "__init__.py", "import versioned_private, versioned_beside")
    write(package / "rewards.py", REWARDS.format(helper="json"))
    write(place / "versioned_private.py", "")
    write(place / "versioned_beside.py", "")
    for name in ("new.yaml", "me.local.yaml", "scratch/a.py", "scratch/é b.txt"):
        write(package / name)
    upload = collect(config(scorer={"name": "versioned_pkg.rewards:Politeness"}), name="my")
    assert outside_the_package(upload) == {
        "prompts.jsonl",
        "versioned_beside.py",
        *(f"versioned_pkg/{name}" for name in ("__init__.py", "rewards.py", "new.yaml")),
    }
    assert sorted(upload.left_out) == [
        "versioned_pkg: 3 that git ignores (me.local.yaml, scratch/a.py, scratch/é b.txt)",
        "versioned_private: 1 that git ignores (versioned_private.py)",
    ]


def test_a_key_that_the_config_names_has_to_be_on_the_cluster(config, place):
    write(place / "key_rewards.py", REWARDS.format(helper="json"))
    write(place / "keys" / "deploy.pem")
    upload = collect(config(scorer={"name": "key_rewards:Politeness", "words": "keys/deploy.pem"}), name="my")
    assert outside_the_package(upload) == {"prompts.jsonl", "key_rewards.py"}
    assert upload.config.scorer.words == str(place / "keys" / "deploy.pem")
    assert f"scorer.words {place}/keys/deploy.pem" in upload.stays
    write_prompts(place / "secret_santa.jsonl")  # prompts are prompts
    assert "secret_santa.jsonl" in collect(config(data__prompts="secret_santa.jsonl"), name="my").files


def test_variables_that_trackers_and_hubs_read_are_named_and_stay_here(config, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "HF_TOKEN", "TENSORBOARD_DEBUG"):
        monkeypatch.setenv(name, f"hunter2-{name}")
    assert collect(config(), name="my").variables == ()
    changes = {"trackers": ["wandb", {"name": "mlflow", "experiment": "a"}], "model__path": "org/on-a-hub"}
    upload = collect(config(**changes), name="my")
    assert upload.variables == (
        "HF_TOKEN (org/on-a-hub, unless public)",
        "MLFLOW_TRACKING_URI (mlflow; else mlflow.db beside the run directory)",
        "WANDB_API_KEY (wandb)",
        "WANDB_MODE (wandb; set here)",
    )
    assert "hunter2" not in str(upload)
    upload = collect(config(data__prompts="org/prompts-on-a-hub"), name="my")
    assert upload.variables == ("HF_TOKEN (org/prompts-on-a-hub, unless public)",)


def test_variables_that_are_not_set_here_are_named_in_one_line_as_well(config, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "HF_TOKEN"))]:
        monkeypatch.delenv(name)
    upload = collect(config(trackers=["wandb", "mlflow"], model__path="org/on-a-hub"), name="my")
    (line,) = [line for line in upload.lines() if "WANDB_API_KEY" in line]
    assert line.startswith("not sent, to be set on the cluster's nodes before ray start: HF_TOKEN (org/on-a-hub")
    assert "MLFLOW_TRACKING_URI" in line and "\n" not in line
    given = [{"name": "wandb", "mode": "offline"}, {"name": "mlflow", "tracking_uri": "http://mlflow:5000"}]
    upload = collect(config(trackers=given), name="my")
    assert upload.variables == ()
    assert not [line for line in upload.lines() if line.startswith("not sent")]


def test_a_file_that_cannot_be_copied_is_said(config, place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    (folder / "prompts.jsonl").mkdir()  # in the way, as a full disk or a file of another user would be
    with pytest.raises(ConfigError) as error:
        collect(config(), name="my").write(folder)
    assert [line[:10] for line in str(error.value).splitlines()[1:]] == ["  found:  ", "  rule:   ", "  remedy: "]
    assert "prompts.jsonl: Is a directory" in str(error.value)


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
    assert "largest: huge.jsonl 130.0 MiB, rayalign " in str(error.value)
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
    for texts in ("absent.txt", "absent.jsonl"):
        with pytest.raises(DataError, match=f"key algorithm.ptx.path, {texts}: there is no such file"):
            check(config(algorithm={"name": "ppo", "ptx": {"path": texts}}))
    check(config(algorithm={"name": "ppo", "ptx": {"path": "/data/not-here.txt"}}))
    check(config(data__prompts="/data/not-here.jsonl"))
    check(config(data__prompts="/data/not-here.jsonl", model__path="/models/there-only"))


def test_data_sets_to_learn_from_travel_as_prompts_do(config, place):
    write(place / "data" / "pairs.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (place / "saved").mkdir()
    sources = [{"path": "data/pairs.jsonl", "weight": 1.0}, {"path": "saved", "weight": 1.0}]
    upload = collect(config(algorithm={"name": "preference"}, data={"examples": sources}, scorer=None), name="my")
    assert outside_the_package(upload) == {"data/pairs.jsonl"}
    assert [each.path for each in upload.config.data.examples] == ["data/pairs.jsonl", str(place / "saved")]
    assert any("saved" in line for line in upload.stays)


def test_bad_rows_are_found_before_anything_is_uploaded(config, place):
    write(place / "pairs.jsonl", '{"prompt": "a", "chosen": "b", "rejected": ""}\n')
    with pytest.raises(DataError, match="pairs.jsonl"):
        check(config(algorithm={"name": "preference"}, data={"examples": "pairs.jsonl"}, scorer=None))


def test_keys_of_servers_are_named_and_caches_and_reward_models_stay(config, place, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "hunter2")
    write(place / "answers.sqlite", "all that was asked")
    ask = {
        "name": "server",
        "url": "https://host/v1",
        "model": "a/b/c",
        "key_env": "JUDGE_KEY",
        "cache": "answers.sqlite",
    }
    url = {"name": "url", "url": "https://host/score", "key_env": "REWARD_KEY"}
    reward = {"name": "reward_model", "model": "runs/reward/checkpoints/step-30"}
    parts = [{"scorer": {"name": "judge", "ask": ask}}, {"scorer": url}, {"scorer": reward}]
    upload = collect(config(scorer={"name": "mix", "scorers": parts}), name="my")
    assert upload.variables == (
        "JUDGE_KEY (the key for scorer.scorers.0.scorer.ask.url)",
        "REWARD_KEY (the key for scorer.scorers.1.scorer.url)",
    )
    assert "hunter2" not in str(upload) and "answers.sqlite" not in upload.files
    judge, _, model = (part.scorer for part in upload.config.scorer.scorers)
    assert judge.ask.cache == str(place / "answers.sqlite") and judge.ask.model == "a/b/c"
    assert model.model == str(place / "runs/reward/checkpoints/step-30")


def test_a_function_of_ones_own_travels_with_its_package(config, place):
    write(place / "my_functions" / "__init__.py", "")
    write(place / "my_functions" / "kind.py", "def score(prompts, completions):\n    return [0.0 for _ in prompts]\n")
    upload = collect(config(scorer={"name": "python", "function": "my_functions.kind:score"}), name="my")
    assert outside_the_package(upload) == {"prompts.jsonl", "my_functions/__init__.py", "my_functions/kind.py"}


def test_a_job_of_rounds_travels_as_one(place, model):
    """With the data of all stages, and what a stage has from another left to it."""
    base = tiny_config(place, model, run_dir=None, scorer={"name": "rules", "rule": "brevity"})
    del base["algorithm"], base["data"]
    write(place / "answers.jsonl", '{"prompt": "a", "completion": "b"}\n' * 9)
    rounds = [
        {"name": "answers", "algorithm": {"name": "label"}, "data": {"prompts": "prompts.jsonl"}},
        {"name": "sft", "algorithm": "sft", "data": {"examples": "answers.jsonl"}},
        {"name": "dpo", "algorithm": "preference", "data": {"examples": "stage:answers"}},
    ]
    job = parse_job({**base, "rounds": rounds, "repeat": 2})
    check(job)
    upload = collect(job, name="my")
    assert outside_the_package(upload) == {"prompts.jsonl", "answers.jsonl"}
    assert upload.stays == (f"model.path {model}",) and upload.variables == ()
    assert str(upload.config.run_dir).startswith(f"{place}/runs/my-")
    models = [stage.config.model.path for stage in upload.config.stages]
    assert models == [str(model), str(model), "stage:sft", "stage:dpo", "stage:dpo", "stage:sft-2"]
    assert [stage.config.to_dict() for stage in parse_job(upload.config.to_dict()).stages] == [
        stage.config.to_dict() for stage in upload.config.stages
    ]
    rounds[1]["data"]["examples"] = "nope.jsonl"
    with pytest.raises(DataError, match="there is no such file"):
        check(parse_job({**base, "rounds": rounds}))

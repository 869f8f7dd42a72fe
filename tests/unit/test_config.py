"""A config is refused with path, value, rule and remedy, before anything starts."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from rayalign.config import Rounds, load_config, load_job, parse_config, save_config
from rayalign.errors import ConfigError, SyncMismatch
from tests.parts import tiny_config


@pytest.fixture
def data(tmp_path):
    return tiny_config(tmp_path, tmp_path / "model")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", ["key train.stepz", "unknown key", "did you mean steps?"]),
        ("modle.path=x", ["key modle", "did you mean model?"]),
        ("learner.zero_stag=1", ["key learner.zero_stag", "unknown key"]),
        ("algorithm.loss.betta=1", ["key algorithm.loss.betta", "did you mean beta?"]),
        ("algorithm.name=online_preferense", ["key algorithm", "did you mean online_preference?"]),
        ("scorer=tests.parts:NoSuch", ["key scorer", "tests.parts:NoSuch", "holds no NoSuch"]),
        ("scorer=tests.parts:tiny_config", ["key scorer", "derived from rayalign.record.Record"]),
        ("scorer.name=rules", ["key scorer.rule", "this key is missing"]),
        ("scorer=tests.parts:Tokenz", ["key scorer", "did you mean Tokens?"]),
        ("scorer=rayalign.algorithms.reference:Reference", ["key scorer", "is no scorer: it has no start()"]),
        ("optimizer.betas=[1.5,2]", ["key optimizer.betas.0", "1.5", "below 1"]),
        ("train.steps=many", ["key train.steps", "many", "a whole number, at least 1"]),
        ("train.steps=true", ["key train.steps", "true", "a whole number"]),
        ("train.steps=0", ["key train.steps", "0", "at least 1"]),
        ("optimizer.lr=-1", ["key optimizer.lr", "-1", "a number, above 0"]),
        ("algorithm.loss.label_smoothing=0.5", ["key algorithm.loss.label_smoothing", "below 0.5"]),
        ("algorithm.reference.update=average", ["key algorithm.reference", "decay"]),
        ("sampling.min_tokens=99", ["key sampling.min_tokens", "99", "at most sampling.max_tokens=8"]),
        ("model.dtype=float8", ["key model.dtype", "float8", "one of float32, bfloat16"]),
        ("train.steps", ["command line", "not an override", "key=value"]),
    ],
)
def test_wrong_key_or_value_is_explained(data, tmp_path, override, expected):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    for part in expected:
        assert part in str(error.value), str(error.value)
    assert error.value.exit_code == 2
    assert str(error.value).count("\n") < 6


def test_missing_key_says_so(data):
    del data["algorithm"]
    with pytest.raises(ConfigError, match="key algorithm: this key is missing"):
        parse_config(data)


def test_file_that_is_not_there_not_yaml_or_empty(tmp_path):
    (tmp_path / "demo.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="did you mean .*demo.yaml"):
        load_config(tmp_path / "demmo.yaml")
    (tmp_path / "bad.yaml").write_text("a: 1\nb: [1, 2\nc: 3\n")
    with pytest.raises(ConfigError, match=r"bad.yaml:3: this is not YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="this config is empty"):
        load_config(tmp_path / "empty.yaml")


def test_overrides_reach_nested_and_short_forms(data, tmp_path):
    data["placement"] = "local"
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(data))
    config = load_config(path, ["optimizer.lr=3e-4", "algorithm.loss.beta=0.5", "learner.micro_batch_tokens=64"])
    assert (config.optimizer.lr, config.algorithm.pair_loss.beta) == (3e-4, 0.5)
    assert config.learner.micro_batch_tokens == 64
    assert config.placement.name == "local"


def test_saved_config_is_the_same_config(data, tmp_path):
    config = parse_config(data)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_errors_cross_processes_whole():
    error = SyncMismatch("weights differ", where="engine-0", value=3, rule="equal", remedy="look")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is SyncMismatch
    assert str(again) == str(error)
    assert str(error) == "engine-0: weights differ\n  found:  3\n  rule:   equal\n  remedy: look"


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_load(path):
    job = load_job(path)
    configs = [stage.config for stage in job.stages] if isinstance(job, Rounds) else [job]
    assert all(config.train.steps > 0 for config in configs)

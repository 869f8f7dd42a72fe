"""The JSON schema: what editors complete and check is what `load_config` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rayalign.algorithms import ALGORITHMS
from rayalign.config import load_job
from rayalign.engines import ENGINES
from rayalign.learners import LEARNERS
from rayalign.registry import resolve, summary
from rayalign.runtime.placement import PLACEMENTS
from rayalign.schema import json_schema
from rayalign.scorers import SCORERS
from rayalign.trackers import TRACKERS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MALFORMED = ROOT / "tests/malformed"
SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
TABLES = {**ALGORITHMS, **ENGINES, **LEARNERS, **PLACEMENTS, **SCORERS, **TRACKERS}
# Mistakes that the file alone, key by key, shows.
OF_THE_SCHEMA = (
    "unknown_top_level unknown_required_misspelt unknown_in_section unknown_several unknown_in_part unknown_deep "
    "unknown_in_tracker key_of_another_part key_of_another_placement key_in_wrong_section beta_at_the_wrong_place "
    "key_without_its_section dotted_key trl_learning_rate trl_batch_size trl_num_generations openrlhf_engines "
    "verl_gpu_memory text_for_a_number yes_for_a_number true_for_a_number fraction_for_a_whole_number "
    "thousands_by_a_comma decimal_comma unit_beside_the_number list_for_a_section text_for_a_section "
    "number_for_a_text text_for_a_list mapping_for_a_text list_for_prompts maybe_for_true_or_false three_betas "
    "one_beta empty_section empty_value zero_steps negative_seed huge_seed negative_rate held_out_in_percent "
    "top_p_zero beta_out_of_range unknown_dtype unknown_zero_stage ranks_of_torch one_sample no_model "
    "no_model_path no_rule unknown_algorithm unknown_engine unknown_loss no_name list_for_a_part "
    "name_is_a_number empty only_comments list_at_the_top only_a_word "
    "mix_of_nothing flip_prob_of_half tau_of_zero beta_of_ipo loss_of_another_algorithm loss_of_kto weight_in_words "
    "noise_without_share noise_in_percent noise_of_no_kind column_misspelt_key columns_as_a_list "
    "examples_without_path number_for_examples unknown_bad_row trl_dpo trl_dataset_of_dpo trl_kto trl_reward "
    "openrlhf_dpo"
).split()


def keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every key that the schema names, dotted, with its own schema; parts from outside apart."""
    node = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    for form in node.get("anyOf", ()):
        yield from keys(form, prefix)
    if "items" in node:
        yield from keys(node["items"], prefix)
    for key, below in node.get("properties", {}).items():
        yield f"{prefix}{key}", below
        yield from keys(below, f"{prefix}{key}.")


def test_it_is_a_schema_of_draft_2020_12():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMA["title"] == "rayalign config" and "$id" not in SCHEMA
    assert SCHEMA["additionalProperties"] is False


@pytest.mark.parametrize("path", [*CONFIGS, MALFORMED / "base.yaml"], ids=lambda path: path.stem)
def test_shipped_configs_are_valid_as_written_and_as_resolved(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    VALIDATOR.validate(yaml.safe_load(path.read_text("utf-8")))
    VALIDATOR.validate(load_job(path).to_dict())


@pytest.mark.parametrize("name", OF_THE_SCHEMA)
def test_malformed_configs_are_not(name):
    assert not VALIDATOR.is_valid(yaml.safe_load((MALFORMED / f"configs/{name}.yaml").read_text("utf-8")))


@pytest.mark.parametrize(
    ("part", "valid"),
    [
        ({"engine": "vllm"}, True),
        ({"engine": {"name": "vllm", "max_context": 128}}, True),
        ({"engine": {"name": "my_pkg.engines:Mine", "any": {"key": 1}}}, True),
        ({"scorer": "my_pkg.rewards:Politeness"}, True),
        ({"trackers": ["tensorboard", {"name": "wandb", "mode": "offline"}]}, True),
        ({"algorithm": {"name": "online_preference", "loss": {"beta": 0.2}}}, True),
        ({"algorithm": {"name": "online_preference", "pair_loss": {"beta": 0.2}}}, False),
        ({"engine": "my_pkg.engines"}, False),
        ({"engine": {"max_context": 128}}, True),  # of the usual engine
        ({"scorer": {"rule": "vader"}}, False),
        ({"scorer": "rules"}, False),
    ],
)
def test_each_way_to_name_a_part(part, valid):
    base = yaml.safe_load((MALFORMED / "base.yaml").read_text("utf-8"))
    assert VALIDATOR.is_valid({**base, **part}) is valid


def test_every_key_has_a_description():
    found = dict(keys(SCHEMA))
    assert {"train.steps", "algorithm.loss.beta", "learner.zero_stage", "trackers.mode", "scorer.rule"} <= set(found)
    assert [key for key, node in found.items() if not node.get("description", "").strip()] == []
    assert found["train.steps"]["default"] == 100 and found["train.steps"]["minimum"] == 1


@pytest.mark.parametrize("name", TABLES)
def test_every_part_says_what_it_is(name):
    """The first line of its docstring stands in lists and in editors."""
    line = summary(resolve(TABLES[name]))
    assert 15 < len(line) < 120 and line.endswith(".")
    consts = [node.get("const") for key, node in keys(SCHEMA) if key.rpartition(".")[2] == "name"]
    assert name in consts


@pytest.mark.parametrize("name", [*ALGORITHMS, *SCORERS])
def test_algorithms_and_scorers_name_their_paper(name):
    record = resolve(TABLES[name])
    assert any(year in record.paper for year in map(str, range(1990, 2030)))
    assert "paper" not in record.model_fields

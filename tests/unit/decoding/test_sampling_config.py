"""What `sampling:` can say: samples without a name, and searches that fit their algorithm."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rayalign.build import learner_temperature
from rayalign.checks import check_parts, check_training
from rayalign.config import load_config
from rayalign.decoding.config import DiverseBeamConfig, SamplingConfig
from rayalign.errors import ConfigError
from rayalign.plan import make_plan, print_plan
from rayalign.types import DiverseBeam, Sampling

ROOT = Path(__file__).resolve().parents[3]
SEARCH = {"name": "diverse_beam", "beams": 4, "groups": 2, "max_tokens": 8}


def test_sampling_without_a_name_samples(make) -> None:
    assert make(sampling={"temperature": 0.7}).sampling == SamplingConfig(temperature=0.7)
    assert make(sampling={}).sampling == make(sampling="sample").sampling == SamplingConfig()


def test_log_probs_are_those_of_what_is_sampled_where_the_algorithm_takes_ratios(make) -> None:
    sampling = {"temperature": 0.7}
    assert learner_temperature(make(sampling=sampling)) == 0.7
    assert learner_temperature(make(sampling=sampling, algorithm={"name": "dpm_calibration", "samples": 4})) == 1.0


def test_a_search_is_a_way_of_sampling(make) -> None:
    config = make(sampling={**SEARCH, "penalty": 2, "length_penalty": 0.5, "min_tokens": 3})
    assert isinstance(config.sampling, DiverseBeamConfig)
    assert config.sampling.sampling() == Sampling(8, min_tokens=3, search=DiverseBeam(4, 2, 2.0, 0.5))
    assert config.algorithm.request(config.sampling.sampling()) == [config.sampling.sampling()] * 4
    assert learner_temperature(config) == 1.0 and config.to_dict()["sampling"]["name"] == "diverse_beam"
    check_training(config)


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"groups": 3}, "key sampling.groups: the groups cannot be of the same size"),
        ({"penalty": -1}, "key sampling.penalty"),
        ({"beams": 1}, "key sampling.beams"),
        ({"beams": 6, "groups": 3}, "key sampling.beams: the search gives another number of completions"),
        ({"temperature": 0.7}, "key sampling.temperature"),
        ({"top_p": 0.9}, "key sampling.top_p"),
        ({"min_tokens": 9}, "key sampling.min_tokens: completions could never end"),
        ({"length_penalty": "long"}, "key sampling.length_penalty"),
    ],
)
def test_searches_that_cannot_be_meant_are_refused(make, sampling: dict, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make(sampling=SEARCH | sampling)
    assert says in str(refused.value)


def test_a_divisor_and_the_number_of_samples_are_suggested(make) -> None:
    with pytest.raises(ConfigError, match="set groups=5, or beams to a multiple of it"):
        make(sampling={**SEARCH, "beams": 10, "groups": 6})
    with pytest.raises(ConfigError, match="set algorithm.samples=10"):
        make(sampling={**SEARCH, "beams": 10, "groups": 10})


def test_more_candidates_than_the_vocabulary_has_continuations(make) -> None:
    config = make(sampling={**SEARCH, "beams": 200, "groups": 200, "max_tokens": 1}, algorithm__samples=200)
    with pytest.raises(ConfigError, match="not as many different completions as beams") as refused:
        check_parts(config)
    assert "at most 160 completions of 1 of 160 tokens" in str(refused.value)
    wide = make(sampling={**SEARCH, "beams": 200, "groups": 2}, algorithm__samples=200)
    with pytest.raises(ConfigError, match="more beams than this vocabulary can fill"):
        check_parts(wide)


def test_self_play_takes_samples(make, tmp_path) -> None:
    data = {"examples": str(tmp_path / "none.jsonl")}
    algorithm = {"name": "spin", "iterations": 1, "steps": 2}
    with pytest.raises(ConfigError, match="takes one answer for each row"):
        make(sampling=SEARCH, algorithm=algorithm, data=data, scorer=None, train={})


def planned(config) -> str:
    out = io.StringIO()
    print_plan(make_plan(config, nodes="1x2cpu/16GiB"), Console(file=out, width=200))
    return " ".join(out.getvalue().split())


def test_a_plan_says_what_a_search_costs(make) -> None:
    vllm = {"name": "vllm", "max_context": 64, "max_running": 2, "kv_cache_gib": 0.1}
    told = planned(make(sampling=SEARCH, engine=vllm))
    assert "4 × 4 = 16 completions" in told and "up to 128 sampled" in told
    assert "2 groups of 2: new requests where beams part, two to four times slower than groups=4" in told
    assert "of a search's 4 requests engine.max_running=2 run at a time" in told
    assert "evaluations sample ordinarily, at temperature 1" in told
    told = planned(make(sampling={**SEARCH, "groups": 4}, engine=vllm))
    assert "4 groups of 1: one pass of the engine, as 4 requests" in told
    assert "one prompt after the other" in planned(make(sampling=SEARCH))


def test_a_generation_is_planned_without_scorer_and_learner(monkeypatch, model) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(ROOT / "configs/generate.yaml", [f"model.path={model}"])
    plan = make_plan(config, nodes="1x2cpu/16GiB")
    assert plan.fits and {place.actor for place in plan.fit.places} == {"engine-0"}
    told = planned(config)
    assert "240 training prompts: 2,400 completions" in told and "optimiser" not in told

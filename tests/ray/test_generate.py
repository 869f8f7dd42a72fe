"""Generation through Ray actors with vLLM: the same candidates as in this process."""

from __future__ import annotations

import pytest

from rayalign.generate import run_generation
from tests.loop.test_label import lines
from tests.ray.conftest import RAY

GENERATE = {"algorithm": {"name": "generate"}, "scorer": None}


@pytest.mark.parametrize("groups", [4, 2])
def test_candidates_are_those_of_the_reference_engine(make, tmp_path, shared, groups: int) -> None:
    sampling = {"name": "diverse_beam", "beams": 4, "groups": groups, "penalty": 1.0, "max_tokens": 6}
    here = run_generation(make(**GENERATE, sampling=sampling, run_dir=str(tmp_path / "here")))
    there = run_generation(make(**GENERATE, **RAY, sampling=sampling, run_dir=str(tmp_path / "there")))
    for ours, other in zip(lines(here.file), lines(there.file), strict=True):
        assert ours["prompt_index"] == other["prompt_index"]
        for a, b in zip(ours["completions"], other["completions"], strict=True):
            assert (a["token_ids"], a["group"]) == (b["token_ids"], b["group"])
            assert a["score"] == pytest.approx(b["score"], abs=1e-3)
            assert a["logps"] == pytest.approx(b["logps"], abs=1e-3)


def test_an_engine_that_dies_in_a_search_is_replaced(make, tmp_path, shared) -> None:
    """What it had open is asked again of the next one, from the beginning."""
    sampling = {"name": "diverse_beam", "beams": 4, "groups": 2, "penalty": 1.0, "max_tokens": 6}
    here = run_generation(make(**GENERATE, sampling=sampling, run_dir=str(tmp_path / "here")))
    engine = {"name": "tests.parts:FailingOnce", "flag": str(tmp_path / "failed"), "max_context": 64}
    changes = {**RAY, "engine": engine}
    there = run_generation(make(**GENERATE, **changes, sampling=sampling, run_dir=str(tmp_path / "there")))
    assert (tmp_path / "failed").exists()
    tokens = [[[c["token_ids"] for c in line["completions"]] for line in lines(g.file)] for g in (here, there)]
    assert tokens[0] == tokens[1]

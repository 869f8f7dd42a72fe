"""The numbers of transformers 4.55 (see make_group_beam.py), and what to compare with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rayalign.types import Candidate, DiverseBeam, Sampling
from tests.unit.decoding.group_beam_model import EOS

_FOUND = json.loads(Path(__file__).with_name("group_beam.json").read_text())


class Case(dict):
    """Settings, prompt and candidates."""

    def __str__(self) -> str:
        names = ("beams", "groups", "penalty", "length_penalty", "min_tokens", "max_tokens")
        return "-".join(str(self[name]) for name in names) + f"-{len(self['prompt_ids'])}-{len(self['further_ends'])}"


TINY, SMOLLM2 = ([Case(case) for case in _FOUND[name]] for name in ("tiny", "smollm2"))


def as_sampling(case: Case) -> Sampling:
    search = DiverseBeam(case["beams"], case["groups"], case["penalty"], case["length_penalty"])
    ends = tuple(case["further_ends"])
    return Sampling(case["max_tokens"], min_tokens=case["min_tokens"], stop_token_ids=ends, search=search)


def ends_of(case: Case, eos: int = EOS) -> tuple[int, ...]:
    return (eos, *case["further_ends"])


def assert_equal(found: Sequence[Candidate], case: Case, *, eos: int = EOS, atol: float = 1e-4) -> None:
    """Token for token and score for score. 4.55 tells that a candidate ended, not at which of the end tokens."""
    expected = case["candidates"]
    ends = ends_of(case, eos)
    named = [tuple(eos if token in ends else token for token in candidate.token_ids) for candidate in found]
    assert named == [tuple(each["token_ids"]) for each in expected]
    np.testing.assert_allclose(
        [c.score for c in found], [each["score"] for each in expected], atol=atol / 10, rtol=1e-5
    )
    for candidate, each in zip(found, expected, strict=True):
        assert len(candidate.logps) == len(candidate.token_ids)
        assert candidate.finish_reason == ("stop" if candidate.token_ids[-1] in ends else "length")
        if each["sum_logp"] is not None:
            assert abs(candidate.sum_logp - each["sum_logp"]) < atol
            assert abs(candidate.mean_logp - each["sum_logp"] / len(each["token_ids"])) < atol

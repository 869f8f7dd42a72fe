"""The search alone, on log-probs of any function, against the numbers of transformers 4.55."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayalign.decoding.diverse_beam import DiverseBeamSearch, check_search, continuations, top_of
from rayalign.errors import ConfigError, DataError
from rayalign.types import Candidate, DiverseBeam, Sampling
from tests.unit.decoding.group_beam_cases import TINY, as_sampling, assert_equal, ends_of
from tests.unit.decoding.group_beam_model import build_group_beam_model


@pytest.fixture(scope="module")
def logps_after(tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    folder = build_group_beam_model(tmp_path_factory.mktemp("group-beam"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def forward(prefixes: list[tuple[int, ...]]) -> torch.Tensor:
        return model(torch.tensor(prefixes)).logits[:, -1].float().log_softmax(-1)

    return forward


def run(search: DiverseBeamSearch, prompt: tuple[int, ...], forward, groups: int) -> tuple[Candidate, ...]:
    """All groups in step."""
    while not search.finished:
        for group in range(groups):
            if live := search.live(group):
                logps = forward([prompt + beam.token_ids for beam in live])
                search.advance(group, top_of(logps, search.width(group)))
    return search.candidates()


@pytest.mark.parametrize("case", TINY, ids=str)
def test_tokens_and_scores_are_those_of_transformers_4_55(case, logps_after) -> None:
    sampling = as_sampling(case)
    search = DiverseBeamSearch(sampling, ends_of(case))
    found = run(search, tuple(case["prompt_ids"]), logps_after, sampling.search.groups)
    assert_equal(found, case)
    assert len(found) == sampling.search.beams
    sizes = np.bincount([candidate.group for candidate in found])
    assert set(sizes.tolist()) == {sampling.search.beams // sampling.search.groups}


def test_the_cases_are_worth_it() -> None:
    """Candidates end at different lengths, also at a second end token, and groups have one beam or several."""
    lengths = [{len(candidate["token_ids"]) for candidate in case["candidates"]} for case in TINY]
    assert sum(len(each) > 1 for each in lengths) >= 10
    of_one = [case["beams"] == case["groups"] for case in TINY]
    assert any(len(each) > 1 and one for each, one in zip(lengths, of_one, strict=True))
    assert any(len(each) > 1 and not one for each, one in zip(lengths, of_one, strict=True))
    assert {len(case["further_ends"]) for case in TINY} == {0, 1, 2}


@pytest.mark.parametrize("case", [case for case in TINY if case["beams"] == case["groups"]][:4], ids=str)
def test_groups_may_run_ahead_and_ask_again(case, logps_after) -> None:
    """One group after the other to its end, each position asked twice, first with numbers that mean nothing."""
    sampling, prompt = as_sampling(case), tuple(case["prompt_ids"])
    search = DiverseBeamSearch(sampling, ends_of(case))
    nonsense = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for group in range(sampling.search.groups):
        for position in itertools.count():
            if not (live := search.live(group)):
                break
            logps = logps_after([prompt + live[0].token_ids])
            search.advance(group, top_of(nonsense, search.width(group)), position)
            search.advance(group, top_of(logps, search.width(group)), position)
            assert search.token(group, position) in range(64)
    assert_equal(search.candidates(), case)


def test_a_group_that_is_behind_is_an_error() -> None:
    search = DiverseBeamSearch(Sampling(4, search=DiverseBeam(2, 2)), (1,))
    top = top_of(torch.linspace(0, 1, 16)[None].log_softmax(-1), 16)
    with pytest.raises(ValueError, match="group 0 has not been at position 0"):
        search.advance(1, top)
    search.advance(0, top)
    with pytest.raises(ValueError, match="position 2 is not its next one"):
        search.advance(0, top, 2)
    with pytest.raises(ValueError, match="1 continuations are known, and 2 are ranked"):
        search.advance(0, top_of(torch.linspace(0, 1, 16)[None].log_softmax(-1), 1))


def table(rows: dict[tuple[int, ...], list[float]]):
    """Prefix → log-probs of probabilities; the same for every prefix that is not named, by the key ()."""

    def forward(prefixes: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor([rows.get(prefix, rows[()]) for prefix in prefixes]).log()

    return forward


def test_what_a_finished_group_adds_to_the_penalty() -> None:
    """Three groups of one; token 0 ends. The first ends at once, and adds its second-best token there, 1, and then the
    end token. So the second takes 2, and at the next position the end token has lost its lead."""
    forward = table({(): [0.4, 0.3, 0.2, 0.1], (2,): [0.55, 0.25, 0.15, 0.05]})
    search = DiverseBeamSearch(Sampling(2, search=DiverseBeam(3, 3, penalty=1.0)), (0,))
    # the second group at first: the end token has lost nothing, as it was not said; so it ends as well, and says 2
    found = run(search, (), forward, 3)
    assert [c.token_ids for c in found if c.group in (0, 1)] == [(0,), (0,)]
    third = next(c for c in found if c.group == 2)
    assert third.token_ids == (0,)
    search = DiverseBeamSearch(Sampling(2, min_tokens=1, search=DiverseBeam(3, 3, penalty=1.0)), (0,))
    # first position: 1, 2 (1: .3/e = .11), then 1: .11, 2: .07, 3: .1 → 1 again.
    # second: the first group (after 1) ends, .4, and says 1. The second (after 2) ends, .55. The third (after 1): .4.
    found = run(search, (), forward, 3)
    by_group = {c.group: c for c in found}
    assert [by_group[g].token_ids for g in range(3)] == [(1, 0), (2, 0), (1, 0)]
    assert by_group[2].score == pytest.approx((np.log(0.3) - 1 + np.log(0.4)) / 2, abs=1e-6)
    assert by_group[2].sum_logp == pytest.approx(np.log(0.3) + np.log(0.4), abs=1e-6)


def test_later_positions_of_a_finished_group_say_the_end_token() -> None:
    """The first group ends at the first position; the second does not, as 4 has lost nothing and leads there. At the
    second position the end token has lost 1 nat to the finished group: .5/e < .3."""
    forward = table({(): [0.5, 0.3, 0.1, 0.1], (1,): [0.5, 0.3, 0.1, 0.1]})
    search = DiverseBeamSearch(Sampling(3, search=DiverseBeam(2, 2, penalty=1.0)), (0,))
    first = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    search.advance(0, top_of(first, 4))
    assert search.ended(0) and search.token(0, 0) == 0 and search.token(0, 7) == 0
    search.advance(1, top_of(torch.tensor([[0.2, 0.1, 0.6, 0.1]]).log(), 4))
    assert search.token(1, 0) == 2
    search.advance(1, top_of(forward([()]), 4))
    assert search.token(1, 1) == 1
    search.advance(1, top_of(forward([()]), 4))
    assert [c.token_ids for c in search.candidates() if c.group == 1] == [(2, 1, 1)]


def test_of_equal_scores_the_later_one_comes_first() -> None:
    forward = table({(): [0.25, 0.25, 0.25, 0.25]})
    found = run(DiverseBeamSearch(Sampling(2, min_tokens=2, search=DiverseBeam(2, 2, 0.0)), (0,)), (), forward, 2)
    assert [candidate.group for candidate in found] == [1, 0] and found[0].score == found[1].score


def test_only_the_candidates_of_a_search_are_searched() -> None:
    sampling = Sampling(8, search=DiverseBeam(4, 2))
    assert sampling.truncated and not sampling.ordinary.truncated
    assert sampling.ordinary == Sampling(8) and Sampling(3, 0.5).ordinary == Sampling(3, 0.5)
    with pytest.raises(ValueError, match="no search"):
        DiverseBeamSearch(Sampling(3), (1,))


@pytest.mark.parametrize(
    ("search", "more", "what"),
    [
        (DiverseBeam(6, 4), {}, "cannot be of the same size"),
        (DiverseBeam(1, 1), {}, "cannot be of the same size"),
        (DiverseBeam(6, 3, penalty=-1.0), {}, "cannot be penalised so"),
        (DiverseBeam(6, 3, penalty=float("nan")), {}, "cannot be penalised so"),
        (DiverseBeam(6, 3, length_penalty=float("inf")), {}, "cannot be penalised so"),
        (DiverseBeam(40, 2), {}, "more beams than this vocabulary can fill"),
        (DiverseBeam(40, 40), {"max_tokens": 1}, "not as many different completions as beams"),
        (DiverseBeam(4, 4), {"choices": (3,)}, "has no choices"),
    ],
)
def test_searches_that_mean_nothing_are_refused(search: DiverseBeam, more: dict, what: str) -> None:
    sampling = replace(Sampling(8, search=search), **more)
    with pytest.raises(DataError, match=what):
        check_search(sampling, vocabulary=32, end_ids=(1,), where="request r0")
    with pytest.raises(ConfigError, match=what):
        check_search(sampling, vocabulary=32, end_ids=(1,), where="key sampling", error=ConfigError)


def test_a_model_without_an_end_token_is_refused() -> None:
    with pytest.raises(DataError, match="no end token"):
        check_search(Sampling(8, search=DiverseBeam(4, 2)), vocabulary=32, end_ids=(), where="request r0")


def test_continuations_are_counted() -> None:
    """Of 3 tokens one ends: 1 + 2 = 3 of one token, 1 + 2·1 + 2·2 = 7 of two, 2 + 4 where the first may not end."""
    many = DiverseBeam(1000, 1000)
    assert continuations(Sampling(1, search=many), 3, 1) == 3
    assert continuations(Sampling(2, search=many), 3, 1) == 7
    assert continuations(Sampling(2, min_tokens=1, search=many), 3, 1) == 6
    assert continuations(Sampling(2000, search=many), 49152, 1) >= 1000
    assert continuations(Sampling(5, min_tokens=5, search=many), 1, 1) == 0

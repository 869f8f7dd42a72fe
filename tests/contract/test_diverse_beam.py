"""Diverse beam search by both engines: the numbers of transformers 4.55, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayalign.engines.transformers import TransformersEngineConfig
from rayalign.engines.vllm import VLLMEngineConfig, _vllm_environment
from rayalign.errors import DataError
from rayalign.protocols import Engine
from rayalign.sync.flat import pack
from rayalign.types import Completion, DiverseBeam, Request, Sampling
from tests.contract.test_engine_contract import drain, serve
from tests.unit.decoding.group_beam_cases import SMOLLM2, TINY, Case, as_sampling, assert_equal
from tests.unit.decoding.group_beam_model import build_group_beam_model

SMOLLM2_FOLDER = Path("~/.cache/rayalign/models/SmolLM2-135M-Instruct").expanduser()
# Fewer run at once than a search has beams; and of "tight" not even those have room for their keys and values.
CONFIGS = {
    "transformers": TransformersEngineConfig(max_context=96, max_running=8),
    "vllm": VLLMEngineConfig(max_context=96, max_running=8, kv_cache_gib=0.05),
    "tight": VLLMEngineConfig(max_context=200, max_running=16, kv_cache_gib=0.0008),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_group_beam_model(tmp_path_factory.mktemp("group-beam"))


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    engine = CONFIGS[request.param].build(model=str(folder), name=request.param)
    yield engine
    engine.close()


def asked(case: Case, name: str) -> Request:
    return Request(name, tuple(case["prompt_ids"]), as_sampling(case), seed=0)


def kept(engine: Engine) -> int:
    """Searches that the engine's processor still holds."""
    if not hasattr(engine, "_llm"):
        return 0 if engine._search is None else 1
    return len(engine._llm.collective_rpc(lambda worker: worker._rayalign_searches()._searches)[0])


def test_all_cases_at_once_beside_ordinary_requests(engine: Engine) -> None:
    """Each search equals 4.55 token for token and score for score; each sample is the one that it is alone."""
    plain = [Request(f"s{n}", (2, 40, n), Sampling(20, temperature=0.9), seed=n) for n in range(6)]
    alone = serve(engine, *plain)
    searches = [asked(case, f"c{n}") for n, case in enumerate(TINY)]
    mixed = [request for n, search in enumerate(searches) for request in (search, *plain[n : n + 1])]
    engine.submit(mixed)
    found = drain(engine, len(mixed))
    for request, case in zip(searches, TINY, strict=True):
        completion = found[request.id]
        assert_equal(completion.candidates, case)
        best = completion.candidates[0]
        assert (completion.token_ids, completion.logps) == (best.token_ids, best.logps)
        assert completion.finish_reason == best.finish_reason and completion.version == engine.version
    for before in alone:
        assert found[before.request_id].token_ids == before.token_ids
        assert found[before.request_id].candidates == ()
    assert kept(engine) == 0


def test_requests_are_put_off_where_memory_is_tight(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM stops requests of searches half-way, as they grow into a new block, and reads them anew."""
    if engine.name != "tight":
        pytest.skip("there is room for all keys and values")
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
    put_off, original = [], scheduler._preempt_request

    def counted(request, *more, **named):
        put_off.append(request)
        return original(request, *more, **named)

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    sampling = Sampling(24, search=DiverseBeam(10, 10, 2.0))
    requests = [Request(f"r{n}", tuple(range(2 + n, 57 + n)) * 2, sampling, 0) for n in range(2)]
    found = serve(engine, *requests)
    assert put_off
    other = TransformersEngineConfig(max_context=200).build(model=str(folder))
    for completion, expected in zip(found, serve(other, *requests), strict=True):
        assert [c.token_ids for c in completion.candidates] == [c.token_ids for c in expected.candidates]
        scores = [[c.score for c in each.candidates] for each in (completion, expected)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_the_same_prompt_twice_and_again(engine: Engine) -> None:
    case = next(case for case in TINY if case["beams"] == 10)
    for name in ("first", "second"):
        for completion in serve(engine, asked(case, f"{name}/0"), asked(case, f"{name}/1")):
            assert_equal(completion.candidates, case)


@pytest.mark.parametrize("of_one", [True, False])
def test_an_aborted_search_leaves_nothing_behind(engine: Engine, of_one: bool) -> None:
    cases = [case for case in TINY if (case["beams"] == case["groups"]) == of_one]
    engine.submit([Request("r2", (3, 4), Sampling(2, 0.0), 0), asked(cases[0], "r0"), asked(cases[1], "r1")])
    drain(engine, 1)  # the searches are under way
    engine.abort(["r0", "r1", "r1", "never"])
    assert kept(engine) == 0 and engine.poll(0.0) == []
    (again,) = serve(engine, asked(cases[1], "r0"))
    assert_equal(again.candidates, cases[1])
    assert kept(engine) == 0


def test_searches_follow_the_weights(engine: Engine, folder: Path) -> None:
    case = next(case for case in TINY if case["beams"] != case["groups"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = pack(model.named_parameters(), 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    engine.load(pack(model.named_parameters(), 3))
    (moved,) = serve(engine, asked(case, "r0"))
    engine.load(base)
    (back,) = serve(engine, asked(case, "r0"))
    assert moved.version == 3 and moved.candidates[0].logps != back.candidates[0].logps
    assert_equal(back.candidates, case)


def test_what_cannot_be_searched_is_refused_before_anything_is_taken_in(engine: Engine) -> None:
    good = Request("r0", (3, 4), Sampling(4), 0)
    for search, what in (
        (DiverseBeam(6, 4), "cannot be of the same size"),
        (DiverseBeam(4, 4, penalty=-0.5), "cannot be penalised so"),
        (DiverseBeam(128, 2), "more beams than this vocabulary can fill"),
    ):
        with pytest.raises(DataError, match=f"request r1: .*{what}"):
            engine.submit([good, Request("r1", (3, 4), Sampling(4, search=search), 0)])
    with pytest.raises(DataError, match="request r1: there are not as many different completions"):
        engine.submit([good, Request("r1", (3, 4), Sampling(1, search=DiverseBeam(100, 100)), 0)])
    assert engine.poll(0.0) == []
    (completion,) = serve(engine, good)
    assert isinstance(completion, Completion)


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks are bound to cores where there is no GPU")
def test_a_process_that_has_had_an_engine_can_start_one_of_several_ranks() -> None:
    """vLLM keeps the environment that it has seen once an engine has started."""
    from vllm import envs

    envs.enable_envs_cache()
    config = VLLMEngineConfig(max_context=96, tensor_parallel=2)
    assert "|" not in envs.VLLM_CPU_OMP_THREADS_BIND
    with _vllm_environment(config, (0, 1), eager=True):
        assert envs.VLLM_CPU_OMP_THREADS_BIND == "0|1"
    assert "|" not in envs.VLLM_CPU_OMP_THREADS_BIND


def test_tensor_parallel_ranks_search(folder: Path) -> None:
    """Two worker processes, each with a processor of its own; both ways of searching."""
    cases = [next(c for c in TINY if c["beams"] == c["groups"]), next(c for c in TINY if c["beams"] != c["groups"])]
    config = VLLMEngineConfig(max_context=96, max_running=16, tensor_parallel=2, kv_cache_gib=0.05)
    engine = config.build(model=str(folder), name="pair")
    try:
        found = serve(engine, *(asked(case, f"r{n}") for n, case in enumerate(cases)))
        for completion, case in zip(found, cases, strict=True):
            assert_equal(completion.candidates, case)
    finally:
        engine.close()


@pytest.mark.skipif(not (SMOLLM2_FOLDER / "config.json").is_file(), reason="launch/demo.sh makes this model")
@pytest.mark.skipif(not SMOLLM2, reason="group_beam.json has no numbers of SmolLM2")
@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_smollm2(name: str) -> None:
    build = {"transformers": TransformersEngineConfig, "vllm": VLLMEngineConfig}[name]
    engine = build(dtype="float32", max_context=128, max_running=32).build(model=str(SMOLLM2_FOLDER))
    try:
        cases = SMOLLM2 if name == "vllm" else SMOLLM2[:2]
        found = serve(engine, *(asked(case, f"r{n}") for n, case in enumerate(cases)))
        for completion, case in zip(found, cases, strict=True):
            assert_equal(completion.candidates, case, eos=engine._end_ids[0], atol=1e-3)
    finally:
        engine.close()

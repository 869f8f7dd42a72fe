"""What every engine has to do, checked against a transformers forward pass and a log-softmax."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rayalign.engines.common import MOST_CHOICES
from rayalign.errors import DataError, SyncMismatch
from rayalign.protocols import Engine, WeightPush
from rayalign.sync.flat import pack
from rayalign.types import Completion, Request, Sampling
from tests.contract.conftest import MAX_CONTEXT
from tests.tiny_models import EOS_ID, VOCAB_SIZE

PROMPT = (2, 40, 57, 99, 3)
SEQUENCE = (2, 40, 57, 99, 3, 100, 12, 77, 1)
TOLERANCE = 1e-3


def drain(engine: Engine, count: int) -> dict[str, Completion]:
    """Poll until `count` requests have come back (100 polls in a row without any is a failure)."""
    done: dict[str, Completion] = {}
    idle = 0
    while len(done) < count and idle < 100:
        finished = engine.poll(1.0)
        idle = 0 if finished else idle + 1
        for completion in finished:
            assert completion.request_id not in done
            done[completion.request_id] = completion
    assert len(done) == count
    return done


def serve(engine: Engine, *requests: Request) -> list[Completion]:
    engine.submit(requests)
    done = drain(engine, len(requests))
    return [done[request.id] for request in requests]


def ask(index: int, *, prompt: tuple[int, ...] = PROMPT, seed: int = 0, **sampling) -> Request:
    return Request(f"r{index}", prompt, Sampling(**{"max_tokens": 12} | sampling), seed)


@torch.no_grad()
def forward_logits(model: PreTrainedModel, sequence: tuple[int, ...]) -> torch.Tensor:
    """[n − 1, V] logits that predict tokens 1 … n−1."""
    return model(torch.tensor([sequence])).logits[0, :-1].float()


def forward_logps(model: PreTrainedModel, sequence: tuple[int, ...]) -> np.ndarray:
    labels = torch.tensor(sequence[1:])[:, None]
    return forward_logits(model, sequence).log_softmax(-1).gather(1, labels)[:, 0].numpy()


def sampled_logps(model: PreTrainedModel, completion: Completion, request: Request) -> np.ndarray:
    """Log-probs of the completion's tokens after temperature, top-k and top-p, worked out one by one."""
    sampling = request.sampling
    logits = forward_logits(model, request.prompt_ids + completion.token_ids)[len(request.prompt_ids) - 1 :]
    expected = []
    for row, token in zip(logits / (sampling.temperature or 1.0), completion.token_ids, strict=True):
        order = row.argsort(descending=True).tolist()
        kept = order[: sampling.top_k or None]
        probs, mass, nucleus = row[kept].softmax(-1), 0.0, []
        for candidate, prob in zip(kept, probs.tolist(), strict=True):
            if mass >= sampling.top_p:
                break
            nucleus.append(candidate)
            mass += prob
        assert token in nucleus
        expected.append(float(row[token] - row[nucleus].logsumexp(-1)))
    return np.array(expected)


def with_chunk_data(push: WeightPush, change) -> WeightPush:
    """The push with the bytes of its first chunk changed on the way."""
    data = push.chunks[0].data.copy()
    change(data)
    return replace(push, chunks=(replace(push.chunks[0], data=data), *push.chunks[1:]))


def test_is_an_engine(engine: Engine) -> None:
    assert isinstance(engine, Engine)
    assert engine.memory_gib() > 0.05


def test_every_request_comes_back_once_and_short_ones_first(engine: Engine) -> None:
    assert engine.poll(0.0) == []
    lengths = [30, 2, 17, 30, 5, 1, 30, 9]
    engine.submit([ask(index, max_tokens=length, min_tokens=length) for index, length in enumerate(lengths)])
    order = []
    for _ in range(1000):
        order += engine.poll(1.0)
        if len(order) == len(lengths):
            break
    assert sorted(completion.request_id for completion in order) == [f"r{index}" for index in range(len(lengths))]
    assert [len(completion.token_ids) for completion in order] == sorted(lengths)
    assert engine.poll(0.0) == []


def test_more_requests_than_run_at_once_and_prompts_of_different_lengths(engine: Engine) -> None:
    requests = [ask(index, prompt=PROMPT + tuple(range(10, 10 + index % 7)), seed=index) for index in range(30)]
    for request, completion in zip(requests, serve(engine, *requests), strict=True):
        assert completion.request_id == request.id
        assert len(completion.logps) == len(completion.token_ids) <= 12


def test_logps_are_those_of_a_forward_pass(engine: Engine, base_model: PreTrainedModel) -> None:
    sequences = [SEQUENCE, (5,), SEQUENCE[:2], tuple(range(4, 4 + MAX_CONTEXT))]
    found = engine.logps(sequences)
    assert [array.shape for array in found] == [(len(sequence) - 1,) for sequence in sequences]
    for array, sequence in zip(found, sequences, strict=True):
        expected = forward_logps(base_model, sequence) if len(sequence) > 1 else np.empty(0)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, atol=TOLERANCE)


def test_mixed_sampling_in_one_batch_gives_the_logps_that_were_sampled(
    engine: Engine, base_model: PreTrainedModel
) -> None:
    kinds = [
        {},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_k": 8},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.0},
    ]
    requests = [ask(index, seed=index, **kind) for index, kind in enumerate(kinds)]
    for request, completion in zip(requests, serve(engine, *requests), strict=True):
        expected = sampled_logps(base_model, completion, request)
        np.testing.assert_allclose(completion.logps, expected, atol=TOLERANCE, err_msg=str(request.sampling))


def test_choices_have_the_logps_of_the_whole_distribution_however_it_is_sampled(
    engine: Engine, base_model: PreTrainedModel
) -> None:
    """At the first position and temperature 1, before top-k, top-p and min_tokens; beside requests without any."""
    choices = (EOS_ID, 99, 12, 40)
    expected = forward_logits(base_model, (*PROMPT, 0))[-1].log_softmax(-1)[list(choices)].numpy()
    kinds = [
        {"max_tokens": 1, "temperature": 0.0},
        {"temperature": 0.0},
        {},
        {"temperature": 0.6, "top_k": 2},
        {"top_p": 0.1},
        {"min_tokens": 5},
        {"temperature": 0.0, "min_tokens": 5},
        {"max_tokens": 1, "temperature": 2.0},
    ]
    asked = [ask(index, seed=index, choices=choices, **kind) for index, kind in enumerate(kinds)]
    others = [ask(20 + index, seed=index, **kind) for index, kind in enumerate(kinds)]
    mixed = [request for pair in zip(asked, others, strict=True) for request in pair]
    found = {completion.request_id: completion for completion in serve(engine, *mixed)}
    for request, other in zip(asked, others, strict=True):
        completion, same = found[request.id], found[other.id]
        np.testing.assert_allclose(completion.choice_logps, expected, atol=TOLERANCE, err_msg=str(request.sampling))
        assert same.choice_logps == ()
        assert completion.token_ids == same.token_ids and completion.finish_reason == same.finish_reason
        np.testing.assert_allclose(completion.logps, same.logps, atol=TOLERANCE)
    (turned,) = serve(engine, ask(0, max_tokens=1, temperature=0.0, choices=choices[::-1]))
    np.testing.assert_allclose(turned.choice_logps, expected[::-1], atol=TOLERANCE)
    many = tuple(range(MOST_CHOICES))
    (scale,) = serve(engine, ask(0, max_tokens=1, choices=many))
    whole = forward_logits(base_model, (*PROMPT, 0))[-1].log_softmax(-1)[list(many)].numpy()
    np.testing.assert_allclose(scale.choice_logps, whole, atol=TOLERANCE)
    (reading,) = serve(engine, ask(0, prompt=(7,), max_tokens=1, choices=(5,)))
    first = forward_logits(base_model, (7, 0))[-1].log_softmax(-1)[5]
    np.testing.assert_allclose(reading.choice_logps, [float(first)], atol=TOLERANCE)


def test_choices_of_aborted_requests_are_forgotten(engine: Engine, base_model: PreTrainedModel) -> None:
    engine.submit([ask(0, choices=(9,), temperature=0.5, max_tokens=50, min_tokens=50), ask(1, max_tokens=2)])
    while not engine.poll(0.0):
        pass
    engine.abort(["r0"])
    (again,) = serve(engine, ask(0, choices=(10,), temperature=0.5))
    expected = forward_logits(base_model, (*PROMPT, 0))[-1].log_softmax(-1)[10]
    np.testing.assert_allclose(again.choice_logps, [float(expected)], atol=TOLERANCE)


def test_choices_that_cannot_be_told_apart_are_refused(engine: Engine) -> None:
    with pytest.raises(DataError, match="request r0: these choices cannot be told apart"):
        engine.submit([ask(0, choices=(5, 5))])
    with pytest.raises(DataError, match="request r1: too many choices"):
        engine.submit([ask(1, choices=tuple(range(129)))])


def test_greedy_takes_the_likeliest_token(engine: Engine, base_model: PreTrainedModel) -> None:
    (completion,) = serve(engine, ask(0, temperature=0.0, seed=9))
    logits = forward_logits(base_model, PROMPT + completion.token_ids)[len(PROMPT) - 1 :]
    assert list(completion.token_ids) == logits.argmax(-1).tolist()


def test_tokens_follow_the_seed_whatever_else_is_in_the_batch(engine: Engine) -> None:
    request = ask(0, seed=1234, temperature=0.9, max_tokens=20)
    (alone,) = serve(engine, request)
    crowd = [ask(index, seed=index, temperature=1.1, max_tokens=3 * index) for index in range(1, 12)]
    among = serve(engine, *crowd, request)[-1]
    assert among.token_ids == alone.token_ids
    np.testing.assert_allclose(among.logps, alone.logps, atol=TOLERANCE)
    others = serve(engine, *[ask(index, seed=index, temperature=0.9, max_tokens=20) for index in range(6)])
    assert len({completion.token_ids for completion in others}) == 6


def test_sampling_follows_the_distribution(engine: Engine, base_model: PreTrainedModel) -> None:
    """1,000 first tokens at top_k=4 against their probabilities (chi-squared, 3 degrees: 16.3 is 1 in 1,000)."""
    counts = np.zeros(VOCAB_SIZE)
    for start in range(0, 1000, 100):
        requests = [ask(index, seed=start + index, max_tokens=1, top_k=4) for index in range(100)]
        for completion in serve(engine, *requests):
            counts[completion.token_ids[0]] += 1
    best = forward_logits(base_model, (*PROMPT, 0))[-1].topk(4)
    expected = best.values.softmax(-1).numpy() * 1000
    found = counts[best.indices.numpy()]
    assert found.sum() == 1000
    assert ((found - expected) ** 2 / expected).sum() < 16.3


def test_end_tokens_are_kept_and_reasons_are_told(engine: Engine) -> None:
    requests = [ask(index, seed=index, max_tokens=90, temperature=1.2) for index in range(40)]
    completions = serve(engine, *requests)
    ended = [completion for completion in completions if completion.finish_reason == "stop"]
    cut = [completion for completion in completions if completion.finish_reason == "length"]
    assert ended and cut and len(ended) + len(cut) == 40
    for completion in ended:
        assert completion.token_ids[-1] == EOS_ID and EOS_ID not in completion.token_ids[:-1]
    for completion in cut:
        assert EOS_ID not in completion.token_ids and len(completion.token_ids) == 90


def test_stop_tokens_and_min_tokens(engine: Engine) -> None:
    (free,) = serve(engine, ask(0, temperature=0.0))
    stop = free.token_ids[3]
    until = free.token_ids.index(stop) + 1
    (stopped,) = serve(engine, ask(0, temperature=0.0, stop_token_ids=(stop,)))
    assert stopped.token_ids == free.token_ids[:until] and stopped.finish_reason == "stop"
    everything = tuple(range(VOCAB_SIZE // 2))
    short, long = serve(
        engine, ask(0, seed=2, stop_token_ids=everything), ask(1, seed=2, stop_token_ids=everything, min_tokens=6)
    )
    assert len(short.token_ids) < 6 < len(long.token_ids)
    assert not set(long.token_ids[:6]) & set(everything)


def test_load_brings_the_new_weights_and_their_version(engine: Engine, perturbed: PreTrainedModel) -> None:
    before = engine.logps([SEQUENCE])[0]
    (old,) = serve(engine, ask(0, seed=3))
    assert (old.version, engine.version) == (0, 0)
    engine.load(pack(perturbed.named_parameters(), 7, chunk_bytes=20_000))
    assert engine.version == 7
    after = engine.logps([SEQUENCE])[0]
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(after, forward_logps(perturbed, SEQUENCE), atol=TOLERANCE)
    request = ask(0, seed=3, temperature=0.7, top_k=10)
    (new,) = serve(engine, request)
    assert new.version == 7 and new.engine == old.engine
    np.testing.assert_allclose(new.logps, sampled_logps(perturbed, new, request), atol=TOLERANCE)


def test_load_drops_what_was_computed_with_older_weights(engine: Engine, perturbed: PreTrainedModel) -> None:
    """A prompt longer than any cache block, sampled before and after the load."""
    request = ask(0, prompt=tuple(range(4, 84)), max_tokens=5)
    serve(engine, request)
    engine.load(pack(perturbed.named_parameters(), 1))
    (completion,) = serve(engine, request)
    np.testing.assert_allclose(completion.logps, sampled_logps(perturbed, completion, request), atol=TOLERANCE)


def test_weights_of_another_dtype_are_cast(engine: Engine, perturbed: PreTrainedModel) -> None:
    engine.load(pack(perturbed.named_parameters(), 1, dtype=torch.bfloat16))
    rounded = {name: tensor.bfloat16().float() for name, tensor in perturbed.state_dict().items()}
    expected = torch.func.functional_call(perturbed, rounded, torch.tensor([SEQUENCE])).logits[0, :-1].detach()
    labels = torch.tensor(SEQUENCE[1:])[:, None]
    expected = expected.log_softmax(-1).gather(1, labels)[:, 0]
    np.testing.assert_allclose(engine.logps([SEQUENCE])[0], expected.numpy(), atol=TOLERANCE)


def test_one_corrupted_bit_is_noticed_and_a_good_push_heals(engine: Engine, perturbed: PreTrainedModel) -> None:
    push = pack(perturbed.named_parameters(), 4)
    spec = push.chunks[0].specs[5]

    def flip(data: np.ndarray) -> None:
        data[spec.offset + spec.nbytes // 2] ^= 1

    with pytest.raises(SyncMismatch, match="1 different") as caught:
        engine.load(with_chunk_data(push, flip))
    assert spec.name in str(caught.value) and push.manifest[spec.name] in str(caught.value)
    assert engine.version == 0
    engine.load(push)
    assert engine.version == 4
    np.testing.assert_allclose(engine.logps([SEQUENCE])[0], forward_logps(perturbed, SEQUENCE), atol=TOLERANCE)
    assert serve(engine, ask(0))[0].version == 4


def test_missing_and_unexpected_tensors_are_refused(
    engine: Engine, base_model: PreTrainedModel, perturbed: PreTrainedModel
) -> None:
    push = pack(perturbed.named_parameters(), 4)
    chunk = push.chunks[0]
    lost = replace(push, chunks=(replace(chunk, specs=chunk.specs[:-1]),))
    with pytest.raises(SyncMismatch, match=f"missing: {chunk.specs[-1].name}"):
        engine.load(lost)
    manifest = {name: value for name, value in push.manifest.items() if name != "model.norm.weight"}
    with pytest.raises(SyncMismatch, match="unexpected: model.norm.weight"):
        engine.load(replace(push, manifest=manifest))
    with pytest.raises(SyncMismatch, match="cut short|twice"):
        engine.load(replace(push, chunks=(chunk, chunk)))
    # None of these overwrote anything.
    assert engine.version == 0
    np.testing.assert_allclose(engine.logps([SEQUENCE])[0], forward_logps(base_model, SEQUENCE), atol=TOLERANCE)


@pytest.mark.parametrize("lacking", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
def test_a_push_of_another_model_is_refused(engine: Engine, perturbed: PreTrainedModel, lacking: str) -> None:
    """The manifest agrees with the chunks, but a parameter of the engine gets nothing (or part of it)."""
    named = [(name, tensor) for name, tensor in perturbed.named_parameters() if name != lacking]
    with pytest.raises(SyncMismatch, match=lacking.split(".")[-2].replace("k_proj", "(k_proj|qkv_proj)")):
        engine.load(pack(named, 4))
    engine.load(pack(perturbed.named_parameters(), 5))
    np.testing.assert_allclose(engine.logps([SEQUENCE])[0], forward_logps(perturbed, SEQUENCE), atol=TOLERANCE)


def test_unknown_names_and_wrong_shapes_are_refused(engine: Engine, perturbed: PreTrainedModel) -> None:
    named = dict(perturbed.named_parameters())
    with pytest.raises(SyncMismatch):
        engine.load(pack((named | {"value_head.weight": torch.zeros(1, 64)}).items(), 4))
    with pytest.raises(SyncMismatch):
        engine.load(pack((named | {"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 32)}).items(), 4))
    engine.load(pack(named.items(), 5))
    assert engine.version == 5
    np.testing.assert_allclose(engine.logps([SEQUENCE])[0], forward_logps(perturbed, SEQUENCE), atol=TOLERANCE)


def test_aborted_requests_never_come_back(engine: Engine, perturbed: PreTrainedModel) -> None:
    engine.submit([ask(index, max_tokens=60, min_tokens=60) for index in range(12)])
    assert engine.poll(0.0) == []  # one step: some run, some wait
    engine.abort(["r0", "r3", "r11", "never-was"])
    assert set(drain(engine, 9)) == {f"r{index}" for index in range(12)} - {"r0", "r3", "r11"}
    assert engine.poll(0.0) == []
    engine.submit([ask(0, max_tokens=60)])
    engine.poll(0.0)
    engine.abort(["r0"])
    engine.load(pack(perturbed.named_parameters(), 2))  # nothing is open any more
    assert serve(engine, ask(0))[0].version == 2


def test_weights_do_not_change_under_open_requests(engine: Engine, perturbed: PreTrainedModel) -> None:
    engine.submit([ask(0, max_tokens=50, min_tokens=50)])
    engine.poll(0.0)
    for refused in (
        lambda: engine.load(pack(perturbed.named_parameters(), 1)),
        lambda: engine.logps([SEQUENCE]),
        engine.sleep,
        engine.wake,
    ):
        with pytest.raises(RuntimeError, match="1 requests are open"):
            refused()
    assert drain(engine, 1)["r0"].version == 0


def test_sleep_and_wake_keep_the_weights(engine: Engine, perturbed: PreTrainedModel) -> None:
    engine.load(pack(perturbed.named_parameters(), 1))
    engine.sleep()
    engine.wake()
    np.testing.assert_allclose(engine.logps([SEQUENCE])[0], forward_logps(perturbed, SEQUENCE), atol=TOLERANCE)


def test_what_does_not_fit_is_refused_whole(engine: Engine) -> None:
    room = MAX_CONTEXT - len(PROMPT)
    with pytest.raises(DataError, match="request r1") as caught:
        engine.submit([ask(0), ask(1, max_tokens=room + 1)])
    assert f"at most {MAX_CONTEXT}" in str(caught.value)
    with pytest.raises(DataError, match="request r2"):
        engine.submit([ask(2, prompt=())])
    with pytest.raises(DataError, match="sequence 0"):
        engine.logps([tuple(range(4, 5 + MAX_CONTEXT))])
    with pytest.raises(ValueError, match="'r3' is open already"):
        engine.submit([ask(3), ask(3)])
    assert engine.poll(0.0) == []  # not even the good ones of those calls were taken in
    (full,) = serve(engine, ask(4, max_tokens=room, min_tokens=room))
    assert len(full.token_ids) == room

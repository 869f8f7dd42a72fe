from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.sharding import minibatches, positions_of, split

LENGTHS = st.lists(st.lists(st.integers(2, 60), min_size=1, max_size=3), max_size=30)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, ranks=st.integers(1, 5), budget=st.integers(1, 300), packed=st.booleans())
def test_split_holds_its_promises(lengths, ranks, budget, packed):
    plan = split(lengths, ranks=ranks, micro_batch_tokens=budget, packed=packed)
    flat = [index for micros in plan for micro in micros for index in micro]
    assert len(plan) == ranks and sorted(flat) == list(range(len(lengths)))
    assert len({len(micros) for micros in plan}) == 1
    for micros in plan:
        sizes = [len(micro) > 0 for micro in micros]
        assert sizes == sorted(sizes, reverse=True)  # fillers come last
        for micro in micros:
            padded = sum(len(lengths[i]) for i in micro) * max((max(lengths[i]) for i in micro), default=0)
            tokens = sum(sum(lengths[i]) for i in micro)
            assert len(micro) <= 1 or (tokens if packed else padded) <= budget
            assert len({len(lengths[i]) for i in micro}) <= 1
    if lengths:
        loads = [sum(sum(lengths[i]) for micro in micros for i in micro) for micros in plan]
        assert max(loads) - min(loads) <= max(map(sum, lengths))
        assert any(plan[rank][-1] for rank in range(ranks))  # no micro-batch that is a filler on every rank
        tokens, positions = positions_of(lengths, plan, packed=packed)
        assert tokens == sum(map(sum, lengths)) and positions == tokens if packed else positions >= tokens
    assert plan == split(lengths, ranks=ranks, micro_batch_tokens=budget, packed=packed)


def test_padding_is_counted_and_fillers_are_not():
    lengths = [[4, 6], [9, 9], [3]]
    plan = split(lengths, ranks=2, micro_batch_tokens=40)
    assert plan == [[[1], []], [[0], [2]]]
    assert positions_of(lengths, plan) == (31, 12 + 18 + 3)
    assert positions_of(lengths, plan, packed=True) == (31, 31)


def test_similar_lengths_stand_together():
    assert split([[4], [9], [5], [10]], ranks=1, micro_batch_tokens=20) == [[[3, 1], [2, 0]]]


def test_a_rank_without_examples_gets_fillers():
    assert split([[3, 4]], ranks=2, micro_batch_tokens=1) == [[[0]], [[]]]


@given(n=st.integers(0, 50), count=st.integers(1, 9), seed=st.integers(-5, 2**40), epoch=st.integers(0, 3))
def test_minibatches_partition(n, count, seed, epoch):
    parts = minibatches(n, count=count, seed=seed, epoch=epoch)
    assert sorted(index for part in parts for index in part) == list(range(n))
    assert len(parts) == min(count, n)
    assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == minibatches(n, count=count, seed=seed, epoch=epoch)


def test_one_minibatch_keeps_the_order_and_epochs_differ():
    assert minibatches(4, count=1, seed=3, epoch=1) == [[0, 1, 2, 3]]
    orders = {tuple(map(tuple, minibatches(20, count=2, seed=3, epoch=epoch))) for epoch in range(4)}
    assert len(orders) == 4


@pytest.mark.parametrize(
    "call",
    [
        lambda: split([[1]], ranks=0, micro_batch_tokens=1),
        lambda: split([[1]], ranks=1, micro_batch_tokens=0),
        lambda: minibatches(3, count=0, seed=0, epoch=0),
    ],
)
def test_sizes_below_one_are_refused(call):
    with pytest.raises(ValueError):
        call()

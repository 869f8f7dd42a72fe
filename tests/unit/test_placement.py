"""Where actors go, as tables."""

from __future__ import annotations

import pytest

from rayalign.errors import ConfigError
from rayalign.runtime.placement import Node, place

LAPTOP = [Node("a", 2, 0)]
ONE_EACH = [Node("a", 16, 1), Node("b", 16, 1)]
TWO_CPU = [Node("a", 8, 0), Node("b", 8, 0)]
ONE_GPU = [Node("a", 16, 1)]
CLUSTER = [Node("a", 64, 8), Node("b", 64, 8)]


def run(nodes, engines=1, tensor_parallel=1, learners=1, scorers=1, colocate=None, scorer_gpus=0, apart=None):
    colocate = max(node.gpus for node in nodes) == 1 if colocate is None else colocate
    return place(
        nodes,
        engines=engines,
        tensor_parallel=tensor_parallel,
        learners=learners,
        scorers=scorers,
        colocate=colocate,
        scorer_gpus=scorer_gpus,
        apart=apart,
    )


def test_a_laptop_takes_turns_on_all_its_cores():
    engine, learner, scorer = run(LAPTOP)
    assert (engine.cores, learner.cores) == ((0, 1), (0, 1))
    assert engine.cpus + learner.cpus + scorer.cpus <= 2
    two = [p.cores for p in run(LAPTOP, engines=2) if p.actor.startswith("engine")]
    assert two == [(0,), (1,)]


def test_kinds_spread_over_nodes():
    places = run(TWO_CPU, engines=2, learners=2)
    assert [p.node.id for p in places if p.actor.startswith("engine")] == ["a", "b"]
    assert [p.node.id for p in places if p.actor.startswith("learner")] == ["a", "b"]
    assert all(len(p.cores) == 8 for p in places if not p.actor.startswith("scorer"))


def test_gpus_are_shared_or_apart():
    shared = run(ONE_EACH, engines=2, learners=2)
    assert all(sum(p.gpus for p in shared if p.node == node) <= 1 for node in ONE_EACH)
    assert all(p.gpus > 0 for p in shared if not p.actor.startswith("scorer"))
    apart = run(CLUSTER, engines=2, tensor_parallel=4, learners=8, colocate=False)
    for node in CLUSTER:
        assert sum(p.gpus for p in apart if p.node == node) == 8
    assert {p.gpus for p in apart if p.actor.startswith("engine")} == {4.0}


@pytest.mark.parametrize("nodes", [LAPTOP, TWO_CPU, ONE_GPU, CLUSTER])
def test_no_node_is_asked_for_more_than_it_has(nodes):
    places = run(nodes, engines=len(nodes), learners=len(nodes), scorers=3)
    for node in nodes:
        assert sum(p.cpus for p in places if p.node == node) <= node.cpus + 1e-6
        assert sum(p.gpus for p in places if p.node == node) <= node.gpus + 1e-6


@pytest.mark.parametrize(
    ("nodes", "settings", "expected"),
    [
        (LAPTOP, {"engines": 3}, ["key engine.count", "3 × 1 CPU cores", "2 CPU cores", "lower engine.count to 2"]),
        (LAPTOP, {"learners": 3}, ["key learner.ranks", "lower learner.ranks to 2"]),
        (CLUSTER, {"colocate": True}, ["key placement.colocate", "one GPU a node", "placement.colocate=false"]),
        (ONE_GPU, {"tensor_parallel": 2, "colocate": False}, ["key engine.count", "1 × 2 GPUs", "2 of one node"]),
        (ONE_GPU, {"colocate": False}, ["key learner.ranks", "0 GPUs"]),
        (CLUSTER, {"engines": 3, "tensor_parallel": 8}, ["lower engine.count to 2"]),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(nodes, settings, expected):
    with pytest.raises(ConfigError) as error:
        run(nodes, **settings)
    for part in expected:
        assert part in str(error.value), str(error.value)


def test_scorers_with_models_take_gpus_that_are_left():
    places = run(CLUSTER, engines=4, learners=8, scorers=2, scorer_gpus=2, colocate=False)
    assert [p.gpus for p in places if p.actor.startswith("scorer")] == [2.0, 2.0]
    for node in CLUSTER:
        assert sum(p.gpus for p in places if p.node == node) == 8
    with pytest.raises(ConfigError, match=r"key scorer\.count"):
        run(CLUSTER, engines=4, learners=8, scorers=3, scorer_gpus=2, colocate=False)


def test_a_scorer_with_a_model_shares_the_only_gpu_of_a_node():
    places = run(ONE_EACH, engines=2, learners=2, scorers=2, scorer_gpus=1)
    for node in ONE_EACH:
        assert 0.9 < sum(p.gpus for p in places if p.node == node) <= 1
    with pytest.raises(ConfigError, match=r"key scorer\.count"):
        run(ONE_GPU, scorers=2, scorer_gpus=1)


def scorer_cores(nodes, **settings):
    return [p.cores for p in run(nodes, **settings) if p.actor.startswith("scorer")]


def test_scorers_share_half_of_the_cores_of_engines_and_learners():
    """They score while engines sample: a judge's engine on all cores would halve the speed of both, and worse."""
    assert scorer_cores(LAPTOP) == [(1,)]
    assert scorer_cores(LAPTOP, scorers=2) == [(1,), (1,)]
    assert scorer_cores(TWO_CPU, engines=2, learners=2, scorers=4) == [(4, 5), (4, 5), (6, 7), (6, 7)]
    assert scorer_cores([Node("a", 1, 0)]) == [(0,)] and scorer_cores([Node("a", 0, 1)]) == [(0,)]


def test_where_nothing_else_computes_scorers_have_all_cores():
    """As answers that are there already are labelled, or compared; or on a node that has scorers alone."""
    assert scorer_cores(LAPTOP, engines=0, learners=0) == [(0, 1)]
    assert scorer_cores(LAPTOP, engines=0, learners=0, scorers=2) == [(0,), (1,)]
    assert scorer_cores(TWO_CPU, scorers=2) == [tuple(range(4, 8)), tuple(range(8))]


def test_on_cpu_nodes_a_scorer_with_a_model_computes_on_cores():
    assert all(p.gpus == 0 for p in run(TWO_CPU, scorers=2, scorer_gpus=1))


def test_roles_apart_have_places_of_their_own():
    """On GPUs one for each rank; on CPUs, and on shared GPUs, nodes without other learners first."""
    apart = run(CLUSTER, engines=1, learners=4, colocate=False, apart={"critic": 2, "reference": 1})
    assert sum(p.gpus for p in apart) == 1 + 4 + 2 + 1
    assert [p.actor for p in apart if p.actor[0] in "cr"] == ["critic-0", "critic-1", "reference-0"]
    two = {p.actor: p.node.id for p in run(TWO_CPU, apart={"critic": 1})}
    assert (two["learner-0"], two["critic-0"]) == ("a", "b")
    colocated = {p.actor: p.node.id for p in run(ONE_EACH, apart={"critic": 1})}
    assert (colocated["learner-0"], colocated["critic-0"]) == ("a", "b")


@pytest.mark.parametrize("nodes", [LAPTOP, TWO_CPU, ONE_GPU, ONE_EACH])
def test_learners_of_several_groups_take_turns_where_nodes_are_few(nodes):
    places = run(nodes, engines=len(nodes), learners=len(nodes), apart={"critic": len(nodes), "reference": 1})
    for node in nodes:
        assert sum(p.cpus for p in places if p.node == node) <= node.cpus + 1e-6
        assert sum(p.gpus for p in places if p.node == node) <= node.gpus + 1e-6
    assert all(p.cpus > 0 and p.cores for p in places)


def test_a_role_apart_that_has_no_place_is_named():
    with pytest.raises(ConfigError) as error:
        run(CLUSTER, engines=1, learners=14, colocate=False, apart={"critic": 2})
    assert "key learner.roles.critic.ranks" in str(error.value) and "to 1" in str(error.value)

"""A frozen role that follows another: from other processes by a push, and across ZeRO stages, as beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rayalign.errors import ConfigError, SyncMismatch
from rayalign.learners.base import merge_annotations
from rayalign.learners.deepspeed import DeepSpeedLearnerConfig
from rayalign.learners.torch import TorchLearnerConfig
from rayalign.protocols import UpdatePlan
from tests.contract.learner_cases import DPO, pairs, specs, weights
from tests.ranks import free_port, spawn
from tests.tiny_models import build_tiny_llama

STAGES = [(2, 3), (3, 0), (3, 3), (0, 2)]  # of the policy, and of the reference


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_llama(tmp_path_factory.mktemp("model"), tied=True)


def torch_roles(model, *, apart: bool, dtype: str):
    settings = TorchLearnerConfig(threads=1)
    order = specs(model, settings, dtype=dtype)
    groups = [[each] for each in order] if apart else [order]
    roles = {}
    for inside in groups:
        roles |= settings.build(inside, rank=0, world_size=1, address=("127.0.0.1", 1))
    return roles


def moved(roles):
    """After a step of the policy, from the reference as it is."""
    examples = roles["reference"].annotate(pairs(3), [DPO.needs[0][1]])
    roles["policy"].update(examples, DPO, UpdatePlan(0))
    return roles


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_a_push_it_follows_as_beside(model, dtype):
    beside, apart = (moved(torch_roles(model, apart=each, dtype=dtype)) for each in (False, True))
    assert "policy" not in apart["reference"].peers
    for decay in (0.75, 0.0):
        beside["reference"].refresh("policy", decay=decay)
        apart["reference"].take(apart["policy"].push(0, exact=True), decay=decay)
        theirs = weights(apart["reference"])
        for name, tensor in weights(beside["reference"]).items():
            assert torch.equal(tensor, theirs[name]), (decay, name)
    assert apart["reference"].refreshed


def test_what_did_not_arrive_is_not_taken(model):
    roles = moved(torch_roles(model, apart=True, dtype="float32"))
    before, push = weights(roles["reference"]), roles["policy"].push(0, exact=True)
    name = next(iter(push.manifest))
    with pytest.raises(SyncMismatch, match="1 different"):
        roles["reference"].take(replace(push, manifest={**push.manifest, name: "0" * 16}))
    with pytest.raises(SyncMismatch):
        roles["reference"].take(replace(push, manifest={}, chunks=()))
    with pytest.raises(ValueError, match="decay"):
        roles["reference"].take(push, decay=1.0)
    with pytest.raises(ConfigError, match="cannot take over weights"):
        roles["policy"].take(push)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(roles["reference"]).items())


def of_one_rank(rank: int, ranks: int, port: int, model: str, out: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for stages in STAGES:
        settings = DeepSpeedLearnerConfig(ranks=ranks, dtype="float32", deadline_s=120)
        order = [
            replace(spec, settings=settings.model_copy(update={"zero_stage": stage}))
            for spec, stage in zip(specs(Path(model), settings), stages, strict=True)
        ]
        roles = settings.build(order, rank=rank, world_size=ranks, address=("127.0.0.1", port))
        shards = roles["reference"].annotate_shard(pairs(3), [DPO.needs[0][1]])
        everywhere = [None] * ranks
        torch.distributed.all_gather_object(everywhere, shards)
        examples, initial = merge_annotations(pairs(3), everywhere), weights(roles["reference"])
        roles["policy"].update_shard(examples, DPO, UpdatePlan(0))
        policy = weights(roles["policy"])
        gaps = []
        for follow in (
            lambda roles=roles: roles["reference"].refresh("policy", decay=0.75),
            lambda roles=roles: roles["reference"].refresh("policy"),
            lambda roles=roles: roles["reference"].take(_everywhere(roles["policy"].push(0, exact=True)), decay=0.5),
        ):
            follow()
            gaps.append(weights(roles["reference"]))
        mixed = {name: 0.75 * initial[name] + 0.25 * policy[name] for name in policy}
        wanted = (mixed, policy, policy)
        found[str(stages)] = [
            max(float((got[name] - want[name]).abs().max()) for name in want)
            for got, want in zip(gaps, wanted, strict=True)
        ]
        assert max(float((policy[name] - initial[name]).abs().max()) for name in policy) > 1e-4
        for learner in list(roles.values()):
            learner.close()
    if rank == 0:
        Path(out).write_text(json.dumps(found))


def _everywhere(push):
    """Rank 0's, on all ranks."""
    found = [push]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def test_roles_of_other_stages_follow_on_two_ranks(model, tmp_path):
    spawn(of_one_rank, (2, free_port(), str(model), str(tmp_path / "found.json")), 2)
    for stages, gaps in json.loads((tmp_path / "found.json").read_text()).items():
        assert max(gaps) < 1e-6, stages

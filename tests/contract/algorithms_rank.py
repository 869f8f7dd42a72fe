"""What one rank does in test_algorithms_ranks: two steps of every algorithm, by DeepSpeed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rayalign.algorithms.cringe import Cringe
from rayalign.algorithms.disagreement import Disagreement
from rayalign.algorithms.dpm_calibration import Calibration
from rayalign.algorithms.kto import KTO
from rayalign.algorithms.policy_gradient import PolicyGradient
from rayalign.algorithms.ppo import PPO
from rayalign.algorithms.preference import Preference
from rayalign.algorithms.reward_model import RewardModel
from rayalign.algorithms.sft import SFT
from rayalign.learners.base import LearnerSpec, merge_annotations, merge_metrics
from rayalign.learners.deepspeed import DeepSpeedLearnerConfig
from rayalign.protocols import UpdatePlan, needs_reference
from rayalign.types import Group
from tests.contract.learner_cases import OPTIMIZER, weights
from tests.unit.algorithm_cases import random_groups

PAIRS = random_groups(5, (1.0, 0.0))
LABELS = [*random_groups(3, (1.0,)), *random_groups(2, (0.0,), seed=7)]
RANKED = random_groups(3, (-2.0, 0.0, -1.0), seed=3)
SOME_GOLD = [replace(each, prompt=replace(each.prompt, gold_ids=(5, 6) * place)) for place, each in enumerate(RANKED)]
CLASSES = ("bad", "neutral", "good")
VOTES = ((2.0, 0.0, 0.0), (0.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 3.0), (1.0, 0.0, 0.0))
VOTED = [replace(each, votes=(votes,)) for each, votes in zip(random_groups(5, (1.0,), seed=5), VOTES, strict=True)]
SAMPLED = [
    replace(each, completions=tuple(replace(c, logps=(-4.0,) * len(c.token_ids)) for c in each.completions))
    for each in random_groups(3, (1.0, 0.0, 2.5), seed=9)
]
FOLLOWS = {"target": 0.05, "horizon": 12}
K1, K2 = ({"in": where, "estimator": name, "coef": 0.02} for where, name in (("reward", "k1"), ("loss", "k2")))
MIX = {"name": "mix", "losses": ["ipo", {"name": "slic_hf", "target": "best"}], "weights": [1.0, 0.5]}
CASES: dict[str, tuple[Any, list[Group]]] = {
    "sft": (SFT(token_accuracy=True), RANKED),
    "mix": (Preference(loss=MIX, nll_weight=0.2, kl_weight=0.1), RANKED),
    "kto": (KTO(weight_undesirable="auto", kl_weight=0.1), LABELS),
    "kto of one prompt": (KTO(), PAIRS[:1]),
    "kto paired": (KTO(paired=True), PAIRS),
    "binary cringe": (Cringe(variant="binary"), LABELS),
    "pairwise cringe": (Cringe(), PAIRS),
    "calibration": (Calibration(margin=0.1, kl_weight=0.1), [*SOME_GOLD, *random_groups(2, (1.0, 3.0, 3.0, 2.0))]),
    "bradley-terry": (RewardModel(), RANKED),
    "plackett-luce": (RewardModel(loss="plackett_luce"), RANKED),
    "grpo": (
        PolicyGradient(
            samples=3, kl={**K2, "coef": 1e-3}, aggregate="sequence_mean", entropy_weight=0.01, clip_low=1, clip_high=9
        ).planned(2),
        SAMPLED,
    ),
    "reinforce_pp": (PolicyGradient(samples=3, kl=K1, advantage="reinforce_pp", importance_cap=2.0), SAMPLED),
    "ppo": (PPO(samples=3, kl={**K1, "adaptive": FOLLOWS}, reward={"normalise": True}).planned(2), SAMPLED),
    "ppo, shared trunk": (PPO(samples=3, kl=K1, critic={"shared": True}).planned(2), SAMPLED),
    "grpo, adaptive": (
        PolicyGradient(samples=3, kl={**K2, "adaptive": FOLLOWS}, clip_low=1, clip_high=9).planned(2),
        SAMPLED,
    ),
    "d-PM as published": (Disagreement(classes=CLASSES, preset="published"), VOTED),
    "d-PM": (Disagreement(classes=CLASSES, objective="js"), VOTED),
    "d-PM of one row": (Disagreement(classes=CLASSES, preset="published", objective="kl_r_q"), VOTED[:1]),
    "d-PM with a moving average": (
        Disagreement(classes=CLASSES, detach_posterior=False, mass="moving_average", objective="js"),
        VOTED,
    ),
}


def specs(folder: str, algorithm: Any, settings: Any) -> list[LearnerSpec]:
    """The policy, and where they are needed reference and critic, of a folder with two models."""
    common = dict(settings=settings, total_steps=5)
    head = dict(network=algorithm.network, classes=getattr(algorithm, "classes", ()))
    shared = getattr(getattr(algorithm, "critic", None), "shared", False)
    found = [LearnerSpec("policy", f"{folder}/policy", optimizer=OPTIMIZER, value_head=shared, **head, **common)]
    reference = LearnerSpec("reference", f"{folder}/reference", trainable=False, **common)
    critic = LearnerSpec("critic", f"{folder}/reference", optimizer=OPTIMIZER, network="score", **common)
    found += [reference] if needs_reference(algorithm) else []
    return found + ([critic] if algorithm.critic_algorithm is not None else [])


def main(rank: int, world_size: int, port: int, model: str, out: str) -> None:
    torch.set_num_threads(1)
    for name, (algorithm, groups) in CASES.items():
        config = DeepSpeedLearnerConfig(zero_stage=2, dtype="float32", deadline_s=120, micro_batch_tokens=24)
        roles = config.build(
            specs(model, algorithm, config), rank=rank, world_size=world_size, address=("127.0.0.1", port)
        )
        metrics = two_steps(roles, algorithm, groups, everywhere=lambda value: _everywhere(value, world_size))
        tensors = trained_weights(roles)
        if rank == 0:
            torch.save({"metrics": metrics, "weights": tensors}, Path(out) / f"{name}.pt")
        for learner in list(roles.values()):
            learner.close()
    torch.distributed.barrier()


def two_steps(roles: Any, algorithm: Any, groups: list[Group], *, everywhere: Any) -> list[dict[str, float]]:
    """What a run does with groups, twice; then the metrics of the same examples without learning."""
    examples, _ = algorithm.examples(groups)
    for role, column in algorithm.needs:
        examples = merge_annotations(examples, everywhere(roles[role].annotate_shard(examples, (column,))))
    found, state, annotated = [], {}, examples
    for step in (1, 2):
        algorithm, plan = algorithm.adapted(state), UpdatePlan(step=step)
        examples, said = algorithm.credit(annotated)
        metrics = merge_metrics(everywhere(roles["policy"].update_shard(examples, algorithm, plan)))
        if "critic" in roles:
            of_critic = roles["critic"].update_shard(examples, algorithm.critic_algorithm, plan)
            found_there = merge_metrics(everywhere(of_critic))
            metrics |= {f"critic/{name}": value for name, value in found_there.items() if name != "padding"}
        state = algorithm.adapt(state, {**said, **metrics, "answers/kept": float(len(examples))})
        found.append({**metrics, **{f"state/{name}": value for name, value in state.items()}})
    return [*found, merge_metrics(everywhere(roles["policy"].measure_shard(examples, algorithm)))]


def trained_weights(roles: Any) -> dict[str, torch.Tensor]:
    """Of all roles that are trained, by role and name."""
    trained = [role for role in ("policy", "critic") if role in roles]
    return {f"{role}/{name}": tensor for role in trained for name, tensor in weights(roles[role]).items()}


def _everywhere(value: Any, world_size: int) -> list[Any]:
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, value)
    return found

"""Where the real loop ends on a language model whose answers can be enumerated: the optimum that MATHS.md says.

π* ∝ π_ref·exp(r/β) for what has k1 in the reward; the stationary point of its own objective, found by enumeration of
all groups, for standardised advantages with k3 in the loss. Preference methods: test_exact_preferences.py. Total
variation below 0.02 of an untrained policy's 0.22 to 0.62. A wrong coefficient or sign ends elsewhere (`MUTATIONS`;
answers of one token, 40 steps instead of 100 to 150, total variation as measured):

                                        rloo     ppo      grpo
    as it is                            0.014    0.004    0.021
    β halved                            0.285    0.285    0.210
    β doubled                           0.109    0.103    0.405
    KL with the other sign              0.938    0.938    0.368
    advantages with the other sign      0.905    0.905    0.713
    not standardised                      –        –      0.467

PPO at answers of two tokens (`CREDIT`, 60 steps): 0.018 as it is, 0.146 with γ = 0.5, 0.217 with values a token late.
"""

from __future__ import annotations

import pytest
import torch

from rayalign.algorithms import credits, policy_loss, ppo
from tests.exact import BETA, build_model, distribution, optimum, run, standardised_optimum, variation

KL = {"in": "reward", "coef": BETA}
GROUP = {"name": "policy_gradient", "samples": 16, "kl": KL, "aggregate": "sequence_sum_mean"}
RLOO = {**GROUP, "advantage": "rloo"}
PPO = {
    "name": "ppo",
    "samples": 16,
    "kl": KL,
    "aggregate": "sequence_sum_mean",
    "critic": {"optimizer": {"lr": 0.05}, "value_clip": None},
}
GRPO = {
    "name": "policy_gradient",
    "samples": 4,
    "equal_groups": "keep",
    "kl": {"in": "loss", "estimator": "k3", "coef": BETA},
}
MANY = {"prompts": 48, "monitor": 0}
STALE = {"rollout": {"prompts": 8, "monitor": 0, "depth": 1}}
TWICE = {"train": {"steps": 100, "epochs": 2, "minibatches": 2}}
CASES = {  # tokens of an answer, the algorithm, and what differs in the config
    "rloo": (2, RLOO, {"train": {"steps": 150}}),
    "dr_grpo": (
        2,
        {**GROUP, "advantage": "dr_grpo", "aggregate": "constant", "length": 2},
        {"train": {"steps": 150}},
    ),
    "ppo": (2, {**PPO, "whiten": False, "lambda": 1.0}, {"train": {"steps": 150, "minibatches": 2}}),
    "ppo, whitened, two passes": (1, {**PPO, "lambda": 0.9}, TWICE),
    "ppo, shared trunk": (1, {**PPO, "whiten": False, "critic": {"shared": True, "value_clip": None}}, {}),
    "reinforce_pp": (1, {**GROUP, "advantage": "reinforce_pp"}, {}),
    "remax": (1, {**GROUP, "advantage": "remax"}, {}),
    "rloo on samples of older weights": (1, {**RLOO, "importance_cap": 5.0}, STALE),
}
RATE = {"lr": 0.05, "schedule": "cosine"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("exact") / "model")


def trained(folder, tiny, length, algorithm, **changes):
    """The policy's answers, the first policy's, and the metrics of all steps."""
    changes = {"train": {"steps": 100}, **changes, "optimizer": {**RATE, **changes.get("optimizer", {})}}
    policy, metrics = run(folder, tiny, algorithm, length=length, **changes)
    return policy, distribution(tiny, (1, 2), length), metrics


@pytest.mark.parametrize("name", CASES)
def test_it_ends_at_the_optimum_of_rlhf(name, tiny, tmp_path):
    length, algorithm, changes = CASES[name]
    policy, start, metrics = trained(tmp_path, tiny, length, algorithm, **changes)
    assert variation(policy, optimum(start, length)) < 0.02
    assert variation(start, optimum(start, length)) > 0.2
    if "depth" in changes.get("rollout", {}):
        assert [record["rollout/version"] for record in metrics] == [max(0, step - 1) for step in range(len(metrics))]
        assert metrics[3]["policy/weight"] != 1.0


def test_grpo_ends_at_the_optimum_of_its_own_objective(tiny, tmp_path):
    """Which is another one than RLHF's."""
    policy, start, _ = trained(tmp_path, tiny, 1, GRPO, train={"steps": 150}, rollout=MANY, optimizer={"lr": 0.03})
    own = standardised_optimum(start, 4, BETA)
    assert variation(policy, own) < 0.02 < 0.2 < variation(own, optimum(start, 1))


def with_coef(algorithm, factor):
    return {**algorithm, "kl": {**algorithm["kl"], "coef": BETA * factor}}


def other_kl(monkeypatch):
    for name, estimator in list(credits.ESTIMATORS.items()):
        monkeypatch.setitem(credits.ESTIMATORS, name, lambda logp, ref, of=estimator: -of(logp, ref))


def other_advantages(monkeypatch):
    real = policy_loss.ppo_policy_loss
    monkeypatch.setattr(
        policy_loss, "ppo_policy_loss", lambda new, old, advantage, **more: real(new, old, -advantage, **more)
    )


MUTATIONS = {
    "as it is": lambda algorithm, monkeypatch: algorithm,
    "β halved": lambda algorithm, monkeypatch: with_coef(algorithm, 0.5),
    "β doubled": lambda algorithm, monkeypatch: with_coef(algorithm, 2.0),
    "KL with the other sign": lambda algorithm, monkeypatch: other_kl(monkeypatch) or algorithm,
    "advantages with the other sign": lambda algorithm, monkeypatch: other_advantages(monkeypatch) or algorithm,
    "not standardised": lambda algorithm, monkeypatch: {**algorithm, "advantage": "dr_grpo"},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", ["rloo", "ppo", "grpo"])
def test_a_wrong_coefficient_or_sign_would_be_seen(name, mutation, tiny, tmp_path, monkeypatch):
    if mutation == "not standardised" and name != "grpo":
        pytest.skip("its advantages are not standardised")
    algorithm = MUTATIONS[mutation]({"rloo": RLOO, "ppo": PPO, "grpo": GRPO}[name], monkeypatch)
    policy, start, _ = trained(
        tmp_path, tiny, 1, algorithm, train={"steps": 40}, rollout=MANY if name == "grpo" else {}
    )
    wanted = standardised_optimum(start, 4, BETA) if name == "grpo" else optimum(start, 1)
    found = variation(policy, wanted)
    print(f"{name}, {mutation}: {found:.3f}")
    assert found < 0.03 if mutation == "as it is" else found > 0.08


def late_values(monkeypatch):
    real = ppo.gae
    monkeypatch.setattr(
        ppo, "gae", lambda rewards, values, mask, **more: real(rewards, values.roll(1, 1), mask, **more)
    )


CREDIT = {  # of answers of two tokens, where it matters which token earns what
    "as it is": lambda monkeypatch: {},
    "γ = 0.5": lambda monkeypatch: {"gamma": 0.5},
    "values a token late": lambda monkeypatch: late_values(monkeypatch) or {},
}


@pytest.mark.parametrize("mutation", CREDIT)
def test_credit_that_goes_to_the_wrong_token_would_be_seen(mutation, tiny, tmp_path, monkeypatch):
    algorithm = {**PPO, "whiten": False, "lambda": 1.0, **CREDIT[mutation](monkeypatch)}
    policy, start, _ = trained(tmp_path, tiny, 2, algorithm, train={"steps": 60, "minibatches": 2})
    found = variation(policy, optimum(start, 2))
    print(f"ppo at two tokens, {mutation}: {found:.3f}")
    assert found < 0.05 if mutation == "as it is" else found > 0.08


def test_an_answer_of_each_length_has_its_own_probability(tiny):
    for length, count in ((1, 6), (2, 31)):
        found = distribution(tiny, (1, 2), length)
        assert len(found) == count and float(found.sum()) == pytest.approx(1.0, abs=1e-6)
        assert torch.isfinite(found.log()).all()

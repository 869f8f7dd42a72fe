"""Where preference methods end in the real loop, on a language model whose answers can be enumerated.

Online DPO, on probabilities and on labels that one annotator would draw, ends at π ∝ π_ref·exp(r/β); online IPO and
Ψ-PO at π ∝ π_ref·exp(u/τ), u(y) = E_{y′∼π} σ(r(y) − r(y′)); SPIN at the data's distribution. Total variation, below
0.02 of 0.2 to 0.9 at the start. A wrong coefficient or sign ends elsewhere (`MUTATIONS`, as measured):

                                        soft     ipo
    as it is                            0.005    0.032
    β, or τ, halved                     0.284    0.171
    β, or τ, doubled                    0.104    0.101
    gap with the other sign             0.509    0.411

(60 steps instead of 100.) SPIN with the other sign ends 1.000 from the data.
"""

from __future__ import annotations

import json

import pytest
import torch

from rayalign.algorithms import losses, spin
from tests.exact import BETA, TOKENS, answers, build_model, distribution, optimum, preference_optimum, run, variation

TAU = 0.15
ALL_PAIRS = {"name": "online_preference", "samples": 8, "pairs": "all"}
DRAWN = {**ALL_PAIRS, "labels": "bernoulli"}
SOFT = {**ALL_PAIRS, "loss": {"name": "soft", "beta": BETA}}
DPO = {**DRAWN, "loss": {"name": "dpo", "beta": BETA}}
IPO = {**DRAWN, "loss": {"name": "ipo", "tau": TAU}}
PSI_PO = {**ALL_PAIRS, "loss": {"name": "psi_po", "tau": TAU}}
DRAWS = {"online DPO, drawn labels": DPO, "online IPO": IPO}  # whose labels are noise to be averaged
CASES = {"online DPO, probabilities": SOFT, "online Ψ-PO": PSI_PO, **DRAWS}
SLOW = {"rollout": {"prompts": 24, "monitor": 0}, "train": {"steps": 100}, "optimizer": {"lr": 0.02}}
FAST = {"rollout": {"prompts": 16, "monitor": 0}, "train": {"steps": 60}, "optimizer": {"lr": 0.03}}
LONG = {
    "iterations": 9,
    "lam": [1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0],
    "lr_scale": [1.0, 1.0, 0.7, 0.5, 0.35, 0.25, 0.2, 0.15, 0.15],
}
DATA = {(1, 0): 0.2, (3, 0): 0.5, (5, 0): 0.3}  # SPIN's: an answer → its share of the rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("exact") / "model")


def wanted(algorithm, start):
    """[A] the optimum of an algorithm as it is meant, whatever was changed in it."""
    return preference_optimum(start, TAU) if algorithm["loss"]["name"] in ("ipo", "psi_po") else optimum(start, 1)


@pytest.mark.parametrize("name", CASES)
def test_online_preferences_end_at_their_optimum(name, tiny, tmp_path):
    start = distribution(tiny, (1, 2), 1)
    policy, _ = run(tmp_path, tiny, CASES[name], length=1, **(SLOW if name in DRAWS else FAST))
    best = wanted(CASES[name], start)
    print(f"{name}: {variation(policy, best):.4f}")
    assert variation(policy, best) < 0.02 < 0.15 < variation(start, best)


def other_sign(module, name):
    def change(algorithm, monkeypatch):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda gap, **more: real(-gap, **more))
        return algorithm

    return change


def scaled(key, factor):
    return lambda algorithm, monkeypatch: {
        **algorithm, "loss": {**algorithm["loss"], key: algorithm["loss"][key] * factor}
    }  # fmt: skip


MUTATIONS = {
    ("soft", "β halved"): (SOFT, scaled("beta", 0.5)),
    ("soft", "β doubled"): (SOFT, scaled("beta", 2.0)),
    ("soft", "gap with the other sign"): (SOFT, other_sign(losses.maths, "soft_dpo_loss")),
    ("ipo", "as it is"): (IPO, lambda algorithm, monkeypatch: algorithm),
    ("ipo", "τ halved"): (IPO, scaled("tau", 0.5)),
    ("ipo", "τ doubled"): (IPO, scaled("tau", 2.0)),
    ("ipo", "gap with the other sign"): (IPO, other_sign(losses.maths, "ipo_loss")),
}


@pytest.mark.parametrize(("loss", "mutation"), MUTATIONS)
def test_a_wrong_coefficient_or_sign_would_be_seen(loss, mutation, tiny, tmp_path, monkeypatch):
    algorithm, change = MUTATIONS[loss, mutation]
    start = distribution(tiny, (1, 2), 1)
    policy, _ = run(tmp_path, tiny, change(algorithm, monkeypatch), length=1, **FAST)
    found = variation(policy, wanted(algorithm, start))
    print(f"{loss}, {mutation}: {found:.3f}")
    assert found < 0.05 if mutation == "as it is" else found > 0.1


def play(folder, tiny, *, rows, iterations, more=None, **changes):
    """The policy's answers [A] after self-play on rows of DATA, and the data's. `more`: of the config."""
    folder.mkdir(exist_ok=True)
    file = folder / "rows.jsonl"
    texts = [TOKENS[answer[0]] for answer, share in DATA.items() for _ in range(round(share * rows))]
    file.write_text("".join(json.dumps({"prompt": "a b", "completion": text}) + "\n" for text in texts))
    steps = 25
    algorithm = {"name": "spin", "iterations": iterations, "steps": steps, "shard": 4096, "mix_previous": False}
    policy, _ = run(
        folder,
        tiny,
        {**algorithm, **changes},
        length=2,
        data={"prompts": None, "examples": {"path": str(file)}, "held_out": 0.0, "max_tokens": 4},
        rollout={"prompts": rows // 10},
        train={"steps": iterations * steps},
        scorer=None,
        evaluation={"prompts": 0, "rows": 0},
        **(more or {}),
    )
    return policy, torch.tensor([DATA.get(answer, 0.0) for answer in answers(2)], dtype=torch.float64)


def test_self_play_ends_at_the_distribution_of_the_data(tiny, tmp_path):
    """Opponents are samples, so that an iteration's error is theirs ÷ λ: λ rises once the policy is near."""
    policy, data = play(tmp_path, tiny, rows=4000, **LONG)
    start = distribution(tiny, (1, 2), 2)
    print(f"SPIN: {variation(policy, data):.4f}")
    assert variation(policy, data) < 0.02 < 0.9 < variation(start, data)


def test_self_play_with_the_other_sign_leaves_the_data(tiny, tmp_path, monkeypatch):
    real = spin.spin_loss
    monkeypatch.setattr(spin, "spin_loss", lambda gap, *, lam: real(-gap, lam=lam))
    policy, data = play(tmp_path, tiny, rows=200, iterations=2, lam=1.0)
    print(f"SPIN, gap with the other sign: {variation(policy, data):.3f}")
    assert variation(policy, data) > 0.9

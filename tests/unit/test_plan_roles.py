"""Memory by role: policy, critic, reference and reward model, beside one another or apart, each with its own ZeRO."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from rayalign.config import parse_config
from rayalign.errors import ConfigError
from rayalign.plan import make_plan, print_plan
from rayalign.plan.records import GIB
from tests.parts import tiny_config

SHAPES = Path(__file__).parent / "shapes"
CRITIC_8B = 7_504_928_768  # Llama-3.1-8B with a score head instead of the untied one of 128,256 × 4,096
POLICY_8B = 8_030_261_248
NODES = "2x8xH100/1800GiB"
DEEPSPEED = {"name": "deepspeed", "ranks": 4, "zero_stage": 3, "gradient_checkpointing": True}
PPO = {"name": "ppo", "kl": {"in": "reward", "coef": 0.05}}


@pytest.fixture
def plan(tmp_path):
    def made(model="Llama-3.1-8B", nodes=NODES, **changes):
        config = tiny_config(tmp_path, SHAPES / model, model__dtype="bfloat16", **{**USUAL, **changes})
        return make_plan(parse_config(config), nodes=nodes)

    return made


USUAL = {
    "algorithm": PPO,
    "rollout": {"prompts": 8},
    "placement": {"name": "ray"},
    "engine": {"name": "vllm", "count": 2, "max_context": 64},
    "learner": DEEPSPEED,
}


def roles(plan) -> dict[tuple[str, str], object]:
    return {(each.actor, each.role): each for each in plan.fit.memory}


def test_beside_one_another_each_holds_its_own_and_activations_stand_once(plan):
    found = roles(plan())
    learner = {role: each for (actor, role), each in found.items() if actor == "learner"}
    assert set(learner) == {"policy", "reference", "critic", "process"}
    for role, size in (("policy", POLICY_8B), ("critic", CRITIC_8B)):
        device = learner[role].device
        assert device.weights == 2 * size / 4 and device.optimizer == 12 * size / 4, role
    assert learner["reference"].device.weights == 2 * POLICY_8B / 4 and learner["reference"].device.optimizer == 0
    assert learner["policy"].device.activations > 0 == learner["critic"].device.activations
    assert all(each.count == 4 for each in learner.values())


def test_apart_each_has_ranks_stage_and_offload_of_its_own(plan):
    own = {"critic": {"ranks": 2, "zero_stage": 2, "offload": "cpu"}, "reference": {"ranks": 1, "zero_stage": 0}}
    made = plan(learner={**DEEPSPEED, "roles": own})
    found = roles(made)
    critic, reference = found["critic", "critic"], found["reference", "reference"]
    assert (critic.count, reference.count, found["learner", "policy"].count) == (2, 1, 4)
    assert critic.device.weights == 2 * CRITIC_8B and critic.device.optimizer == 0  # stage 2: whole weights
    assert critic.host.optimizer == 12 * CRITIC_8B / 2
    assert reference.device.weights == 2 * POLICY_8B and reference.device.optimizer == 0
    assert critic.device.activations > 0 and reference.device.activations > 0  # nobody's space to share
    assert ("learner", "critic") not in found and {("critic", "process"), ("reference", "process")} <= set(found)
    places = {place.actor for place in made.fit.places}
    assert {"critic-0", "critic-1", "reference-0", "learner-3"} <= places and "critic-2" not in places
    assert sum(place.gpus for place in made.fit.places) == 2 + 4 + 2 + 1
    assert {load.holds for load in made.fit.loads if load.of_gpu} == {
        ("engine",), ("learner",), ("critic",), ("reference",)
    }  # fmt: skip


def test_what_is_not_needed_is_not_planned(plan):
    found = roles(plan(algorithm={"name": "ppo", "kl": {"coef": 0.0}}, evaluation={"prompts": 0, "reference": False}))
    assert ("learner", "reference") not in found and ("learner", "critic") in found
    group = {"name": "policy_gradient", "advantage": "grpo", "kl": {"coef": 0.0}}
    found = roles(plan(algorithm=group, evaluation={"prompts": 0, "reference": False}))
    assert [role for actor, role in found if actor == "learner"] == ["policy", "process"]
    assert ("scorer", "reward_model") not in found


def test_roles_of_another_micro_batch(plan):
    small = plan(learner={**DEEPSPEED, "roles": {"critic": {"apart": True, "micro_batch_tokens": 32}}})
    large = plan(learner={**DEEPSPEED, "roles": {"critic": {"apart": True}}})
    devices = [roles(each)["critic", "critic"].device for each in (small, large)]
    assert devices[0].activations < devices[1].activations and devices[0].weights == devices[1].weights


def test_plain_texts_that_are_learned_beside_answers_count(plan):
    """In tokens of a step, once an epoch, and in the largest micro-batch where they are longer than answers."""
    ptx = {"path": "texts.txt", "tokens": 512, "count": 6}
    with_texts, without = (plan(algorithm=each, train={"epochs": 3}) for each in ({**PPO, "ptx": ptx}, PPO))
    assert with_texts.tokens.trained - without.tokens.trained == 3 * 6 * 512
    activations = [roles(each)["learner", "policy"].device.activations for each in (with_texts, without)]
    assert activations[0] > activations[1]


@pytest.mark.parametrize(
    ("model", "nodes", "learner", "fits"),
    [
        ("SmolLM2-135M-Instruct", "1x4cpu/16GiB", {"ranks": 1, "zero_stage": 0}, True),
        ("Llama-3.1-8B", "1x8xH100/1800GiB", {"ranks": 6, "zero_stage": 3}, True),
        ("Llama-3.1-8B", "1x2xH100/1800GiB", {"ranks": 1, "zero_stage": 3}, False),
        ("Llama-3.1-70B", "4x8xH200/1800GiB", {"ranks": 24, "zero_stage": 3, "offload": "cpu"}, False),
        ("Llama-3.1-70B", "8x8xB200/1800GiB", {"ranks": 48, "zero_stage": 3}, True),
    ],
)
def test_three_sizes_on_given_nodes(plan, model, nodes, learner, fits, capsys):
    """Of 70B a rank loads a whole model before ZeRO-3 shares it out: 131.4 GiB, more than an H200 leaves."""
    engine = {"name": "vllm", "count": 1, "max_context": 64, "kv_cache_gib": 0.5}
    engine |= {"tensor_parallel": 4, "count": 2} if model.endswith("70B") else {}
    changes = {"learner": {**DEEPSPEED, **learner}, "engine": engine, "rollout": {"prompts": 64}}
    made = plan(model, nodes, data__held_out=0.0, **changes)
    assert made.fit.fits == fits, made.fit.problems
    assert {role for actor, role in roles(made) if actor == "learner"} == {"policy", "reference", "critic", "process"}
    print_plan(made, Console(width=120, highlight=False))
    out = capsys.readouterr().out
    for role in ("policy", "reference", "critic"):
        assert f"learner: {role}" in out
    assert "policy and critic are trained one after the other" in " ".join(out.split())


def test_a_reward_model_beside_them(plan, tmp_path):
    scorer = {"name": "reward_model", "model": str(SHAPES / "SmolLM2-135M-Instruct")}
    found = roles(plan(scorer=scorer))
    assert found["scorer", "reward model"].device.weights > 0.2 * GIB


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"learner__roles": {"critic": {"ranks": 2}}, "algorithm": {"name": "online_preference", "samples": 4}},
         "key learner.roles.critic", "this run has no critic"),
        ({"learner__roles": {"reference": {"offload": "cpu"}}}, "key learner.roles.reference.offload", "not trained"),
        ({"learner__roles": {"critic": {"ranks": 9}}}, "key learner.roles.critic.ranks", "cannot be split so far"),
        ({"learner__roles": {"critic": {"apart": True}}, "placement": {"name": "local"}, "learner__ranks": 1},
         "key learner.roles.critic", "all roles live in this process"),
    ],
)  # fmt: skip
def test_roles_that_cannot_be(plan, changes, where, what):
    changes = dict(changes)
    learner = {**DEEPSPEED, "roles": changes.pop("learner__roles"), "ranks": changes.pop("learner__ranks", 4)}
    engine = {"name": "vllm", "count": 1, "max_context": 64}
    with pytest.raises(ConfigError) as raised:
        plan(learner=learner, engine=engine, **changes)
    assert raised.value.where == where and what in raised.value.what and raised.value.remedy


def test_the_exact_kl_wants_the_reference_beside_the_policy(plan, tmp_path):
    """In the loss over the vocabulary, as online_preference has it."""
    algorithm = {"name": "online_preference", "samples": 4, "kl_weight": 0.1}
    with pytest.raises(ConfigError, match="exact KL to the reference") as raised:
        plan(algorithm=algorithm, learner={**DEEPSPEED, "roles": {"reference": {"ranks": 1}}})
    assert raised.value.where == "key learner.roles.reference"

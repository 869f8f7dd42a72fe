"""What the parts of a config have to be together for policy gradients, and for their critic.

Each function raises Unfit where they are not.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from rayalign.record import Unfit


def check_ratios(config: Any) -> None:
    """Ratios are of whole distributions, and of the policy that sampled."""
    name, sampling, rollout = config.algorithm.name, config.sampling.sampling(), config.rollout
    if sampling.truncated:
        raise Unfit(
            f"{name} takes ratios of probabilities, and these samples are not of the whole distribution",
            key="sampling",
            rule="temperature above 0, and no top_p, top_k, min_tokens or search",
            remedy="take them out of sampling",
        )
    if (rollout.depth or rollout.resample_every != 1) and config.algorithm.importance_cap is None:
        raise Unfit(
            "samples of older weights would count as the policy's own",
            key="algorithm.importance_cap",
            rule="set with rollout.depth above 0, or samples that are used for several steps",
            remedy="set algorithm.importance_cap=2.0",
        )
    if config.algorithm.stop_kl is not None and config.train.epochs * config.train.minibatches == 1:
        raise Unfit(
            "an update of one optimiser step has no later one that could be left out",
            key="algorithm.stop_kl",
            rule="not set, unless train.epochs × train.minibatches is above 1",
            remedy="take algorithm.stop_kl out, or set train.minibatches=4, say",
        )


def check_scores(config: Any) -> None:
    """An answer's score says something of it."""
    alone = len(config.algorithm.request(config.sampling.sampling())) == 1
    if alone and getattr(config.scorer, "compares", False):
        raise Unfit(
            "each answer is the only one to its prompt, and the scorer would give all of them the same",
            key="algorithm.samples",
            rule="2 or more with a scorer that compares answers to one prompt: a pairwise judge, or a mix with one or "
            "with standardise: group",
            remedy="set algorithm.samples=4, or a judge with mode: direct, or a mix with standardise: none",
        )


def check_steps(config: Any) -> None:
    """What KL, plain texts and minibatches say of a step."""
    answers, follow = config.rollout.prompts * config.algorithm.samples, config.algorithm.kl.adaptive
    if follow is not None and follow.horizon < answers:
        raise Unfit(
            "one step would move the KL coefficient by more than a fifth, or below 0",
            key="algorithm.kl.adaptive",
            rule=f"a horizon of at least the answers of a step, rollout.prompts × algorithm.samples = {answers}",
            remedy=f"set horizon: {max(10_000, answers)}",
        )
    if getattr(config.algorithm, "ptx", None) is not None and config.sampling.sampling().temperature != 1:
        raise Unfit(
            "plain texts would be learned at the temperature of the samples",
            key="algorithm.ptx",
            rule="sampling.temperature=1 with ptx, whose loss is that of the language model",
            remedy="set sampling.temperature=1.0, or take algorithm.ptx out",
        )
    parts = config.train.minibatches
    if answers % parts:
        raise Unfit(
            "the minibatches do not divide the rollout",
            key="train.minibatches",
            rule=f"a divisor of rollout.prompts × algorithm.samples = {answers}",
            remedy=f"set train.minibatches={next(n for n in range(parts, 0, -1) if answers % n == 0)}",
        )


def check_course_of_critic(config: Any) -> None:
    """The critic can be trained, and does not take the whole run for it."""
    critic = config.algorithm.critic
    try:
        config.critic_optimizer()
    except ValidationError as error:
        first = error.errors()[0]
        raise Unfit(
            f"the critic's optimizer cannot be made: {first['loc'][0] if first['loc'] else ''}: {first['msg']}",
            key="algorithm.critic.optimizer",
            rule="keys of optimizer, with values that they take",
            remedy="set algorithm.critic.optimizer: {lr: 1.0e-5}, say",
        ) from error
    if critic.warmup_steps >= config.train.steps:
        raise Unfit(
            "the run would end before the policy is trained at all",
            key="algorithm.critic.warmup_steps",
            rule=f"below train.steps={config.train.steps}: in these steps the critic is trained alone",
            remedy="lower algorithm.critic.warmup_steps, or raise train.steps",
        )

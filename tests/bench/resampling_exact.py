"""The exact half of the resampling experiment: a policy whose every answer can be enumerated.

The policy is a bigram table: 12 prompts, answers of three tokens out of 12, so 1,728 answers a prompt, and the
probability of each is known. Rollouts, pairs and the loss are those of a training run (`Rollouts`, `OnlinePreference`);
only engine and learner are replaced by the table. True reward, KL and the mass outside of what was ever sampled are
sums over all answers, without an estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rayalign.algorithms.online_preference import OnlinePreference
from rayalign.rollouts import Collector, RolloutConfig, Rollouts
from rayalign.scorers.base import LocalScorer, ScoreFunction, ScorerConfig
from rayalign.types import Completion, Group, Prompt, Request, Sampling
from tests.unit.algorithm_cases import VOCABULARY, step

LENGTH = 3  # tokens of an answer
PROMPTS = 4  # of one step
SAMPLES = 4
BETA = 0.1
RATE = 0.1  # of Adam, on the logits
REWARD_SEED = 5


def start() -> Tensor:
    """[V, V + 1] logits of the reference, by the token before; the last column is a head that nothing looks at."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(VOCABULARY, VOCABULARY + 1, generator=generator, dtype=torch.float64)


def distribution(table: Tensor) -> Tensor:
    """[V, V, V, V] π(abc | prompt s), at [s, a, b, c]."""
    logps = table[:, :VOCABULARY].log_softmax(-1)
    return (logps[:, :, None, None] + logps[None, :, :, None] + logps[None, None, :, :]).exp()


def true_reward() -> Tensor:
    """[V, V, V, V] half of it bigrams, as the policy has them, half not; mean 0 and variance 1 at the start."""
    generator = torch.Generator().manual_seed(REWARD_SEED)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    v = VOCABULARY
    reward = noise(v, v, 1, 1) + noise(1, v, v, 1) + noise(1, 1, v, v) + 3**0.5 * noise(v, v, v, v)
    weight = distribution(start()) / v
    mean = (weight * reward).sum()
    return (reward - mean) / (weight * (reward - mean) ** 2).sum().sqrt()


class TrueReward(ScorerConfig):
    """The scorer of the experiment."""

    name: str = "true_reward"

    def start(self) -> ScoreFunction:
        reward = true_reward()
        return lambda groups: [
            [float(reward[(*g.prompt.token_ids, *c.token_ids)]) for c in g.completions] for g in groups
        ]


@dataclass
class TableEngine:
    """Samples answers of a table; the methods of an engine that sampling needs."""

    table: Tensor
    version: int = 0
    seen: set[tuple[int, ...]] = field(default_factory=set)  # (prompt, answer) of all that was ever sampled
    _open: list[Request] = field(default_factory=list)

    def submit(self, requests: Sequence[Request]) -> None:
        self._open += requests

    def poll(self, timeout_s: float = 1.0) -> list[Completion]:
        done, self._open = [self._answer(request) for request in self._open], []
        return done

    def _answer(self, request: Request) -> Completion:
        generator = torch.Generator().manual_seed(request.seed)
        probs = self.table[:, :VOCABULARY].softmax(-1)
        ids = list(request.prompt_ids)
        while len(ids) <= LENGTH:
            ids.append(int(torch.multinomial(probs[ids[-1]], 1, generator=generator)))
        self.seen.add(tuple(ids))
        logps = tuple(float(probs[a, b].log()) for a, b in zip(ids[:-1], ids[1:], strict=True))
        return Completion(request.id, tuple(ids[1:]), logps, "length", self.version)


def measure(table: Tensor, reference: Tensor, reward: Tensor, seen: set[tuple[int, ...]]) -> dict[str, float]:
    """Exact, means over the prompts: E r, KL(π‖π_ref) in nats, and where the probability mass is.

    outside: 1 − π(all answers that were ever sampled); outside_start: the same of π_ref. moved: the mass that answers
    have gained, Σ max(π − π_ref, 0), the total variation distance; moved_outside: how much of it went to answers that
    were never sampled, so that nothing ever said whether they are good.
    """
    policy, initial = distribution(table), distribution(reference)
    inside = torch.zeros_like(policy, dtype=torch.bool)
    for ids in seen:
        inside[ids] = True
    prompts, gained = VOCABULARY, (policy - initial).clamp(min=0)
    return {
        "reward": float((policy * reward).sum() / prompts),
        "kl": float((policy * (policy / initial).log()).sum() / prompts),
        "outside": float(1 - (policy * inside).sum() / prompts),
        "outside_start": float(1 - (initial * inside).sum() / prompts),
        "moved": float(gained.sum() / prompts),
        "moved_outside": float((gained * ~inside).sum() / prompts),
    }


def run(settings: dict[str, Any], *, seed: int, steps: int, every: int) -> list[dict[str, float]]:
    """One training: a record at step 0 and every so often.

    Args:
        settings: of `RolloutConfig`: how long a set of samples is used.
    """
    reference, reward = start(), true_reward()
    table = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=RATE)
    algorithm = OnlinePreference(samples=SAMPLES, pairs="all", loss={"name": "dpo", "beta": BETA})
    engine = TableEngine(reference)
    config = RolloutConfig(prompts=PROMPTS, **settings)
    prompts = [Prompt(n, str(n), (n % VOCABULARY,)) for n in range(PROMPTS * steps)]
    rollouts = Rollouts(
        Collector(engine, LocalScorer(TrueReward()), lambda ids: " ".join(map(str, ids))),  # type: ignore[arg-type]
        prompts,
        algorithm.request(Sampling(max_tokens=LENGTH)),
        seed=seed,
        count=PROMPTS,
        depth=0,
        resample_every=config.resample_every,
        at_once=config.set_size(len(prompts), steps),
    )
    found = []
    for index in range(steps):
        if rollouts.samples_before(index):
            engine.table, engine.version = table.detach().clone(), index
        rollouts.start(index)
        if index == 0:
            found.append({"step": 0, **measure(table.detach(), reference, reward, engine.seen)})
        _update(algorithm, list(rollouts.take(index).groups), table, reference, optimizer)
        if (index + 1) % every == 0 or index + 1 == steps:
            found.append({"step": index + 1, **measure(table.detach(), reference, reward, engine.seen)})
    return found


def _update(
    algorithm: OnlinePreference, groups: list[Group], table: Tensor, reference: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    examples, _ = algorithm.examples(groups)
    if not examples:
        return
    loss, _ = step(algorithm, examples, table, reference, [range(len(examples))])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

"""What travels through a run: prompt → request → completion → group → example → batch → loss.

All of these are frozen. Token ids are tuples of int, log-probs are in nats.
Shapes: R rows (sequences), B examples, T tokens, K candidates for one prompt.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch


@dataclass(frozen=True)
class Picture:
    """One image of a prompt, as it travels: the bytes of its file. It is decoded where the network is.

    Attributes:
        data: of a PNG or JPEG file, say; shared by the rows that look at the same image.
        size: (width, height) in pixels, upright.
        box: the part that is looked at, (left, top, right, bottom) as shares of width and height; resized to
            `size`, so that it is as many tokens. None: all of it.
    """

    data: bytes = field(repr=False)
    size: tuple[int, int]
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt file, with the chat template already applied.

    Attributes:
        index: the row's position in its data set; part of every sample's seed.
        text: the user's last words, as in the file (what reports show).
        token_ids: what an engine continues.
        extra: the row's other columns, for scorers.
        images: in the order in which their tokens stand in `token_ids`.
        messages: the whole conversation up to the answer, a system message included, as role and content.
        gold_ids: a reference answer to it, its end token included, for what learns from one; empty: there is none.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Picture, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    gold_ids: tuple[int, ...] = ()

    @property
    def conversation(self) -> str:
        """All that an answer answers, as one text (what scorers are shown): each message behind its role, where there
        are several."""
        if len(self.messages) < 2:
            return self.text
        return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in self.messages)


@dataclass(frozen=True)
class DiverseBeam:
    """Diverse beam search instead of sampling: `beams` candidates of one prompt, in `groups` of the same size.

    Attributes:
        penalty: nats that a token loses for each beam of an earlier group that has it at the same position.
        length_penalty: candidates are ranked by sum ÷ length^length_penalty.
    """

    beams: int
    groups: int
    penalty: float = 4.0
    length_penalty: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one request. `top_k=0` and `top_p=1.0` mean off; temperature 0 is greedy.

    Attributes:
        choices: tokens whose log-probs are wanted at the first generated position, whatever is sampled there:
            those of the whole distribution at temperature 1. What a judge answers is read from them.
        search: all candidates of the prompt are searched by one request; nothing is drawn, so that its seed,
            temperature, top_p and top_k mean nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    choices: tuple[int, ...] = ()
    search: DiverseBeam | None = None

    @property
    def truncated(self) -> bool:
        """Whether what is sampled is not softmax(logits / temperature), so that log-probs of the whole
        distribution say nothing about samples of this one."""
        kept_from = self.temperature == 0 or self.top_p < 1 or self.top_k > 0 or self.min_tokens > 0
        return kept_from or self.search is not None

    @property
    def ordinary(self) -> Sampling:
        """Itself; of a search, samples at temperature 1 that are as long: what a policy is evaluated on."""
        return self if self.search is None else Sampling(self.max_tokens, stop_token_ids=self.stop_token_ids)


@dataclass(frozen=True)
class Request:
    """One completion, or one search, that is asked of an engine. `id` is unique among the requests that are open."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int


@dataclass(frozen=True)
class Candidate:
    """One of the completions that a search found.

    Attributes:
        token_ids: the end token included when there is one.
        logps: of them under the model at temperature 1, without penalty.
        group: the one that found it, counted from 0.
        score: sum of log-probs less the diversity penalties, ÷ length^length_penalty: what it was ranked by.
        finish_reason: "stop" (an end token), "length" (cut at `max_tokens`).
    """

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    group: int
    score: float
    finish_reason: str

    @property
    def sum_logp(self) -> float:
        return math.fsum(self.logps)

    @property
    def mean_logp(self) -> float:
        return self.sum_logp / len(self.logps)


@dataclass(frozen=True)
class Completion:
    """What an engine gives back for one request. Of a search, tokens and log-probs are the best candidate's.

    Attributes:
        token_ids: the sampled tokens, the end token included when there is one.
        logps: for each of them its log-prob under the distribution that was sampled
            (temperature, top-p and top-k applied).
        finish_reason: "stop" (an end token), "length" (cut at `max_tokens`).
        version: of the weights that sampled it.
        engine: the name of the engine that served it, for the log.
        choice_logps: of `Sampling.choices`, in their order; empty where none were asked for. What exp(·) of them
            adds up to is the share of the distribution that is on the choices.
        candidates: of a search, the best score first.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    finish_reason: str
    version: int
    engine: str = ""
    choice_logps: tuple[float, ...] = ()
    candidates: tuple[Candidate, ...] = ()

    @classmethod
    def of_search(cls, request_id: str, found: tuple[Candidate, ...], version: int, engine: str) -> Completion:
        best = found[0]
        return cls(request_id, best.token_ids, best.logps, best.finish_reason, version, engine, candidates=found)


FAILED = "scores/failed"  # metric of groups: completions that their scorer could not score; counts are added up


@dataclass(frozen=True)
class Group:
    """One prompt with its K completions, and their scores once a scorer has seen them (higher is better).

    A row of a data set is a group as well, with what its annotators said as scores: 1 and 0 for chosen and
    rejected, −rank for ranked answers, 1 for the choice and 0 for the others, 1 or 0 for a good or a bad label.

    Attributes:
        id: unique among the groups that are being scored.
        preferences: P(i ≻ j) for all K×K pairs, where annotators' votes or a judge gave it; the diagonal is ½.
            None: only the scores are known.
        contested: of the completions, those that are not to be learned from, as the scorer says; empty: none.
        votes: of a data set, for each completion the annotators' votes: counts by class.
        metrics: what the scorer says of this group besides, averaged over the groups of a step or an evaluation.
        inferred: the pairs i < j that nobody compared: their preferences are worked out from those of others.
        seed: of what an algorithm draws of this group: a function of run, step and prompt where it was sampled.
        token_scores: of each completion a reward for each of its tokens, where the scorer gives them; empty: none.
        trust, shares, skipped: see `Judgement`.
    """

    id: str
    prompt: Prompt
    completions: tuple[Completion, ...]
    texts: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    preferences: tuple[tuple[float, ...], ...] | None = None
    votes: tuple[tuple[float, ...], ...] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    contested: tuple[bool, ...] = ()
    token_scores: tuple[tuple[float, ...], ...] = ()
    inferred: tuple[tuple[int, int], ...] = ()
    trust: tuple[float, ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()
    skipped: tuple[bool, ...] = ()

    @property
    def known_scores(self) -> tuple[float | None, ...]:
        """For means and tables: None where the scorer failed and the completion is skipped, whose number in `scores`
        stands for one that nobody knows."""
        return known_scores(self.scores or (), self.skipped)


@dataclass(frozen=True)
class Judgement:
    """What a scorer may give for one group instead of its scores alone.

    Attributes:
        scores: one for each of the K completions, higher is better.
        preferences: K×K, P(i ≻ j), P(i ≻ j) + P(j ≻ i) = 1; None: only the scores are known.
        metrics: by name, of this group; they are averaged over the groups of a rollout that have them.
        contested: for each completion whether nothing is to be learned from it; empty: from all.
        token_scores: for each completion a reward for each of its tokens, for methods that take them (ppo, and
            policy_gradient with reinforce_pp) instead of the score at its last; empty: the scores alone.
        inferred: the pairs i < j of the preferences that were not compared, but worked out from others.
        trust: for each completion from 0 to 1: how much is learned from it; empty: all count the same, 1. What is
            learned from several counts as the one that is trusted least.
        shares: for each completion the probability of each class, where the scorer has classes; a labelling keeps them.
        skipped: for each completion whether the scorer failed on it, so that its score stands for nothing: it is
            contested, too; empty: none.
    """

    scores: tuple[float, ...]
    preferences: tuple[tuple[float, ...], ...] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    contested: tuple[bool, ...] = ()
    token_scores: tuple[tuple[float, ...], ...] = ()
    inferred: tuple[tuple[int, int], ...] = ()
    trust: tuple[float, ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()
    skipped: tuple[bool, ...] = ()


def known_scores(scores: Collection[float], skipped: Collection[bool]) -> tuple[float | None, ...]:
    """See `Group.known_scores`."""
    skipped = skipped or (False,) * len(scores)
    return tuple(None if out else score for score, out in zip(scores, skipped, strict=True))


def unscored(metrics: Mapping[str, float]) -> bool:
    """Whether a judge refused all that it was asked of a group, by its metrics: the scores then stand for nothing."""
    return metrics.get("judge/refused") == 1.0


class Column(enum.Enum):
    """Numbers that a learner can compute for each completion token of a sequence, or for the whole of it."""

    LOGPS = "logps"  # log-prob of the token, at the rollout temperature
    ENTROPY = "entropy"  # of the next-token distribution there
    VALUES = "values"  # of a scalar head, once the token is read; a reward model's score is the last token's
    STATE_VALUES = "state_values"  # of a scalar head, before the token is read: of the state in which it is chosen
    CLASSES = "classes"  # logits of a classifier's L classes for the whole sequence: [R, L], not [R, T]
    REFERENCE_KL = "reference_kl"  # exact KL(π_ref‖π) of the next-token distributions; the reference is a peer


@dataclass(frozen=True)
class TopLogits:
    """A column of 1 + k numbers a token: the token's own logit, then the k largest ones of other tokens."""

    k: int
    value: ClassVar[str] = "top_logits"


AnyColumn = Column | TopLogits


@dataclass(frozen=True)
class Sequence:
    """A prompt and one completion of it, as one row of a batch.

    Attributes:
        rollout_logps: as the engine gave them; empty when the completion comes from a data set.
        columns: "role/column" → float32 array with one number (or one row of them) a completion token, as
            filled in by `Learner.annotate`, for instance "reference/logps".
        images: of the prompt, in the order of their tokens.
        trust: from 0 to 1: how much is learned from it, see `Judgement`.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    rollout_logps: tuple[float, ...] = ()
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    images: tuple[Picture, ...] = ()
    trust: float = 1.0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Example:
    """What one loss term needs: a pair (chosen, rejected), a single sequence, or K ranked candidates.

    The unit of sharding over ranks and of splitting into micro-batches.

    Attributes:
        sequences: the rows, in the order that the algorithm's loss expects.
        values: numbers that belong to the example, by name: one (a soft label, say), or one a row (ranks).
    """

    sequences: tuple[Sequence, ...]
    values: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Examples as padded tensors. Every example has the same number of rows n, so R = B·n and the
    rows of example b are b·n … b·n+n−1.

    Attributes:
        input_ids: [R, S] prompt and completion, padded on the right.
        attention_mask: [R, S] 1 where there is a token. Carried, never inferred from a pad id.
        labels: [R, T] completion tokens, padded on the right.
        positions: [R, T] where in `input_ids` the logits that predict each label stand.
        mask: [R, T] 1 where there is a completion token.
        rollout_logps: [R, T] the engine's, NaN where unknown.
        columns: "role/column" → [R, T] float32, as annotated.
        values: name → [B] float32, or [B, n].
        weight: [B] of the loss: that of the row which is trusted least, 1.0 unless the scorer says less; 0.0 for an
            example that only keeps ranks in step.
        rows: n.
        images: [R] the images of each row. Empty: no row of the whole step has one; all rows without one: another
            micro-batch of the step has.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    rollout_logps: torch.Tensor
    columns: Mapping[str, torch.Tensor]
    values: Mapping[str, torch.Tensor]
    weight: torch.Tensor
    rows: int
    images: tuple[tuple[Picture, ...], ...] = ()

    def by_example(self, per_row: torch.Tensor) -> torch.Tensor:
        """[R, …] → [B, n, …]."""
        return per_row.reshape(-1, self.rows, *per_row.shape[1:])


@dataclass(frozen=True)
class Terms:
    """What an algorithm's loss gives for one micro-batch, before any reduction.

    Attributes:
        loss: [B] or [R, T]; the learner sums it and divides by the algorithm's denominator for the
            whole step, so masked tokens must already be exactly 0. A [B] loss is multiplied by
            `Batch.weight` by the learner, a [R, T] loss by the weight of the row's example.
        metrics: name → [B], detached; averaged over the real examples of the whole step.
    """

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


Metrics = dict[str, float]

"""What the tests of algorithms share: groups, and a policy small enough to work with exactly.

The policy is a bigram table in float64: the logits of a token are a row of the table, chosen by the token before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayalign.collate import collate
from rayalign.types import AnyColumn, Batch, Column, Completion, Example, Group, Prompt, Terms, TopLogits

VOCABULARY = 12


def group(name: str, prompt: Sequence[int], answers: Sequence[Sequence[int]], scores: Any, **more: Any) -> Group:
    """As a row of a data set becomes one."""
    completions = tuple(Completion(f"{name}/{k}", tuple(ids), (), "stop", -1) for k, ids in enumerate(answers))
    extra = more.pop("extra", {})
    texts = tuple("".join(chr(97 + i) for i in ids) for ids in answers)
    return Group(name, Prompt(0, name, tuple(prompt), extra), completions, texts, scores=tuple(scores), **more)


def random_groups(count: int, scores: Sequence[float], seed: int = 0) -> list[Group]:
    """Groups with different prompts and answers of different lengths."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(n)]

    return [
        group(f"row-{i}", [i % VOCABULARY, *ids(2 + i)], [ids(rng.randint(2, 7)) for _ in scores], scores)
        for i in range(count)
    ]


def table(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, VOCABULARY + 1, generator=generator, dtype=torch.float64)


def columns_of(batch: Batch, policy: Tensor, reference: Tensor, wanted: Sequence[AnyColumn]) -> dict[str, Tensor]:
    """ "policy/…" with gradients into the table; its last column is a scalar head on the token itself."""
    before = batch.input_ids.gather(1, batch.positions)
    logits = policy[before, :VOCABULARY]
    logps, ref_logps = logits.log_softmax(-1), reference[before, :VOCABULARY].log_softmax(-1)
    found = {}
    for column in wanted:
        if column is Column.LOGPS:
            values = logps.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
        elif column is Column.ENTROPY:
            values = -(logps.exp() * logps).sum(-1)
        elif column is Column.VALUES:
            values = policy[batch.labels, VOCABULARY]
        elif column is Column.REFERENCE_KL:
            values = (ref_logps.exp() * (ref_logps - logps)).sum(-1)
        else:
            assert isinstance(column, TopLogits)
            own = logits.gather(-1, batch.labels.unsqueeze(-1))
            others = logits.scatter(-1, batch.labels.unsqueeze(-1), -torch.inf)
            values = torch.cat([own, others.topk(column.k, -1).values], -1)
        found[f"policy/{column.value}"] = values
    return found


def annotated(examples: Sequence[Example], reference: Tensor) -> list[Example]:
    """With the columns that a reference model would fill in."""
    made = []
    for example in examples:
        rows = []
        for row in example.sequences:
            ids = torch.tensor([*row.prompt_ids, *row.completion_ids])
            logps = reference[ids[:-1], :VOCABULARY].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            found = {"reference/logps": logps[len(row.prompt_ids) - 1 :].float().numpy()}
            rows.append(replace(row, columns={**row.columns, **found}))
        made.append(replace(example, sequences=tuple(rows)))
    return made


def step(
    algorithm: Any, examples: Sequence[Example], policy: Tensor, reference: Tensor, parts: Sequence[Sequence[int]]
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of one training step, its examples in these micro-batches, as a learner reduces them."""
    if algorithm.needs:
        examples = annotated(examples, reference)
    examples = algorithm.dealt(examples, ())
    rows = algorithm.loss_rows

    def batched(seen: slice) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        for part in parts:
            some = [replace(examples[index], sequences=examples[index].sequences[seen]) for index in part]
            if some := [example for example in some if example.sequences]:
                batch = collate(some, pad_id=0)
                yield batch, columns_of(batch, policy, reference, algorithm.columns)

    statistics: dict[str, Tensor] = {}
    if algorithm.statistics is not None:
        with torch.no_grad():
            for batch, found in batched(slice(rows, None)):
                for name, value in algorithm.statistics(batch, found).items():
                    statistics[name] = statistics.get(name, 0.0) + value
    total, metrics = torch.zeros((), dtype=torch.float64), {}
    for batch, found in batched(slice(rows)):
        terms: Terms = algorithm.loss(batch, found, statistics)
        assert terms.loss.shape in (batch.weight.shape, batch.labels.shape)
        total = total + terms.loss.double().sum()
        for name, value in terms.metrics.items():
            assert value.shape == batch.weight.shape and not value.requires_grad, name
            metrics[name] = metrics.get(name, 0.0) + float(value.double().sum()) / len(examples)
    return total / algorithm.denominator(examples), metrics


def whole(algorithm: Any, groups: Sequence[Group], seed: int = 1) -> tuple[float, dict[str, float]]:
    """Loss and metrics of one step with all examples of as many rows in one micro-batch."""
    examples, _ = algorithm.examples(groups)
    widths = sorted({len(example.sequences) for example in examples})
    parts = [[i for i, e in enumerate(examples) if len(e.sequences) == width] for width in widths]
    loss, metrics = step(algorithm, examples, table(seed), table(0), parts)
    return float(loss), metrics


def logps(prompt: Sequence[int], answer: Sequence[int], seed: int) -> np.ndarray:
    """Of the answer's tokens under the table of a seed: worked out apart from the code above."""
    weights = table(seed)[:, :VOCABULARY].numpy()
    ids = [*prompt, *answer]
    found = [weights[a, b] - np.log(np.exp(weights[a]).sum()) for a, b in zip(ids[:-1], ids[1:], strict=True)]
    return np.array(found[len(prompt) - 1 :])

"""What the tests of policy_gradient and ppo share: groups as an engine gives them, and columns as learners do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rayalign.algorithms.credits import ADVANTAGES
from tests.unit.algorithm_cases import group

NO_KL = {"coef": 0}
K1 = {"in": "reward", "estimator": "k1", "coef": 0.5}
K3 = {"in": "loss", "estimator": "k3", "coef": 0.5}


def sampled(groups, cut=()):
    """Groups as an engine gives them: each token has a log-prob; of these completions of each the end was cut off."""
    made = []
    for each in groups:
        completions = tuple(
            replace(c, logps=tuple(-0.5 - 0.1 * i for i in range(len(c.token_ids))), finish_reason="length")
            if k in cut
            else replace(c, logps=tuple(-0.5 - 0.1 * i for i in range(len(c.token_ids))))
            for k, c in enumerate(each.completions)
        )
        made.append(replace(each, completions=completions))
    return made


def annotated(examples, **columns):
    """With the same number at every token: annotated(examples, policy_logps=-1.0)."""
    made = []
    for example in examples:
        row = example.sequences[0]
        count = len(row.completion_ids)
        more = {name.replace("_", "/", 1): np.full(count, value, np.float32) for name, value in columns.items()}
        made.append(replace(example, sequences=(replace(row, columns={**row.columns, **more}),)))
    return made


def advantages(examples):
    return [example.sequences[0].columns[ADVANTAGES].tolist() for example in examples]


def one(scores, lengths=None, **more):
    """One group whose answers have these scores and lengths."""
    lengths = lengths or [1 + k for k in range(len(scores))]
    return sampled([group("p", [1, 2], [[3] * n for n in lengths], scores, **more)])

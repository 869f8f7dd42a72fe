"""What a server of OpenAI's chat completions says in tests, and what it is asked."""

from __future__ import annotations

import math

from rayalign.scorers.asking import Question


def reply(*top: tuple[str, object], said: tuple[str, object] | None = None) -> dict:
    """As OpenAI's chat completions: the first of the top tokens is the one that was sampled, unless another is."""
    token, logp = said or top[0]
    content = [{"token": token, "logprob": logp, "top_logprobs": [{"token": t, "logprob": p} for t, p in top]}]
    return {"choices": [{"message": {"content": token}, "logprobs": {"content": content}}]}


GOOD = reply(("A", math.log(0.6)), ("B", math.log(0.3)), ("I", math.log(0.05)))


def questions(count: int = 3, reasoning: int = 0) -> list[Question]:
    return [
        Question(f"q{i}", ({"role": "user", "content": f"question {i}"},), ("A", "B"), reasoning, "So: A or B?")
        for i in range(count)
    ]

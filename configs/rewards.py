"""Rewards of one's own, for `scorer: {name: python, function: "configs.rewards:on_topic"}`."""

from __future__ import annotations

import re

WORD = re.compile(r"[a-z]{5,}")  # the long words of a prompt say what it is about


def on_topic(prompts: list[str], completions: list[str], longest: int = 30) -> list[float]:
    """From 0 to 1: the share of the prompt's long words that the completion takes up, less so when it is long.

    Args:
        prompts, completions: texts, one of each for each number that is returned.
        longest: words beyond which a completion loses.
    """
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked = set(WORD.findall(prompt.lower()))
        taken_up = len(asked & set(WORD.findall(completion.lower()))) / max(1, len(asked))
        scores.append(taken_up * min(1.0, longest / max(1, len(completion.split()))))
    return scores

"""Groups to score, made of texts."""

from __future__ import annotations

from typing import Any

from rayalign.types import Completion, Group, Prompt


def group(index: int, *texts: str, **extra: Any) -> Group:
    """One prompt with these completions. Its tokens mean nothing: what is scored are the texts."""
    text = f"prompt {index}"
    prompt = Prompt(index, text, (4, 5), extra, messages=({"role": "user", "content": text},))
    completions = tuple(Completion(f"{index}/{k}", (k + 4, 1), (), "stop", 0) for k in range(len(texts)))
    return Group(f"g{index}", prompt, completions, texts)

"""What both engines need: what a request may ask for, the model's own end tokens and dtype, memory used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from rayalign.errors import DataError
from rayalign.types import Request

MOST_CHOICES = 128  # vLLM's limit of logprob_token_ids


def check_requests(requests: Sequence[Request], open_ids: Iterable[str], *, max_context: int, engine: str) -> None:
    """Refuse requests that cannot be served whole, before any of them is taken in.

    Raises:
        DataError: a request with an empty prompt, nothing to sample, or more than `max_context` tokens.
        ValueError: a request id that is open already.
    """
    seen = set(open_ids)
    for request in requests:
        if request.id in seen:
            raise ValueError(f"{engine}: a request with the id {request.id!r} is open already")
        seen.add(request.id)
        prompt, new = len(request.prompt_ids), request.sampling.max_tokens
        if prompt == 0 or new < 1:
            raise DataError(
                "a request needs a prompt and something to sample",
                where=f"request {request.id}",
                value=f"{prompt} prompt tokens, max_tokens {new}",
                rule="at least 1 of each",
                remedy="drop empty prompts from the data, set max_tokens to 1 or more",
            )
        check_choices(request)
        if prompt + new > max_context:
            raise DataError(
                "prompt and completion are longer than the engine's context",
                where=f"request {request.id}",
                value=f"{prompt} prompt tokens + max_tokens {new} = {prompt + new}",
                rule=f"at most {max_context} (engine.max_context)",
                remedy="shorten or drop the prompt, lower max_tokens, or raise engine.max_context",
            )


def check_choices(request: Request) -> None:
    """Raises DataError for more choices than engines look up at once, or one of them twice."""
    choices = request.sampling.choices
    if len(choices) > MOST_CHOICES or len(set(choices)) < len(choices):
        raise DataError(
            "these choices cannot be told apart" if len(choices) <= MOST_CHOICES else "too many choices",
            where=f"request {request.id}",
            value=f"{len(choices)} tokens, {len(set(choices))} of them different",
            rule=f"at most {MOST_CHOICES} different tokens",
            remedy="ask for fewer",
        )


def check_sequences(sequences: Sequence[tuple[int, ...]], *, max_context: int, engine: str) -> None:
    """Refuse sequences whose log-probs cannot be taken. Raises DataError."""
    for index, sequence in enumerate(sequences):
        if not 1 <= len(sequence) <= max_context:
            raise DataError(
                "a sequence does not fit the engine's context",
                where=f"{engine}, sequence {index}",
                value=f"{len(sequence)} tokens",
                rule=f"1 to {max_context} (engine.max_context)",
            )


def refuse_when_open(what: str, open_requests: int, *, engine: str) -> None:
    """Weights and caches change only between requests. Raises RuntimeError."""
    if open_requests:
        raise RuntimeError(f"{engine}: cannot {what} while {open_requests} requests are open; poll or abort them first")


def model_dtype(model: str, *, trust_remote_code: bool = False) -> str:
    """The dtype that a model folder was saved in: "float32", "bfloat16", …"""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).dtype
    return str(dtype or torch.float32).removeprefix("torch.")


def end_token_ids(model: str, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """The tokens that end a completion according to a model folder: of its generation config, else its config."""
    from transformers import AutoConfig, GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # a folder need not have one
        ids = None
    if ids is None:
        ids = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config().eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bar of transformers while a model loads: an engine's host has its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

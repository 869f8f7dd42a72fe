"""What disagreement.py measures with: words and their frozen features, and a small head that learns from votes."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayalign.algorithms.disagreement import Disagreement
from rayalign.algorithms.votes import BINS, vote_shares
from rayalign.collate import collate
from rayalign.maths.disagreement import fit_temperature
from rayalign.maths.divergence import jensen_shannon
from rayalign.scorers.ratings import held_out
from rayalign.types import Completion, Group, Prompt
from tests.bench.word_votes import CLASSES, prompt_of

NUMBERS = ("nll", "js", "accuracy", "ece")


def words_of(lexicon: dict[str, Any], small: bool) -> dict[str, list[str]]:
    """train, validation and test: by word, the same whatever else changes."""
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for word in sorted(lexicon):
        half = hashlib.blake2b(f"half {word}".encode(), digest_size=1).digest()[0] % 2
        parts["train" if not held_out(word) else ("validation", "test")[half]].append(word)
    return {name: words[:200] for name, words in parts.items()} if small else parts


def features(words: list[str], out: Path, model_path: str) -> dict[str, torch.Tensor]:
    """Word → the last hidden state at the end of it, after the prompt, in float32; computed once."""
    file = out / "features.pt"
    if file.is_file():
        known = torch.load(file, weights_only=True)
        if known["words"] == words and known.get("model") == model_path:
            return dict(zip(words, known["features"], strict=True))
    from transformers import AutoModel, AutoTokenizer

    from rayalign.data.tokens import Turns

    path = str(Path(model_path).expanduser())
    tokenizer = AutoTokenizer.from_pretrained(path)
    turns = Turns(tokenizer, chat_template=bool(tokenizer.chat_template))
    model, found, begun = AutoModel.from_pretrained(path, dtype=torch.float32).eval(), [], time.time()
    for start in range(0, len(words), 64):
        rows = []
        for word in words[start : start + 64]:
            messages = [{"role": "user", "content": prompt_of(word)}]
            rows.append(turns.prompt(messages, word) + turns.answer(messages, word, word))
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.inference_mode():
            hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        found.append(hidden[torch.arange(len(rows)), mask.sum(1) - 1].float())
    stacked = torch.cat(found)
    torch.save({"words": words, "model": model_path, "features": stacked}, file)
    print(f"features of {len(words):,} words: {(time.time() - begun) / 60:.1f} min", flush=True)
    return dict(zip(words, stacked, strict=True))


def head_of(inputs: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(inputs, 64), torch.nn.GELU(), torch.nn.Linear(64, len(CLASSES)))


def train_head(
    settings: dict[str, Any],
    x: dict[str, torch.Tensor],
    votes: dict[str, torch.Tensor],
    *,
    seed: int,
    batch: int,
    epochs: int,
) -> dict[str, Any]:
    """Train a head on votes [n, L] of x [n, H]; metrics of the test's ten raters by epoch, and those of the epoch that
    the validation's votes choose, without and with a temperature fitted on them."""
    algorithm = Disagreement(classes=CLASSES, **settings)
    torch.manual_seed(seed)
    head = head_of(x["train"].shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    order, carried, curve, best = np.random.default_rng(seed), {}, [], None
    for _ in range(epochs):
        for part in np.array_split(order.permutation(len(x["train"])), max(1, len(x["train"]) // batch)):
            place = torch.from_numpy(part)
            loss = loss_of(algorithm, head(x["train"][place]), votes["train"][place], carried)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            logits = {name: head(x[name]).double() for name in ("validation", "test")}
        chosen = metrics_of(logits["validation"], votes["validation"])["nll"]
        curve.append(metrics_of(logits["test"], votes["test"]))
        if best is None or chosen < best[0]:
            best = (chosen, len(curve) - 1, logits)
    chosen, epoch, logits = best
    temperature = fit_temperature(logits["validation"], vote_shares(votes["validation"]))
    return {
        "validation": chosen,
        "epoch": epoch,
        "best": curve[epoch],
        "last": curve[-1],
        "tempered": metrics_of(logits["test"] / temperature, votes["test"]),
        "temperature": temperature,
        "curve": [{name: each[name] for name in NUMBERS} for each in curve],
    }


def loss_of(
    algorithm: Disagreement, logits: torch.Tensor, votes: torch.Tensor, carried: dict[str, Any]
) -> torch.Tensor:
    """The mean loss of one step, all rows of which are in one micro-batch, as a learner makes it."""
    batch = batch_of(votes)
    columns, known = {"policy/classes": logits}, {}
    if algorithm.statistics is not None:
        with torch.no_grad():
            known = dict(algorithm.statistics(batch, columns))
            for name, decay in algorithm.carries.items():
                before = carried.get(name)
                fresh = 1.0 if before is None else 1.0 - decay
                known[name] = carried[name] = fresh * known[name] + (0.0 if before is None else decay * before)
                known[f"{name}/fresh"] = torch.full_like(known[name], fresh)
            if algorithm.further_statistics is not None:
                known |= algorithm.further_statistics(batch, columns, known)
    return algorithm.loss(batch, columns, known).loss.mean()


_SHELL = collate(
    Disagreement(classes=CLASSES).examples(
        [Group("", Prompt(0, "", (1,)), (Completion("", (1,), (), "stop", 0),), ("",), votes=((0.0,) * 3,))]
    )[0],
    pad_id=0,
)


def batch_of(votes: torch.Tensor) -> Any:
    """A batch of which only the votes are looked at."""
    return replace(_SHELL, values={f"votes/{place}": votes[:, place] for place in range(votes.shape[1])})


def metrics_of(logits: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
    """Against the raters' counts [n, L]: see the top of this file."""
    log_q, counts = torch.log_softmax(logits.double(), -1), counts.double()
    shares = vote_shares(counts)
    confidence, top = log_q.exp().max(-1)
    said = shares.gather(1, top[:, None])[:, 0]
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = [float(((said - confidence) * (place == index)).sum()) for index in range(BINS)]
    return {
        "nll": float(-(shares * log_q).sum(-1).mean()),
        "js": float(jensen_shannon(shares.clamp(min=1e-12).log(), log_q).mean()),
        "accuracy": float((counts.gather(1, top[:, None])[:, 0] == counts.amax(-1)).double().mean()),
        "ece": sum(map(abs, gaps)) / len(counts),
    }

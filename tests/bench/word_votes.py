"""Votes on words, for configs and benchmarks: what ten people said of each word of VADER's lexicon, thinned to some.

A word's ratings from −4 to 4 are votes for three classes: bad (below 0), neutral (0) and good. Only words that
`scorers.ratings.held_out` does not name are written: the others are for evaluations.

  python tests/bench/word_votes.py                       configs/data/word_votes.jsonl, three raters a word
  python tests/bench/word_votes.py --raters 1 --words 0 --out votes.jsonl    one rater, all training words

The lexicon is that of the package vaderSentiment (Hutto and Gilbert 2014; MIT licence).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CLASSES = ("bad", "neutral", "good")
FILMS = 500  # prompts: a run holds out some of them, with all their words


def prompt_of(word: str) -> str:
    """A function of the word alone."""
    film = int.from_bytes(hashlib.blake2b(f"film {word}".encode(), digest_size=8).digest(), "big") % FILMS
    return f"In one word, how was film {film}?"


def votes_of(ratings: Sequence[int]) -> list[int]:
    """Ratings from −4 to 4 → votes for bad, neutral and good."""
    signs = [(rating > 0) - (rating < 0) for rating in ratings]
    return [signs.count(sign) for sign in (-1, 0, 1)]


def thinned(word: str, ratings: Sequence[int], raters: int, seed: int) -> list[int]:
    """Some of a word's ratings, drawn without replacement: a function of word and seed alone."""
    own = int.from_bytes(hashlib.blake2b(f"{seed} {word}".encode(), digest_size=8).digest(), "big")
    order = np.random.default_rng(own).permutation(len(ratings))[:raters]
    return [ratings[index] for index in sorted(order.tolist())]


def rows(lexicon: Mapping[str, Sequence[int]], raters: int, seed: int = 0, words: int = 0) -> list[dict[str, object]]:
    """Rows of words that are not held out, in alphabetical order.

    Args:
        words: so many of those that are letters only, chosen by a hash; 0: all, emoticons included.
    """
    from rayalign.scorers.ratings import held_out

    chosen = [word for word in lexicon if not held_out(word)]
    if words:
        plain = [word for word in chosen if word.isalpha()]
        chosen = sorted(plain, key=lambda word: hashlib.blake2b(word.encode()).digest())[:words]
    return [
        {"prompt": prompt_of(word), "completion": word, "votes": votes_of(thinned(word, lexicon[word], raters, seed))}
        for word in sorted(chosen)
    ]


def main() -> None:
    from rayalign.scorers.ratings import read_lexicon

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raters", type=int, default=3, choices=range(1, 11), metavar="1…10", help="kept of each word")
    parser.add_argument("--words", type=int, default=3000, help="0: all")
    parser.add_argument("--seed", type=int, default=0, help="of which raters are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "configs/data/word_votes.jsonl")
    arguments = parser.parse_args()
    found = rows(read_lexicon(), arguments.raters, arguments.seed, arguments.words)
    arguments.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), "utf-8")
    print(
        f"{len(found):,} words, {arguments.raters} raters each, {arguments.out.stat().st_size:,} bytes: {arguments.out}"
    )


if __name__ == "__main__":
    main()

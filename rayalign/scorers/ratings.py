"""What people said of words, ten of them of each: a reward that no model has learned, for evaluations.

The words of VADER's lexicon are parted once and for all: those that `held_out` names are for evaluations, and what
learns from the ratings (a preference model, say) learns from the others.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from rayalign.data.rows import decoded
from rayalign.errors import ConfigError
from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.types import Group, Judgement

AROUND = ".,;:!?\"'()[]{}*_~`“”‘’…—–-"  # what may stand around a word that is not part of it


def held_out(word: str) -> bool:
    """Whether what people said of this word is for evaluations: one word in five, by a hash of the word alone."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") % 5 == 0


def read_lexicon(path: str | Path | None = None) -> dict[str, tuple[int, ...]]:
    """Word → its ratings from −4 to 4, in the file's order. Of a word that is there twice the last one counts.

    Args:
        path: a file with lines of word, mean, standard deviation and the list of ratings, with tabs between them.
            None: that of the package vaderSentiment.

    Raises:
        ConfigError: there is no such file, or it is none of this form.
        DataError: it is not UTF-8.
    """
    file = _package_file() if path is None else Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            "there is no lexicon with ratings",
            where="key scorer.lexicon",
            value=str(file),
            rule="a file such as vader_lexicon.txt of the package vaderSentiment",
            remedy="correct the path, or take lexicon out to use the package's",
        )
    found: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(decoded(file.read_bytes(), str(file)).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            word, _, _, listed = line.rstrip().split("\t")
            found[word] = tuple(ast.literal_eval(listed.strip()))
            readable = bool(found[word]) and all(type(rating) is int for rating in found[word])
        except (ValueError, SyntaxError, TypeError):
            readable = False
        if not readable:
            raise ConfigError(
                "this line of the lexicon has no ratings",
                where=f"{file}:{number}",
                value=line,
                rule="word, mean, standard deviation and [ratings], whole numbers all, with tabs between them",
                remedy="correct the line, or name another file",
            )
    return found


def _package_file() -> Path:
    spec = find_spec("vaderSentiment")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the lexicon's package is not installed",
            where="key scorer.lexicon",
            value="vaderSentiment",
            rule="the package, or a file of one's own",
            remedy="pip install vaderSentiment, or set scorer.lexicon",
        )
    return Path(spec.origin).with_name("vader_lexicon.txt")


def words_in(text: str, lexicon: Mapping[str, object]) -> list[str]:
    """The words of a text that a lexicon has, as it spells them, in their order: as they stand there, in lower case,
    or without the punctuation around them."""
    found = []
    for each in text.split():
        ways = (each, each.lower(), each.strip(AROUND), each.strip(AROUND).lower())
        word = next((way for way in ways if way in lexicon), None)
        if word is not None:
            found.append(word)
    return found


class Ratings(ScorerConfig):
    """Human ratings: the mean of what ten people said of each of an answer's words, from −4 to 4.

    Only words of the chosen part of the lexicon count, each as often as it stands there; an answer without one has 0.
    `held_out` are the words that no preference model of this package has learned from, so that it measures what a
    policy learned of people, not of the model that stood for them. Words of one stem may stand on both sides.
    Metrics: `ratings/words`, how many of its words count, and `ratings/coverage`, the share of answers with one.
    """

    paper: ClassVar = "Hutto and Gilbert 2014, ICWSM (the ratings of VADER's lexicon)"
    name: Literal["ratings"] = "ratings"
    words: Literal["held_out", "training", "all"] = Field(
        "held_out", description="which of the rated words count: one in five, by a hash of the word; the others; all"
    )
    lexicon: str | None = Field(
        None, description="file with words and their ratings, in VADER's form; none: the package's, ten raters a word"
    )

    def check(self, model: str, *, trust_remote_code: bool = False) -> None:
        read_lexicon(self.lexicon)

    def check_files(self) -> None:
        read_lexicon(self.lexicon)

    def contents(self) -> dict[str, str]:
        if self.lexicon is None:
            return {}
        text = json.dumps(read_lexicon(self.lexicon), sort_keys=True)
        return {"lexicon": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}

    def start(self) -> ScoreFunction:
        kept = {"held_out": (True,), "training": (False,), "all": (True, False)}[self.words]
        lexicon = read_lexicon(self.lexicon)
        means = {word: sum(ratings) / len(ratings) for word, ratings in lexicon.items() if held_out(word) in kept}

        def judged(group: Group) -> Judgement:
            # Looked up in the whole, as ":D", which is held out, is not the ":d" of the others.
            said = [[means[word] for word in words_in(text, lexicon) if word in means] for text in group.texts]
            scores = tuple(sum(each) / len(each) if each else 0.0 for each in said)
            count = len(said)
            metrics = {
                "ratings/words": sum(map(len, said)) / count,
                "ratings/coverage": sum(bool(each) for each in said) / count,
            }
            return Judgement(scores, None, metrics)

        def score(groups: Sequence[Group]) -> list[Judgement]:
            return [judged(group) for group in groups]

        return score

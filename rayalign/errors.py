"""Every error that a user may meet: what went wrong, where, the value, the rule, and the remedy.

All of them pickle, so that they cross process boundaries whole, and all of them are `RayalignError`,
so that the command line can print them without a traceback.
"""

from __future__ import annotations


class RayalignError(Exception):
    """Base of all errors that are written to a person.

    Args:
        what: one sentence, what went wrong.
        where: the key of a config, a file and row, or an actor.
        value: what was found there.
        rule: what should have been there.
        remedy: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", value: object = None, rule: str = "", remedy: str = ""):
        super().__init__(what)
        self.what, self.where, self.value, self.rule, self.remedy = what, where, value, rule, remedy

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.where, self.value, self.rule, self.remedy)

    def __str__(self) -> str:
        """At most four lines: what and where, found, rule, remedy."""
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.value is not None:
            lines.append(f"  found:  {_short(self.value)}")
        if self.rule:
            lines.append(f"  rule:   {_short(self.rule)}")
        if self.remedy:
            lines.append(f"  remedy: {_short(self.remedy)}")
        return "\n".join(lines)


class ConfigError(RayalignError):
    """A config, or an override on the command line, that cannot be run."""

    exit_code = 2


class DataError(RayalignError):
    """A data file, or a row of one, that cannot be used."""

    exit_code = 2


class EngineLost(RayalignError):
    """An inference engine died and could not be replaced, or missed its deadline."""


class ScorerLost(RayalignError):
    """A scorer died and could not be replaced, or missed its deadline."""


class ScoreError(RayalignError):
    """A scorer gave the wrong number of scores, or a score that is not a finite number."""


class LearnerLost(RayalignError):
    """A learner rank died or missed its deadline. The run goes on from its last checkpoint."""


class ActorError(RayalignError):
    """Something failed in an actor that is not one of ours: the cause, and where its traceback is."""


class SyncMismatch(RayalignError):
    """The weights in an engine are not the learner's."""


class TrainingStopped(RayalignError):
    """Training cannot usefully go on: nothing to learn from, or numbers that are not finite."""


class CheckpointError(RayalignError):
    """A checkpoint that cannot be written or read."""


def _rebuild(cls, what, where, value, rule, remedy):
    return cls(what, where=where, value=value, rule=rule, remedy=remedy)


def _short(value: object, limit: int = 180) -> str:
    """On one line that a terminal can hold."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"

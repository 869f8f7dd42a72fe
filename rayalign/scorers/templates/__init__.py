"""Templates of a judge: files that say what it is asked, and which tokens are its answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from rayalign.errors import ConfigError
from rayalign.record import Record, Unfit
from rayalign.registry import did_you_mean
from rayalign.scorers.asking import Question

FOLDER = Path(__file__).parent
PLACEHOLDERS = {"pairwise": ("prompt", "first", "second"), "direct": ("prompt", "answer")}
NEEDED = {"pairwise": ("first", "second"), "direct": ("answer",)}  # {prompt} may be left out
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
PLAIN = {"float_parsing": "a number"}  # what pydantic says, in fewer words

Mode = Literal["pairwise", "direct"]


class Template(Record):
    """What a judge is asked. In `prompt` the placeholders stand for what is judged: {prompt} (all of a
    conversation, each message behind its role, where there are several), and {first} and {second} (pairwise) or
    {answer} (direct). A word in braces that is none of these is an error; other braces are text."""

    mode: Mode = Field(description="pairwise: two answers are compared; direct: one is rated")
    system: str = Field("", description="a system message before everything; empty: none")
    prompt: str = Field(description="the user's message, with placeholders")
    ask: str = Field(min_length=1, description="behind it: how to answer with one of the answers, and nothing else")
    think: str = Field("", description="instead of ask where the judge thinks first; ask then follows the thinking")
    answers: dict[str, float] = Field(
        description="answer, one token → what it stands for: P(the first is better), or a score on a scale of one's own"
    )
    examples: tuple[dict[str, str], ...] = Field(
        (), description="few-shot: values of the placeholders, the judge's verdict, and its thinking where it thinks"
    )

    @model_validator(mode="after")
    def _placeholders_are_known(self) -> Template:
        known, used = PLACEHOLDERS[self.mode], PLACEHOLDER.findall(self.prompt)
        for name in used:
            if name not in known:
                raise Unfit(
                    f"no placeholder is called {name}",
                    key="prompt",
                    rule=f"{_braced(known)} in a {self.mode} template",
                    remedy=did_you_mean(name, known),
                )
        for name in NEEDED[self.mode]:
            if name not in used:
                raise Unfit(
                    f"the judge would not see what it judges: {{{name}}} is missing",
                    key="prompt",
                    rule=f"{_braced(NEEDED[self.mode])} in a {self.mode} template",
                    remedy=f"put {{{name}}} where that text belongs",
                )
        return self

    @model_validator(mode="after")
    def _answers_say_something(self) -> Template:
        values = self.answers.values()
        blank = [answer for answer in self.answers if not answer.strip()]
        equal = len({answer.strip() for answer in self.answers}) < len(self.answers)
        if blank or equal or len(set(values)) < 2:
            raise Unfit(
                "an answer is empty" if blank else "two answers are equal" if equal else "all answers mean the same",
                key="answers",
                rule="at least two answers, each one token of the judge, with different values",
                remedy='write answers: {"1": 1, "2": 0}, say',
            )
        if self.mode == "pairwise" and not (0 <= min(values) < 0.5 < max(values) <= 1):
            raise Unfit(
                "these values are no verdicts",
                key="answers",
                rule="P(the first is better) of each answer, from 0 to 1: one above ½, and one below",
                remedy='write answers: {"1": 1, "2": 0}, say, with 0.5 for a third that stands for a tie',
            )
        return self

    @model_validator(mode="after")
    def _examples_are_whole(self) -> Template:
        needed = {name for name in PLACEHOLDERS[self.mode] if f"{{{name}}}" in self.prompt} | {"verdict"}
        for number, example in enumerate(self.examples, 1):
            lacking, unknown = needed - example.keys(), example.keys() - needed - {"thinking"}
            if lacking or unknown or example["verdict"] not in self.answers:
                raise Unfit(
                    f"example {number} lacks {', '.join(sorted(lacking))}"
                    if lacking
                    else f"example {number} has what the prompt has no place for: {', '.join(sorted(unknown))}"
                    if unknown
                    else f"example {number} ends with a verdict that is no answer: {example['verdict']}",
                    key="examples",
                    rule=f"{', '.join(sorted(needed))}, and thinking where the judge thinks; the verdict one of "
                    + ", ".join(self.answers),
                    remedy="complete it, or take it out",
                )
        return self

    def question(self, id: str, values: Mapping[str, str], *, reasoning: int = 0) -> Question:
        """What is asked about these values of the placeholders; what else they hold is left out."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for example in self.examples:
            messages += self._turns(example, reasoning)
        messages.append(self._user(values, self.think if reasoning else self.ask))
        return Question(id, tuple(messages), tuple(self.answers), reasoning, self.ask if reasoning else "")

    def _turns(self, example: Mapping[str, str], reasoning: int) -> list[dict[str, str]]:
        verdict = {"role": "assistant", "content": example["verdict"]}
        if not reasoning:
            return [self._user(example, self.ask), verdict]
        thinking = {"role": "assistant", "content": example["thinking"]}
        return [self._user(example, self.think), thinking, {"role": "user", "content": self.ask}, verdict]

    def _user(self, values: Mapping[str, str], ending: str) -> dict[str, str]:
        """One pass, so that braces in what is judged stay what they are."""
        text = PLACEHOLDER.sub(lambda found: values[found[1]], self.prompt)
        return {"role": "user", "content": f"{text.strip()}\n\n{ending.strip()}"}

    def check_reasoning(self, where: str) -> None:
        """Raises ConfigError when this template has no words for thinking first."""
        silent = [number for number, example in enumerate(self.examples, 1) if not example.get("thinking")]
        if not self.think or silent:
            raise ConfigError(
                "this template does not show how to think first",
                where=where,
                value="no key think" if not self.think else f"no thinking in example {silent[0]}",
                rule="with reasoning above 0: think, and thinking in each example",
                remedy="add it to the template, or set scorer.reasoning=0",
            )


def is_elsewhere(name: str) -> bool:
    """Whether this is a file that is not here (a job brings it along), rather than the name of a shipped template."""
    return name not in _shipped() and Path(name).suffix != "" and not Path(name).expanduser().exists()


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_template(name: str) -> Template:
    """One of those that are shipped, by its name, or a file. Raises ConfigError with the file and the key."""
    shipped = _shipped()
    path = shipped.get(name) or Path(name).expanduser()
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "this template cannot be read" if path.exists() else "there is no such template",
            where="key scorer.template",
            value=name if not path.exists() else f"{name}: {error}",
            rule=f"a YAML file in UTF-8, or one of {', '.join(shipped)}",
            remedy=did_you_mean(name, shipped),
        ) from None
    try:
        return Template.model_validate(_read(text, str(path)))
    except ValidationError as error:
        raise _unfit(error, str(path)) from None


def _read(text: str, where: str) -> Any:
    """Scalars stay the texts that they are, so that the answer 1, or yes, is a text; numbers are read by the record."""
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        if not _is_plain(root, set()):
            raise ConfigError(
                "this template is not plain YAML",
                where=where,
                value="a key that is no text, or an alias of what it stands in",
                rule="texts, lists, and mappings from texts",
                remedy="put a text that has braces, or begins with one, in quotes",
            )
        for key, line in _twice(root):
            raise ConfigError(
                "this key stands twice",
                where=f"{where}:{line}, key {key}",
                value=key,
                rule="each key once; answers have to differ",
                remedy="take one out",
            )
        found = yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506  it only makes texts, lists and mappings
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            "this template is not YAML",
            where=f"{where}:{mark.line + 1}" if mark else where,
            value=text.splitlines()[mark.line].strip() if mark and mark.line < len(text.splitlines()) else "its end",
            rule=f"YAML; its reader says: {getattr(error, 'problem', None) or error}",
            remedy="begin with a copy of one of those in rayalign/scorers/templates",
        ) from None
    return _said(root, found)


def _said(root: yaml.Node | None, found: Any) -> Any:
    """Without the keys that hold nothing: null, ~ or no word at all."""
    if not isinstance(root, yaml.MappingNode):
        return found
    blank = {key.value for key, value in root.value if _is_null(value)}
    return {key: value for key, value in found.items() if key not in blank}


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in ("", "~", "null", "Null", "NULL")


def _is_plain(node: yaml.Node | None, above: set[int]) -> bool:
    """Whether all keys are texts, and nothing holds itself. Args: above: ids of the nodes that hold this one."""
    if not isinstance(node, yaml.CollectionNode):
        return True
    if id(node) in above:
        return False
    inside = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        return all(_is_plain(each, inside) for each in node.value)
    return all(isinstance(key, yaml.ScalarNode) and _is_plain(value, inside) for key, value in node.value)


def _twice(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield str(key.value), key.start_mark.line + 1
            seen.add(str(key.value))
            yield from _twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            yield from _twice(each)


def _unfit(error: ValidationError, where: str) -> ConfigError:
    """The first fault, with the key of the template."""
    fault = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # a misspelt key lacks as well
    cause = fault.get("ctx", {}).get("error")
    path = ".".join(map(str, fault["loc"]))
    found = "nothing" if fault["type"] == "missing" else fault["input"] or "nothing"
    if not isinstance(cause, Unfit):
        known = {name: field.description or "" for name, field in Template.model_fields.items()}
        key = str(fault["loc"][0]) if fault["loc"] else ""
        extra, missing = fault["type"] == "extra_forbidden", fault["type"] == "missing"
        return ConfigError(
            "no key of a template is called so"
            if extra
            else "this key is missing"
            if missing
            else "this cannot be used",
            where=f"{where}, key {path}" if path else where,
            value=found,
            rule=PLAIN.get(fault["type"], fault["msg"]) if not extra else f"one of {', '.join(known)}",
            remedy=did_you_mean(key, known) if extra else known.get(key, "begin with a copy of a shipped template"),
        )
    value = found.get(cause.key) if isinstance(found, Mapping) else found
    return ConfigError(cause.what, where=f"{where}, key {cause.key}", value=value, rule=cause.rule, remedy=cause.remedy)


def _braced(names: tuple[str, ...]) -> str:
    return " ".join(f"{{{name}}}" for name in names)

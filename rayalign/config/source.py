"""Where a config comes from: the text of a file with the line of each key, and what the command line says over it.

Plain words are read as YAML 1.2 has them, not as PyYAML's YAML 1.1 would: 1e-6 is a number, yes and on are words,
010 is ten.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rayalign.errors import ConfigError
from rayalign.record import is_secret, redacted
from rayalign.registry import did_you_mean

FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
WORDS = (  # tag, what it looks like, what it begins with
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", "[-+]?[0-9]+", list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", "<<", ["<"]),
)
REMEDIES = (  # what PyYAML says → what to do about it
    ("character '\\t'", "indent with spaces; this line has a tab"),
    ("mapping values are not allowed", "put quotes around a text that holds a colon; or align it with the keys above"),
    ("could not find expected ':'", "put a colon and a space between key and value, also on the line before"),
    ("expected ',' or ']'", "close the bracket with ], or put a comma between its parts"),
    ("expected ',' or '}'", "close the brace with }, or put a comma between its keys"),
    ("undefined alias", "define it before with &, or put quotes around a text that begins with *"),
    ("cannot start any token", "put quotes around a text that begins with this character"),
    ("expected <block end>", "give all keys of a section the same indentation"),
    ("unexpected end of stream", "close the quote"),
    ("another document", "take out the ---: one file is one config"),
    ("<document start>", "write one mapping; if this is a data file, name it as data.prompts in a config"),
    ("unhashable", "put quotes around a key that begins with [ or {"),
    ("could not determine a constructor", "take out the tag that begins with !"),
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain words."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class Dumper(yaml.SafeDumper):
    """Puts quotes around what either version of YAML would take for something else than a text."""


for _tag, _pattern, _first in WORDS:
    for _each in (_Loader, Dumper):
        _each.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | str:
    """Never octal. Thousands of digits stay the text that they are, which no key takes for a number."""
    return int(node.value) if len(node.value) < 1000 else node.value


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


@dataclass
class Source:
    """The data of a config, and how it was written.

    Attributes:
        name: the file, for messages.
        root, text: of the file; none for a config that was made in Python.
        given: path of each override → as it was typed.
        above: of a stage of `rounds`, where in the file its keys stand: ("rounds", NAME).
    """

    name: str
    data: dict[str, Any]
    root: yaml.Node | None = None
    text: str = ""
    given: dict[tuple[str, ...], str] = field(default_factory=dict)
    above: tuple[str, ...] = ()

    def place(self, path: Sequence[str | int]) -> str:
        """`my.yaml:12, key train.steps`; the line is that of the nearest key that is there."""
        key, _ = self._find(path)
        line = f":{key.start_mark.line + 1}" if key is not None else ""
        where = "command line" if self._override_of(path) else f"{self.name}{line}"
        name = ".".join(map(str, (*self.above, *self._by_name(path))))
        return f"{where}, key {name if len(name) < 100 else name[:99] + '…'}" if name else where

    def _by_name(self, path: Sequence[str | int]) -> Sequence[str | int]:
        """With the name of a stage of `rounds` in the place of its number, as an override would say it."""
        if len(path) < 3 or path[0] != "rounds" or not isinstance(path[1], int):
            return path
        name = self.data["rounds"][path[1]].get("name")
        return (path[0], name, *path[2:]) if isinstance(name, str) and path[2] != "name" else path

    def written(self, path: Sequence[str | int], value: Any) -> str:
        """A value as the user wrote it, but for keys and passwords."""
        last = str(path[-1]) if path else ""
        if is_secret(last, value):
            return "***"
        shown = redacted(value, "url" if last == "url" else "")
        if shown != value:
            return in_yaml(shown)
        _, node = self._find(path)
        typed = self._override_of(path)
        if typed == tuple(path):
            text = self.given[typed]
        elif isinstance(node, yaml.ScalarNode) and not typed:
            text = self.text[node.start_mark.index : node.end_mark.index]
        else:
            text = in_yaml(value)
        return text.strip() or "nothing"

    def override(self, item: str) -> None:
        """Put `key=value` into the data. Raises ConfigError."""
        key, equals, text = item.partition("=")
        parts = tuple(key.split("."))
        if not equals or not all(parts):
            raise ConfigError(
                "this is not an override",
                where="command line",
                value=item,
                rule="key=value without spaces, as train.steps=5",
                remedy=f"write {item}=…"
                if all(parts) and not equals
                else "write the key's parts with single dots between",
            )
        node: Any = self.data
        parents = parts[:-1]
        if parents[:1] == ("rounds",) and len(parents) > 1 and isinstance(node.get("rounds"), list):
            node, parents = self._stage(parents[1], item), parents[2:]
        for parent in parents:
            if isinstance(node.get(parent), str):  # `scorer: judge` is short for `scorer: {name: judge}`
                node[parent] = {"name": node[parent]}
            if isinstance(node.get(parent), list):
                raise ConfigError(
                    "one part of a list cannot be overridden",
                    where=f"command line, key {key}",
                    value=item,
                    rule=f"{parent} is a list, and a list is given whole",
                    remedy=f"write all of it: {parent}='[…]'",
                )
            below = node.get(parent)
            node[parent] = dict(below) if isinstance(below, dict) else {}  # a copy: an alias may share it
            node = node[parent]
        node[parts[-1]] = _value(key, text)
        self.given[parts] = text

    def _stage(self, name: str, item: str) -> dict[str, Any]:
        """A copy of the stage of this name, in its place. Raises ConfigError."""
        stages = [dict(each) if isinstance(each, dict) else each for each in self.data["rounds"]]
        found = {each.get("name"): each for each in stages if isinstance(each, dict)}
        if name not in found:
            raise ConfigError(
                f"no stage is called {name}",
                where=f"command line, key rounds.{name}",
                value=item,
                rule="rounds.NAME.KEY=VALUE with the name of a stage",
                remedy=did_you_mean(name, map(str, found)),
            )
        self.data["rounds"] = stages
        return found[name]

    def _override_of(self, path: Sequence[str | int]) -> tuple[str, ...] | None:
        """The last override of this key, or of one that holds it."""
        return next((k for k in reversed(self.given) if tuple(path[: len(k)]) == k), None)

    def _find(self, path: Sequence[str | int]) -> tuple[yaml.Node | None, yaml.Node | None]:
        """The key's node, or that of the nearest one above it; and the value's, when it is there."""
        key, node = None, self.root
        for part in path:
            if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                key = node = node.value[part]
                continue
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            found = next((pair for pair in pairs if pair[0].value == str(part)), None)
            if found is None:
                return key, None
            key, node = found
        return key, node


def in_yaml(value: Any) -> str:
    """A value on one line, as a config would hold it."""
    try:
        text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1e9)
    except yaml.YAMLError:  # not plain data
        return repr(value)
    return text.removesuffix("\n").removesuffix("\n...")


def read(path: Path) -> Source:
    """The mapping that a YAML file holds. Raises ConfigError."""
    text = _text(path)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        for problem in _problems(root, str(path), ()):
            raise problem
        data = loader.construct_document(root) if root is not None else None
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error, text, path) from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            "this is not YAML",
            where=f"{path}:{text.count(chr(10), 0, error.position) + 1}",
            value=f"the character U+{error.character:04X}",
            rule="text without control characters",
            remedy="take this character out",
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(
            "this config is empty" if data is None else "this config is not a mapping",
            where=str(path),
            value="nothing" if data is None else in_yaml(data),
            rule="sections with keys and values, such as `train: {steps: 100}`",
            remedy="begin with a copy of one of the files in configs/",
        )
    return Source(str(path), data, root, text)


def _text(path: Path) -> str:
    if path.is_dir():
        inside = sorted(each.name for each in path.glob("*.yaml"))
        raise ConfigError(
            "this is a folder",
            where=str(path),
            value=f"a folder with {', '.join(inside)}" if inside else "a folder without a .yaml file",
            rule="one YAML file",
            remedy=f"name a file in it: {path / inside[0]}" if inside else "name a file, such as one of configs/",
        )
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.yaml")], n=1)
        remedy = f"did you mean {path.parent / near[0]}?" if near else "name a file, such as one of configs/"
        raise ConfigError(
            "there is no such config file",
            where=str(path),
            value="no file",
            rule="a YAML file first, then overrides",
            remedy=f"put the config file before {path}" if "=" in path.name else remedy,
        )
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            "this is not text in UTF-8",
            where=f"{path}:{line}",
            value=f"byte 0x{raw[error.start]:02x}",
            rule="a YAML file, in UTF-8",
            remedy="save it as UTF-8 in your editor; or is this another kind of file?",
        ) from None
    except OSError as error:
        raise ConfigError(
            "this file cannot be read",
            where=str(path),
            value=error.strerror or str(error),
            rule="a file that you may read",
            remedy="look at its permissions with ls -l",
        ) from None


def _problems(
    node: yaml.Node | None, name: str, above: tuple[int, ...], seen: set[int] | None = None
) -> Iterator[ConfigError]:
    """What PyYAML takes without a word: a key that stands twice (the last would win), an alias of itself."""
    seen = set() if seen is None else seen
    if id(node) in above:
        yield ConfigError(
            "this alias holds itself",
            where=f"{name}:{node.start_mark.line + 1}",  # type: ignore[union-attr]
            value="a section that is part of itself",
            rule="an alias (*name) stands for a section that has ended",
            remedy="take the alias out of the section that it names",
        )
    if node is None or id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            word, line = str(key.value), key.start_mark.line + 1
            if word in lines and word != "<<":
                yield ConfigError(
                    "this key stands twice",
                    where=f"{name}:{line}, key {word}",
                    value=f"{word} on line {lines[word]} and on line {line}",
                    rule="each key once in a section",
                    remedy="keep one, or put what is under both under one",
                )
            lines[word] = line
    for child in node.value:
        for each in child if isinstance(child, tuple) else (child,):
            yield from _problems(each, name, (*above, id(node)), seen)


def _not_yaml(error: yaml.MarkedYAMLError, text: str, path: Path) -> ConfigError:
    """At the place where PyYAML noticed; at the end of the file, where that began which has no end."""
    lines = re.split("\r\n|[\r\n\x85\u2028\u2029]", text)  # what YAML counts as lines
    problem, mark, began = error.problem or "", error.problem_mark, error.context_mark
    if began and (mark is None or not "".join(lines[mark.line :]).strip()):
        mark = began
    since = f" {error.context} that began on line {began.line + 1}" if began and began.line < mark.line else ""
    return ConfigError(
        "this is not YAML",
        where=f"{path}:{mark.line + 1}",
        value=lines[mark.line].strip() or "an empty line",
        rule=f"YAML; its reader says: {problem}{since}",
        remedy=next((remedy for words, remedy in REMEDIES if words in problem), "look at this line and the one before"),
    )


def _value(key: str, text: str) -> Any:
    """What an override says. Text that is not YAML is a text, unless it begins as a list or a mapping."""
    try:
        return yaml.load(text, _Loader) if text else None  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        if not text.startswith(("[", "{")):
            return text
        raise ConfigError(
            "this value is not YAML",
            where=f"command line, key {key}",
            value=text,
            rule=f"YAML; its reader says: {getattr(error, 'problem', error)}",
            remedy="close what is open, and put the whole override into single quotes for the shell",
        ) from None

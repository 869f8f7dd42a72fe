"""`rounds:` in a config: stages in a row, each a config of its own, all of them checked before the first starts.

    model: {path: /models/base}                # what all stages share
    rounds:
    - {name: answers, algorithm: {name: label, samples: 8}, data: {prompts: p.jsonl}, scorer: …}
    - {name: sft, algorithm: sft, data: {examples: "stage:answers"}}
    - {name: dpo, algorithm: preference, data: {examples: "stage:answers"}}
    repeat: 2

A stage says what differs from the keys that all share. It starts from the last stage that trained a policy, unless
it names a model.path of its own, which may be "stage:NAME". In a later repetition "stage:NAME" is the newest one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from rayalign.config.explain import explain
from rayalign.config.references import check_order, check_references, renamed, texts
from rayalign.config.rounds import STAGE, Rounds, Stage
from rayalign.config.source import Source, in_yaml
from rayalign.errors import ConfigError
from rayalign.registry import Tagged
from rayalign.schema import ROUNDS_KEYS, Config

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
OF_THE_WHOLE = (*ROUNDS_KEYS, "run_dir", "resume")  # keys that no stage has
USUAL = {
    name: tag.usual
    for name, each in Config.model_fields.items()
    for tag in each.metadata
    if isinstance(tag, Tagged) and tag.usual
}


def parse_rounds(source: Source) -> Rounds:
    """All stages of a config with `rounds`. Raises ConfigError at the first that cannot be."""
    repeat = source.data.get("repeat", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
        raise ConfigError(
            "this value cannot be used",
            where=source.place(("repeat",)),
            value=source.written(("repeat",), repeat),
            rule="a whole number, at least 1 (how often the stages run, one after the other)",
            remedy="write repeat: 2, say",
        )
    names = _names(source)
    _check_folders(source, names, repeat)
    check_order(source, names)
    _check_overrides(source, names)
    stages: list[Stage] = []
    for round_ in range(1, repeat + 1):
        for place in range(len(names)):
            stages.append(_stage(source, names, place, round_, stages))
    whole = {key: source.data.get(key) for key in ("run_dir", "resume")}
    checked = validated(Source(source.name, {**stages[0].config.to_dict(), **_given(whole)}, source.root, source.text))
    return Rounds(tuple(stages), source.data, repeat, checked.run_dir, checked.resume)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _names(source: Source) -> list[str]:
    """Of all stages, each of which is a mapping with a name of its own."""
    rounds = source.data["rounds"]
    if not isinstance(rounds, list) or not rounds:
        raise ConfigError(
            "there is no stage" if not rounds else "these are no stages",
            where=source.place(("rounds",)),
            value=source.written(("rounds",), rounds),
            rule="a list of stages, each with a name and the keys that differ",
            remedy="write - {name: sft, algorithm: sft, data: {examples: my_answers.jsonl}}, say",
        )
    names: list[str] = []
    for place, stage in enumerate(rounds):
        at = ("rounds", place)
        name = stage.get("name") if isinstance(stage, dict) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(
                "this stage has no name" if name is None else "this is no name of a stage",
                where=source.place(at if name is None else (*at, "name")),
                value=in_yaml(stage if name is None else name),
                rule="a name of letters, digits, _, - and ., which its folder is called by",
                remedy="write name: sft, say",
            )
        if name in names:
            raise ConfigError(
                "two stages have this name",
                where=source.place((*at, "name")),
                value=name,
                rule=f"names that differ; the stage at place {names.index(name) + 1} is called {name} already",
                remedy=f"call one of them {name}_again, say",
            )
        if wrong := next((key for key in OF_THE_WHOLE if key in stage), None):
            raise ConfigError(
                f"{wrong} is none of a stage's keys",
                where=source.place((*at, wrong)),
                value=in_yaml(stage[wrong]),
                rule=f"{', '.join(OF_THE_WHOLE)} belong to the whole, beside rounds",
                remedy=f"take {wrong} out of the stage {name}, or put it beside rounds",
            )
        names.append(name)
    return names


def _stage(source: Source, names: Sequence[str], place: int, round_: int, before: Sequence[Stage]) -> Stage:
    """The stage at this place of this repetition, checked. Raises ConfigError."""
    name = names[place]
    shared, own = _shared(source), _own(source, place)
    data, root = _merged(shared, own, source.root, _node_of(source, place))
    policy = next((s for s in reversed(before) if s.config.learns and s.config.algorithm.network == "causal"), None)
    model = own.get("model") or {}
    if policy is not None and isinstance(model, Mapping) and "path" not in model:
        data["model"] = {**(data.get("model") or {}), "path": f"{STAGE}{policy.name}"}
    newest = {stage.name: stage.folder for stage in before}
    named = [(key, text.removeprefix(STAGE)) for key, text in texts(data) if text.startswith(STAGE)]
    references = {".".join(map(str, key)): newest[wanted] for key, wanted in named}
    given = {key[2:]: text for key, text in source.given.items() if key[:2] == ("rounds", name)}
    given |= {key: text for key, text in source.given.items() if _reaches(key, own, data)}
    inner = Source(
        source.name,
        renamed(data, lambda key, name: f"{STAGE}{newest[name]}"),
        root,
        source.text,
        given,
        above=("rounds", name),
    )
    config = validated(inner)
    check_references(inner, config, references, before)
    return Stage(
        name,
        _folder(name, round_),
        config.model_copy(update={"seed": (config.seed + round_ - 1) % 2**31}),  # other samples in each repetition
        references,
    )


def validated(source: Source) -> Config:
    """One config. Raises ConfigError."""
    try:
        return Config.model_validate(source.data)
    except ValidationError as error:
        raise explain(error, source) from None


def _shared(source: Source) -> dict[str, Any]:
    return {key: value for key, value in source.data.items() if key not in OF_THE_WHOLE}


def _own(source: Source, place: int) -> dict[str, Any]:
    own = {key: value for key, value in source.data["rounds"][place].items() if key != "name"}
    if isinstance(own.get("model"), str):  # short for a path
        own["model"] = {"path": own["model"]}
    return own


def _folder(name: str, round_: int) -> str:
    """The first repetition is called as one that is not repeated, so that `repeat` can be raised afterwards."""
    return name if round_ == 1 else f"{name}-{round_}"


def _check_folders(source: Source, names: Sequence[str], repeat: int) -> None:
    """Whether no repetition's folder is another stage's. Raises ConfigError."""
    seen: dict[str, str] = {}
    for folder, name in ((_folder(name, round_), name) for name in names for round_ in range(1, repeat + 1)):
        if folder in seen:
            raise ConfigError(
                "two stages would have the same folder",
                where=source.place(("rounds",)),
                value=folder,
                rule=f"folders that differ: this is {seen[folder]} and {name}, as NAME-2 is the second NAME",
                remedy=f"call {max(seen[folder], name, key=len)} otherwise",
            )
        seen[folder] = name


def _check_overrides(source: Source, names: Sequence[str]) -> None:
    """An override of what all stages share does something in one of them at least. Raises ConfigError."""
    owns = [_own(source, place) for place in range(len(names))]
    whole = [_merged(_shared(source), own, None, None)[0] for own in owns]
    for key, text in source.given.items():
        if key[0] in OF_THE_WHOLE or any(_reaches(key, *each) for each in zip(owns, whole, strict=True)):
            continue
        raise ConfigError(
            "each stage says this itself",
            where=f"command line, key {'.'.join(key)}",
            value=f"{'.'.join(key)}={text}",
            rule="a key that all stages share, or rounds.NAME.KEY of one",
            remedy=f"write rounds.{names[0]}.{'.'.join(key)}={text}, say",
        )


def _reaches(key: Sequence[str], own: Mapping[str, Any], merged: Mapping[str, Any]) -> bool:
    """Whether an override of what all stages share is what a stage has."""
    return key[0] not in OF_THE_WHOLE and not _has(own, key) and _has(merged, key)


def _has(data: Any, key: Sequence[str]) -> bool:
    for part in key:
        if not isinstance(data, Mapping) or part not in data:
            return False
        data = data[part]
    return True


def _node_of(source: Source, place: int) -> yaml.Node | None:
    """Of a stage in the file; None for a config that was made in Python."""
    pairs = source.root.value if isinstance(source.root, yaml.MappingNode) else ()
    rounds = next((value for key, value in pairs if key.value == "rounds"), None)
    there = isinstance(rounds, yaml.SequenceNode) and place < len(rounds.value)
    return rounds.value[place] if there else None  # type: ignore[union-attr]


def _merged(
    base: Any, own: Any, base_node: yaml.Node | None, own_node: yaml.Node | None, key: str = ""
) -> tuple[Any, yaml.Node | None]:
    """What a stage says, over what all share, key by key; a part of another name replaces the whole part. The same of
    the nodes, so that messages name the line on which a key stands."""
    if isinstance(base, str) and isinstance(own, Mapping) and "name" not in own:
        base = {"name": base}
    if not isinstance(base, Mapping) or not isinstance(own, Mapping):
        return own, own_node
    if "name" in own and own["name"] != base.get("name", USUAL.get(key)):
        return own, own_node
    nodes = {name: pair for node in (base_node, own_node) for name, pair in _pairs(node).items()}
    data = dict(base)
    for name, value in own.items():
        below = [_pairs(node).get(name, (None, None))[1] for node in (base_node, own_node)]
        data[name], node = _merged(base.get(name), value, *below, key=name if not key else "-")
        if name in nodes and node is not None:
            nodes[name] = (nodes[name][0], node)
    like = own_node or base_node
    root = yaml.MappingNode(like.tag, list(nodes.values()), like.start_mark, like.end_mark) if like else None
    return data, root


def _pairs(node: yaml.Node | None) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    return {key.value: (key, value) for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}

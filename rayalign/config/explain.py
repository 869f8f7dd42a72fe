"""What pydantic found → one ConfigError that a person can act on: place, value, rule, remedy.

Rules are read off the JSON schema, so that a message and an editor say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo

from rayalign.config.habits import habit, libraries
from rayalign.config.source import Source, in_yaml
from rayalign.config.words import choices_of, example_of, rule_of
from rayalign.errors import ConfigError
from rayalign.record import Unfit
from rayalign.registry import Tagged, did_you_mean
from rayalign.schema import Config, record_schema

Path = tuple[str | int, ...]


def explain(error: ValidationError, source: Source) -> ConfigError:
    """The first problem in full, and where the others are. Unknown keys come first, those of other libraries before
    the rest: a key that is spelt wrong, or brought from elsewhere, is often the one that is missing."""
    problems = [{**each, "loc": _as_written(each, source)} for each in error.errors(include_url=False)]
    words = [str(each["loc"][-1]) for each in problems if _kind(each) == "unknown"]
    problem, *others = sorted(problems, key=_rank)
    path: Path = problem["loc"]
    also = _also([each for each in others if each["loc"] != path])
    if _kind(problem) == "unknown":
        return _unknown(path, problem["input"], source, libraries(str(path[-1]), words), also)
    if _kind(problem) == "missing":
        return _missing(path, problem["input"], source, also)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, Unfit):
        return _unfit(cause, path, problem["input"], source, also)
    return _wrong(path, problem, source, also)


def _as_written(problem: Mapping[str, Any], source: Source) -> Path:
    """The path of the key: without the place in a list that the user did not write as one, and without the kinds of
    values that a key may have."""
    path: Path = ()
    value: Any = source.data
    for part in problem["loc"]:
        there = part in value if isinstance(value, Mapping) else isinstance(value, list | tuple)
        if isinstance(part, int) and not there:
            continue
        known = there or isinstance(part, int) or part in _names(_owner((*path, part), source.data))
        if path and not known and _kind(problem) == "wrong":
            break
        path = (*path, part)
        if isinstance(value, Mapping):
            value = value.get(part)
        elif there:
            value = value[part] if part < len(value) else None
    return path


def _rank(problem: Mapping[str, Any]) -> int:
    if _kind(problem) != "unknown":
        return 2
    return 0 if libraries(str(problem["loc"][-1])) else 1


def _kind(problem: Mapping[str, Any]) -> str:
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return "unknown"
    return "missing" if problem["type"] == "missing" and isinstance(problem["loc"][-1], str) else "wrong"


def _also(problems: Sequence[Mapping[str, Any]]) -> str:
    """Where else something is, by kind: ' (also unknown: train.stepz; missing: model, data)'."""
    paths: dict[str, list[str]] = {"unknown": [], "missing": [], "wrong": []}
    for each in problems:
        paths[_kind(each)].append(".".join(map(str, each["loc"])))
    parts = []
    for kind, found in paths.items():
        named = len(found) if kind == "missing" or len(found) <= 3 else 1  # what is missing has to be added, all of it
        more = f" and {len(found) - named} more" if len(found) > named else ""
        parts += [f"{kind}: {', '.join(found[:named])}{more}"] if found else []
    return f" (also {'; '.join(parts)})" if parts else ""


def _unknown(path: Path, value: Any, source: Source, owners: Sequence[str], also: str) -> ConfigError:
    record, section, word = _owner(path, source.data), ".".join(map(str, path[:-1])), str(path[-1])
    owners = () if _parts_with(path, source) else owners  # a key of ours, of another part
    what = f"looks like a key of {' or '.join(owners)}, unknown here" if owners else "unknown key"
    found = f"{word}: {source.written(path, value)}"
    rule = f"{section or 'a config'} has the keys {', '.join(_names(record))}"
    remedy = _right_key(path, record, source, of_others=bool(owners))
    return ConfigError(f"{what}{also}", where=source.place(path), value=found, rule=rule, remedy=remedy)


def _right_key(path: Path, record: type[BaseModel], source: Source, *, of_others: bool) -> str:
    """Which key was meant: another library's, the same elsewhere, one of another part, or one spelt alike."""
    word = str(path[-1])
    algorithm = _owner(("algorithm", ""), source.data)
    offline, gradients = bool(getattr(algorithm, "rows", ())), bool(getattr(algorithm, "whole_distribution", False))
    if ours := habit(word, offline=offline, gradients=gradients):
        purpose = _schema_of(tuple(ours.split(".")), source).get("description", "")
        return f"here this is {ours}" + (f": {purpose}" if purpose else "")
    if of_others:
        return "README.md has the keys side by side, under Coming from TRL, OpenRLHF or verl"
    everywhere = list(_keys(Config, source.data))
    if word in everywhere:
        return f"write it nested, one level a dot: {word.replace('.', ': {')}: …{'}' * word.count('.')}"
    same = [key for key in everywhere if key.rpartition(".")[2] == word and word != "name"]
    inside = [key for key in same if path[:-1] and key.startswith(".".join(map(str, (*path[:-1], ""))))]
    parts = _parts_with(path, source)
    if parts and not inside:
        return f"it is a key of {parts}"
    if same := inside or same:
        return f"it belongs elsewhere: {' or '.join(same[:3])}"
    here = did_you_mean(word, _names(record))
    if here.startswith("did"):
        return here
    elsewhere = did_you_mean(word, [key.rpartition(".")[2] for key in everywhere])
    near = elsewhere.removeprefix("did you mean ").removesuffix("?")
    whole = next((key for key in everywhere if key.rpartition(".")[2] == near), None)
    return f"did you mean {whole}?" if whole else here


def _parts_with(path: Path, source: Source) -> str:
    """'engine: vllm; …' where only that kind of engine has the key; 'loss: dpo or hinge; …' where several have."""
    field, _ = _below_key(path[:-1], source.data)
    tag = _tag(field.metadata) if field else None
    if tag is None:
        return ""
    names = [name for name in sorted(tag.table) if path[-1] in _names(tag.select(name))]
    if len(names) < 2:
        return f"{tag.kind}: {names[0]}; take it out, or use that" if names else ""
    return f"{tag.kind}: {', '.join(names[:-1])} or {names[-1]}; take it out, or use one of these"


def _missing(path: Path, section: Any, source: Source, also: str) -> ConfigError:
    key, node = str(path[-1]), _schema_of(path, source)
    example = example_of(node)
    above = ".".join(map(str, path[:-1]))
    return ConfigError(
        f"this key is missing{also}",
        where=source.place(path),
        value=_only(section),
        rule=f"{rule_of(node)}; it has no default",
        remedy=f"add {key}: {example or '…'}" + (f" under {above}" if above else "") + (", say" if example else ""),
    )


def _only(section: Any) -> str:
    """What stands where a key is missing."""
    there = ", ".join(map(str, section)) if isinstance(section, Mapping) else in_yaml(section)
    return f"only {there}" if there else "nothing"


def _unfit(cause: Unfit, path: Path, value: Any, source: Source, also: str) -> ConfigError:
    """Of a record, or of the key that the cause names, dotted where it is one of a record below."""
    written = ""
    for part in cause.key.split(".") if cause.key and isinstance(value, Mapping) else ():
        field = _names(_owner((*path, part), source.data)).get(part)
        path, section, value = (*path, part), value, _get(value, part, field)
        there = isinstance(section, Mapping) and part in section
        written = "" if there or value not in (None, ()) else _only(section)
    return ConfigError(
        f"{cause.what}{also}",
        where=source.place(path),
        value=written or source.written(path, value),
        rule=cause.rule,
        remedy=cause.remedy,
    )


def _wrong(path: Path, problem: Mapping[str, Any], source: Source, also: str) -> ConfigError:
    node, value, kind = _schema_of(path, source), problem["input"], problem["type"]
    top = path
    while top and not isinstance(top[-1], str):  # an element of a list: what is written is the whole list
        top = top[:-1]
    key, whole = str(top[-1]) if top else "", _schema_of(top, source)
    written = source.written(path, value)
    empty_section = value is None and kind in ("model_type", "model_attributes_type")
    what = "this section is empty" if empty_section else "this value cannot be used"
    rule = rule_of(node) or problem["msg"]
    if kind == "value_error" and not isinstance(value, bool):  # of a validator that says no more than this
        rule = str(problem["ctx"]["error"])
    if empty_section:
        keys = ", ".join(_names(_owner((*path, ""), source.data)))
        remedy = f"put keys under {key}: ({keys}), or take the line out, for the defaults"
    elif kind == "string_type" and not isinstance(value, Mapping | list | None):
        remedy = f'put quotes around it: {key}: "{written}"'
    elif listed := _as_list(node, value, written):
        remedy = f"write {key}: {listed}"
    elif kind == "too_short":
        remedy = f"put into {key} what belongs there"
    elif len(choices := choices_of(node)) > 1:
        remedy = did_you_mean(str(value), [str(choice) for choice in choices])
    else:
        example = example_of(whole)
        default = ", the default" if "default" in whole and example == in_yaml(whole["default"]) else ""
        remedy = f"write {key}: {example}{default or ', say'}" if example else f"change it, or take {key} out"
    return ConfigError(f"{what}{also}", where=source.place(path), value=written, rule=rule, remedy=remedy)


def _as_list(node: Mapping[str, Any], value: Any, written: str) -> str:
    """Where a list belongs, the one value that was given, in brackets; "" where that would not do either."""
    lists = [each for each in node.get("anyOf", [node]) if each.get("type") == "array" and "items" in each]
    alone = any("$ref" in each for each in node.get("anyOf", ()))  # one of them is taken without brackets, too
    if not lists or alone or value in (None, "") or isinstance(value, Sequence) and not isinstance(value, str):
        return ""
    if lists[0]["items"].get("type") != "string" or isinstance(value, str):
        return f"[{written}]"
    return "" if isinstance(value, Mapping) else f'["{written}"]'


def _schema_of(path: Path, source: Source) -> Mapping[str, Any]:
    """The JSON schema of a key, as far as one can be made."""
    names = [i for i, part in enumerate(path) if isinstance(part, str)]
    if not names:
        return {}
    last = names[-1]
    try:
        node = record_schema(_owner(path[: last + 1], source.data))["properties"][path[last]]
    except (PydanticInvalidForJsonSchema, KeyError):
        return {}
    for index in path[last + 1 :]:
        items = node.get("prefixItems", ())
        node = items[index] if isinstance(index, int) and index < len(items) else node.get("items", {})
    return node


def _names(record: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in record.model_fields.items()}


def _owner(path: Path, data: Any) -> type[BaseModel]:
    """The record that the last key of the path belongs to: Config, or one that the data selects below it."""
    return _below_key(path[:-1], data)[1]


def _below_key(path: Path, data: Any) -> tuple[FieldInfo | None, type[BaseModel]]:
    """The field at the end of the path, and the record that it holds, or else the one that holds it."""
    field: FieldInfo | None = None
    record: type[BaseModel] = Config
    value = data
    for part in path:
        if isinstance(part, str):
            field = _names(record).get(part)
            value = _get(value, part, field)
        else:
            value = value[part] if isinstance(value, list | tuple) and part < len(value) else None
        if field is not None:
            record = _below(field.annotation, field.metadata, value) or record
    return field, record


def _keys(record: type[BaseModel], data: Any, prefix: str = "") -> Iterator[str]:
    """Every key that a config with these names in it can hold, dotted."""
    for key, field in _names(record).items():
        value = _get(data, key, field)
        yield f"{prefix}{key}"
        below = _below(field.annotation, field.metadata, value)
        named = get_origin(field.annotation) is Mapping  # what stands below has names of the user's
        if below is not None and not named:
            yield from _keys(below, value, f"{prefix}{key}.")


def _get(data: Any, key: str, field: FieldInfo | None) -> Any:
    if isinstance(data, Mapping) and key in data:
        return data[key]
    return field.default if field else None


def _below(annotation: Any, metadata: Sequence[Any], value: Any) -> type[BaseModel] | None:
    """The record that an annotation stands for; where a name selects it, the one that the value selects."""
    tag = _tag(metadata)
    if tag is not None:
        if isinstance(value, BaseModel):  # a default
            return type(value)
        try:
            return tag.select(value)
        except Unfit:
            return None
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _below(inner, more, value)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_below(each, (), value) for each in get_args(annotation))
    return next((each for each in found if each is not None), None)


def _tag(metadata: Sequence[Any]) -> Tagged | None:
    return next((each for each in metadata if isinstance(each, Tagged)), None)

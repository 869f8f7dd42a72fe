"""Which column of a data set is what, read off the names; where two readings are possible, none is guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayalign.errors import DataError
from rayalign.registry import did_you_mean

# What a column is → names that say so, the usual one first.
NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query"),
    "completion": ("completion", "response", "answer", "output"),
    "messages": ("messages", "conversation", "conversations"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "real": ("real",),
    "generated": ("generated",),
    "label": ("label",),
    "completions": ("completions", "responses", "answers"),
    "ranks": ("ranks",),
    "scores": ("scores",),
    "choice": ("choice",),
    "votes": ("votes",),
    "ratings": ("ratings", "rating"),
    "agreement": ("agreement", "share"),
    "probability": ("probability",),
    "margin": ("margin",),
    "images": ("images", "image"),
}
# A column beside these, in the words of engines: for each answer of a row "stop", or "length" where it was cut.
REASONS = "finish_reasons"
TRUST = "trust"  # another: for each answer from 0 to 1, how much is learned from it


@dataclass(frozen=True)
class Form:
    """One way to write a kind of rows: the columns that it needs, and those that it may have."""

    kind: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ("prompt", "images")

    def __str__(self) -> str:
        return "/".join((("prompt",) if "prompt" in self.may and "messages" not in self.needs else ()) + self.needs)


_PAIR = ("prompt", "votes", "probability", "margin", "images")
FORMS = (
    Form("pair", ("chosen", "rejected"), _PAIR),
    Form("pair", ("real", "generated"), _PAIR),
    Form("ranked", ("completions", "ranks")),
    Form("ranked", ("completions", "scores")),
    Form("ranked", ("completions", "choice")),
    Form("ranked", ("completions", "votes")),
    Form("label", ("completion", "label")),
    Form("votes", ("completion", "votes")),
    Form("votes", ("completion", "ratings")),
    Form("votes", ("completion", "agreement")),
    Form("answers", ("completions",)),
    Form("completion", ("completion",)),
    Form("completion", ("messages",), ("images",)),
)


@dataclass(frozen=True)
class Reading:
    """A form, and what its columns are called: "chosen" → "good_answer"."""

    form: Form
    columns: Mapping[str, str]


def texts_of(given: Mapping[str, str]) -> list[str]:
    """Names of columns that hold texts, whatever they look like: in a .csv file an answer may be a number."""
    roles = ("prompt", "completion", "chosen", "rejected", "real", "generated")
    return sorted({name for role in roles for name in (*NAMES[role], given.get(role, role))})


def read_columns(found: Sequence[str], given: Mapping[str, str], kinds: Sequence[str], where: str) -> Reading:
    """The one reading of these columns that is of one of the kinds.

    Args:
        given: data.examples' `columns`: what → name.

    Raises:
        DataError: none, or more than one.
    """
    _check_given(found, given, where)
    names = _named(found, given)
    forms = _possible({role for role, here in names.items() if here}, given, kinds)
    wanted = [form for form in forms if form.kind in kinds]
    if len(wanted) > 1:
        raise _ambiguous(found, wanted, names, where)
    if not wanted:
        raise _unfit(found, forms, kinds, names, where)
    form = wanted[0]
    columns = {}
    for role in (*form.needs, *form.may):
        here = names.get(role, [])
        if len(here) > 1:
            raise _two_names(found, role, here, where)
        if here:
            columns[role] = here[0]
    if "prompt" not in columns and form.kind != "pair" and form.needs != ("messages",):
        raise _unfit(found, [], kinds, names, where)
    if {"votes", "probability"} <= columns.keys() and form.kind == "pair":
        given_so = {"votes", "probability"} & given.keys()
        if len(given_so) != 1:
            raise _two_names(found, "probability", [columns["votes"], columns["probability"]], where)
        columns.pop(({"votes", "probability"} - given_so).pop())
    return Reading(form, columns)


def _named(found: Sequence[str], given: Mapping[str, str]) -> dict[str, list[str]]:
    """What → the columns that may be it. A usual name wins over its synonyms; a column that is given has one use."""
    taken = set(given.values())
    names = {}
    for role, known in NAMES.items():
        if role in given:
            names[role] = [given[role]]
            continue
        here = [name for name in known if name in found and name not in taken]
        names[role] = here[:1] if here[:1] == [known[0]] else here
    return names


def _possible(there: set[str], given: Mapping[str, str], kinds: Sequence[str]) -> list[Form]:
    forms = [form for form in FORMS if set(form.needs) <= there]
    forms = [form for form in forms if given.keys() <= {*form.needs, *form.may}]
    settled = [form for form in forms if set(form.needs) <= given.keys()]
    if settled:
        most = max(len(form.needs) for form in settled)
        return [form for form in settled if len(form.needs) == most]
    # A rating beside an answer is common: it stands in nobody's way who does not learn from votes.
    larger = [form for form in forms if form.kind != "votes" or "votes" in kinds]
    return [form for form in forms if not any(set(form.needs) < set(other.needs) for other in larger)]


def _check_given(found: Sequence[str], given: Mapping[str, str], where: str) -> None:
    for role, name in given.items():
        if role not in NAMES:
            raise DataError(
                f"columns names {role!r}, which is nothing that a row has",
                where=where,
                value=f"columns: {{{role}: {name}}}",
                rule=f"what a column is → its name; known are {', '.join(NAMES)}",
                remedy=did_you_mean(role, NAMES),
            )
        if name not in found:
            raise DataError(
                f"there is no column {name!r}",
                where=where,
                value=f"columns {', '.join(found)}",
                rule=f"columns: {{{role}: {name}}} names a column of this data",
                remedy=did_you_mean(name, found),
            )


def _ambiguous(found: Sequence[str], forms: Sequence[Form], names: Mapping[str, list[str]], where: str) -> DataError:
    settle = " or ".join(f"{{{', '.join(f'{role}: {names[role][0]}' for role in form.needs)}}}" for form in forms[:3])
    return DataError(
        "these columns can be read in more than one way",
        where=where,
        value=f"columns {', '.join(found)}",
        rule=f"one of: {', or '.join(map(str, forms))}",
        remedy=f"set columns: {settle}",
    )


def _in_words(forms: Sequence[Form]) -> str:
    """'prompt/chosen/rejected, or prompt/completions/(ranks, votes)': forms that differ in the last column as one."""
    alike: dict[str, list[str]] = {}
    for form in forms:
        *first, last = str(form).split("/")
        alike.setdefault("/".join(first), []).append(last)
    return ", or ".join(
        f"{first}/{lasts[0] if len(lasts) == 1 else '(' + ', '.join(lasts) + ')'}" if first else lasts[0]
        for first, lasts in alike.items()
    )


def _two_names(found: Sequence[str], role: str, here: Sequence[str], where: str) -> DataError:
    return DataError(
        f"more than one column may be the {role}",
        where=where,
        value=f"columns {', '.join(found)}",
        rule=f"one {role}, but there are {' and '.join(here)}",
        remedy="set columns: " + " or ".join(f"{{{role}: {name}}}" for name in here)
        if role != "probability"
        else f"set columns: {{votes: {here[0]}}} or {{probability: {here[1]}}}",
    )


def _unfit(
    found: Sequence[str], forms: Sequence[Form], kinds: Sequence[str], names: Mapping[str, list[str]], where: str
) -> DataError:
    known = [form for form in FORMS if form.kind in kinds]
    rule = f"the algorithm learns from {_in_words(known)}"
    value = f"columns {', '.join(found)}" if found else "no column"
    if forms:
        inner = [form for form in known if set(form.needs) < set(forms[0].needs)]
        remedy = "choose an algorithm that learns from such rows (`rayalign algorithms` lists them)"
        if inner:
            remedy += f", or set columns: {{{', '.join(f'{r}: {r}' for r in inner[0].needs)}}} to leave the rest out"
        return DataError(f"these rows are {forms[0]}", where=where, value=value, rule=rule, remedy=remedy)
    nearest = max(known, key=lambda form: sum(bool(names.get(role)) for role in form.needs))
    needs = nearest.needs if nearest.kind == "pair" or "messages" in nearest.needs else ("prompt", *nearest.needs)
    missing = ", ".join(f"{role}: …" for role in needs if not names.get(role))
    return DataError(
        "the columns of this data make no row to learn from",
        where=where,
        value=value,
        rule=rule,
        remedy=f"say which they are: columns: {{{missing}}}, with the names that they have here",
    )

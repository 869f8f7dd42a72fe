"""A plan as tables on stdout: readable at 80 columns, and in a pipe."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rayalign.config.source import in_yaml
from rayalign.plan.nodes import write_nodes
from rayalign.plan.records import GIB, Bytes, Change, Load, Plan, Problem
from rayalign.record import redacted

WIDTH = 100  # of a pipe
TOP = "(top level)"  # keys of no section
COLUMNS = ("weights", "gradients", "optimizer", "activations", "cache", "other")


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """The config, who runs where, the arithmetic of a step, memory, and what does not fit."""
    out = wide(console)
    sections = (_config, _actors, _step, _memory, _places)
    for section in sections:
        section(plan, out)
        out.print()
    for note in plan.fit.notes:
        _say(out, f"note: {note}")
    _verdict(plan, out)


def wide(console: Console | None = None) -> Console:
    """The given one; else stdout, as wide as a terminal, or as a page in a pipe."""
    out = console or Console(highlight=False)
    if console is None and not out.is_terminal and "COLUMNS" not in os.environ:
        out = Console(highlight=False, width=WIDTH)
    return out


def _config(plan: Plan, out: Console) -> None:
    table = _table("config: what differs from the defaults", "key", "value", "default")
    table.columns[0].no_wrap = True
    for key, (value, default) in plan.differs.items():
        usual = "" if default is None else _short(default, key)
        table.add_row(escape(key), escape(_short(value, key)), escape(usual))
    out.print(table)
    sections: dict[str, list[str]] = {}
    for key, value in plan.defaults.items():
        section, dot, name = key.rpartition(".")
        sections.setdefault(section if dot else TOP, []).append(f"{name}={_short(value, key)}")
    _say(out, "as by default:")
    for section, pairs in sorted(sections.items(), key=lambda each: each[0] != TOP):
        _say(out, f"  {section}: {' '.join(pairs)}", indent=4)


def _actors(plan: Plan, out: Console) -> None:
    """Nodes with the same actors are one line."""
    table = _table(f"actors on nodes ({plan.nodes_from})", "node", "has", "actors")
    rows: dict[tuple[str, str], list[str]] = {}
    for node in plan.nodes:
        here = [place.actor for place in plan.fit.places if place.node == node]
        has = f"{node.cpus} cores" + (f", {node.memory_gib:.0f} GiB" if node.memory_gib else "")
        if node.gpus:
            has = (
                f"{node.gpus}×{node.gpu or 'GPU'}" + (f" ({node.gpu_gib:.0f} GiB)" if node.gpu_gib else "") + f", {has}"
            )
        rows.setdefault((has, _ranges(here)), []).append(node.name)
    for (has, actors), names in rows.items():
        table.add_row(
            escape(", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]}"), has, actors or "none"
        )
    out.print(table)


def _ranges(actors: Sequence[str]) -> str:
    """engine-0, learner-0 … learner-3 → engine-0, learner-0…3"""
    kinds: dict[str, list[int]] = {}
    for actor in actors:
        kind, _, number = actor.rpartition("-")
        kinds.setdefault(kind, []).append(int(number))
    parts = []
    for kind, numbers in kinds.items():
        whole = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
        parts.append(f"{kind}-{numbers[0]}…{numbers[-1]}" if whole else f"{kind}-{','.join(map(str, numbers))}")
    return ", ".join(parts)


def _step(plan: Plan, out: Console) -> None:
    b, micro = plan.fit.batches, plan.fit.micro
    if not b.ranks:
        _labelling(plan, out)
        return
    table = _table("one step, and the run", "what", "")
    for what, numbers in _read(plan) if plan.lengths.rows else _sampled(plan):
        table.add_row(what, numbers)
    table.add_row("examples", f"at most {_n(b.examples)}, of {_count(b.rows, 'sequence')} each")
    table.add_row(
        "a rank's share",
        f"{b.share} of {b.minibatch} on {_count(b.ranks, 'rank')}, "
        f"in {_count(b.micro_batches, 'micro-batch')} of up to {_n(micro.tokens)} tokens",
    )
    run = f"{_n(b.optimizer_steps_in_run)} in {_count(b.steps, 'step')}"
    a_step = f"{_count(b.minibatches, 'minibatch')} × {_count(b.epochs, 'epoch')} = {b.optimizer_steps}"
    table.add_row("optimiser steps", f"{a_step}; {run}")
    table.add_row("tokens a step (estimate)", _tokens(plan))
    of = "training rows" if plan.lengths.rows else "training prompts"
    there = (plan.lengths.rows or plan.lengths).training or 0
    passes = "unknown" if b.passes is None else f"{b.passes:.2f} over {_n(there)} {of}"
    table.add_row(*("passes", passes) if plan.lengths.rows else ("rollouts, passes", f"{_n(b.rollouts)}, {passes}"))
    parts = [f"{_n(b.evaluation_completions)} completions"] if b.evaluation_completions else []
    parts += [f"{_n(b.evaluation_rows)} held-out rows"] if b.evaluation_rows else []
    evaluated = f"{b.evaluations}, of {' and '.join(parts)} each" if b.evaluations else "none"
    table.add_row(*("pushes; evaluations", f"{_n(b.pushes)}; {evaluated}") if b.pushes else ("evaluations", evaluated))
    size = f"{b.checkpoints} × {plan.disk.checkpoint:.2f} GiB, {plan.disk.most:.2f} GiB at most on the disk"
    table.add_row("checkpoints", size)
    out.print(table)


def _labelling(plan: Plan, out: Console) -> None:
    """Of a run that learns nothing: it writes what a scorer says of answers."""
    b, rows = plan.fit.batches, plan.lengths.rows
    table = _table("one shard, and the run", "what", "")
    for what, numbers in _read(plan) if rows else _sampled(plan):
        table.add_row(what, numbers)
    there = (rows or plan.lengths).training
    if there is None:
        table.add_row("shards", "how many is not known")
    else:
        written = plan.differs.get("algorithm.name", ("",))[0] == "generate"
        answers = f"{_n(there * b.samples)} " + ("completions" if written else "answers to be scored")
        table.add_row("shards", f"{_n(b.steps)}, of {_n(there)} {'rows' if rows else 'training prompts'}: {answers}")
    if plan.tokens.sampled:
        table.add_row("tokens a shard", f"{_n(plan.tokens.prompt)} of prompts, up to {_n(plan.tokens.sampled)} sampled")
    out.print(table)


def _sampled(plan: Plan) -> Iterable[tuple[str, str]]:
    b, lengths = plan.fit.batches, plan.lengths
    known = "" if lengths.measured else "up to "
    yield "prompts × samples", f"{b.prompts} × {b.samples} = {_n(b.completions)} completions"
    yield "prompt tokens", f"{known}{lengths.mean:.0f} in the mean, {lengths.longest} at most"


def _read(plan: Plan) -> Iterable[tuple[str, str]]:
    b, rows = plan.fit.batches, plan.lengths.rows
    yield "rows of data", f"{b.prompts}, of {'up to ' if b.samples > 2 else ''}{_count(b.samples, 'answer')} each"
    known = "" if rows.measured else "up to "
    yield "prompt with an answer", f"{known}{rows.mean:.0f} tokens in the mean, {rows.longest} at most"


def _tokens(plan: Plan) -> str:
    tokens = plan.tokens
    parts = [f"{_n(tokens.prompt)} of prompts, up to {_n(tokens.sampled)} sampled"] if tokens.sampled else []
    parts += [f"{_n(tokens.trained)} trained on"]
    parts += [f"{_n(tokens.before)} by the policy before that"] if tokens.before else []
    parts += [f"{_n(tokens.critic)} by the critic"] if tokens.critic else []
    return ", ".join([*parts, f"{_n(tokens.reference)} by the reference"])


def _memory(plan: Plan, out: Console) -> None:
    shape = plan.shape
    scores = "scalar" if shape.labels == 1 else f"{shape.labels}-class"
    kind = scores if shape.network == "score" else "tied" if shape.tied else "untied"
    title = f"memory by role, GiB each ({_n(shape.parameters)} parameters, {kind} head, {shape.architecture})"
    table = _table(title, "role")
    for name in ("weights", "grad.", "optim.", "activ.", "KV", "other", "total"):
        table.add_column(name, justify="right")
    for role in plan.fit.memory:
        label = role.actor if role.role == role.actor else f"{role.actor}: {role.role}"
        label += f" × {role.count}" if role.count > 1 else ""
        for where, part in (("GPU", role.device), ("host", role.host)):
            if part.total >= 0.005 * GIB:
                suffix = f", {where}" if any(r.device.total for r in plan.fit.memory) else ""
                table.add_row(f"{label}{suffix}", *_cells(part))
    out.print(table)
    cache = plan.fit.cache
    if cache:
        known = all(node.gpu_gib for node in plan.nodes if node.gpus)
        has = f"{cache.gib:.2f}: {_n(cache.requests)} fit at once" if known else "an amount that is not known"
        wanted = f"engine.max_running requests of full length want {cache.wanted_gib:.2f} GiB"
        _say(out, f"KV cache: {cache.token_bytes / 1024:.1f} KiB a token; {wanted}, an engine has {has}")


def _cells(part: Bytes) -> list[str]:
    values = [getattr(part, name) for name in COLUMNS]
    return [_gib(value) if value else "–" for value in (*values, part.total)]


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}" if value < 100 * GIB else f"{value / GIB:,.0f}"


def _places(plan: Plan, out: Console) -> None:
    table = _table("what each place has to hold, GiB", "place", "holds")
    for name in ("needed", "has"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for load in plan.fit.loads:
        has = f"{load.has:.1f}" if load.has else "?"
        verdict = ("yes" if load.fits else "NO") if load.has else "not checked"
        table.add_row(escape(load.where), ", ".join(load.holds), f"{load.needed:.1f}", has, verdict)
    out.print(table)


def _verdict(plan: Plan, out: Console) -> None:
    for problem in plan.problems:
        _problem(problem, out)
    if plan.fit.fits:
        _say(out, f"{'this' if plan.fits else 'all else'} fits{_given(plan.fit.loads)}")
    elif plan.advice is None:
        _say(out, "no change of the memory keys, and no number of such nodes, was found under which it would fit")
    else:
        _advice(plan.advice, plan, out)


def _given(loads: Iterable[Load]) -> str:
    """On which condition something fits: what is needed of memory whose size is not known."""
    unknown: dict[bool, float] = {}
    for load in loads:
        if not load.has:
            unknown[load.of_gpu] = max(load.needed, unknown.get(load.of_gpu, 0.0))
    parts = [f"each GPU has {unknown[True]:.1f} GiB"] if True in unknown else []
    parts += [f"each node has {unknown[False]:.1f} GiB of host memory"] if False in unknown else []
    return f" if {' and '.join(parts)}, which was not checked" if parts else ""


def _advice(change: Change, plan: Plan, out: Console) -> None:
    line, given = " ".join(change.overrides), _given(change.loads)
    if not change.nodes:
        _say(out, f"the nearest change under which it fits{given}:")
    else:
        key = "learner.offload"
        off = plan.defaults.get(key) == "none" and key not in dict(change.settings)
        if off and not all(node.memory_gib for node in plan.nodes):
            _say(out, f"with {key}=cpu it may need fewer nodes: give their host memory to have that tried")
        it = f"it fits on {len(change.nodes)} such nodes (now {len(plan.nodes)})"
        _say(out, f"{it}{given}{', with' if given and line else ' with' if line else ''}:")
        if all(node.gpu_gib for node in change.nodes if node.gpus):  # else text would say more than is known
            line = f"nodes={write_nodes(change.nodes)} {line}"
    out.print(f"  {line.strip()}", markup=False, soft_wrap=True)  # one line, to be pasted


def _problem(problem: Problem, out: Console) -> None:
    _say(out, f"problem: {problem.where + ': ' if problem.where else ''}{problem.what}")
    for name, text in (("found", problem.value), ("rule", problem.rule), ("remedy", problem.remedy)):
        if text:
            _say(out, f"  {name + ':':<8}{text}", indent=10)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _say(out: Console, text: str, *, indent: int = 2) -> None:
    lines: Iterable[str] = textwrap.wrap(text, out.width, subsequent_indent=" " * indent, break_long_words=False)
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


def _count(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("tch") else "s"
    return f"{number:,} {noun}{plural}"


def _n(value: float) -> str:
    return f"{value:,.0f}"


def _short(value: Any, key: str) -> str:
    """As a config would hold it, without secrets, cut."""
    text = in_yaml(redacted(value, key))
    return text if len(text) <= 60 else text[:59] + "…"

"""The numbers of a run that stand in the report as text: headline, evaluations, all metrics, config, versions."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from rayalign.record import flat
from rayalign.report.data import Run, spread
from rayalign.report.samples import visible

EVALUATIONS = 5  # columns of the table
MEASURES = {
    "reward": "reward",
    "win_rate": "win rate over the first model",
    "gap": "log-prob of the data’s answers less that of the policy’s own, nats",
    "gap_per_token": "the same a token",
    "kl/k1": "KL to the reference, k1, nats",
    "kl/k3": "KL to the reference, k3, nats",
    "length": "tokens",
    "truncated": "share truncated",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
}
MISSING = "–"
PEAKS = "host and GPU, peaks of all processes added"


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    unit: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; a cell is its text, or (text, smaller text below it)."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Any, ...]], ...]


def number(value: float, *, sign: bool = False) -> str:
    """For reading: three or four digits that matter."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1000 or (size >= 1 and value == int(value)):
        text = f"{size:,.0f}"
    elif size >= 10:
        text = f"{size:.1f}"
    elif size >= 0.001:
        text = f"{size:.3f}"
    else:
        text = f"{size:.1e}"
    return ("−" if value < 0 else "+" if sign else "") + text


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def status(run: Run) -> str:
    """How far the run came."""
    done, planned = run.last_step, run.planned_steps
    if not done:
        return "no step yet"
    if planned is None:
        return f"{done:,} steps"
    reached = f"{done:,} of {planned:,} steps"
    if done < planned:
        return reached
    # A run that evaluates at all does so at its end.
    missing = run.evaluations and run.evaluations[-1]["step"] < planned
    return reached + ("; the last evaluation is missing" if missing else ", finished")


def what(run: Run) -> str:
    """The run in a line: algorithm, model, scorer."""
    config = flat(run.config)
    algorithm = " ".join(str(config[k]) for k in ("algorithm.name", "algorithm.loss.name") if config.get(k))
    model = str(config.get("model.path") or "").rstrip("/").rpartition("/")[2]
    scorer = str(config.get("scorer.rule") or config.get("scorer.name") or "")
    return visible(" · ".join(part for part in (algorithm, model, scorer) if part))


def tiles(run: Run) -> list[Tile]:
    """The headline; only what the run has measured."""
    found = [_reward_tile(run), _kl_tile(run), _steps_tile(run), *_machine_tiles(run)]
    return [tile for tile in found if tile]


def evaluations(run: Run) -> Table | None:
    """Means and 95 % intervals: before, during, after."""
    chosen = [(run, int(record["step"])) for record in spread(run.evaluations, EVALUATIONS)]
    return _measures(chosen, [_moment(run, step) for _, step in chosen])


def last_evaluations(runs: Sequence[Run]) -> Table | None:
    """The last evaluation of each run, side by side."""
    chosen = [(run, int(run.evaluations[-1]["step"])) for run in runs if run.evaluations]
    return _measures(chosen, [f"{visible(run.name)}, step {step:,}" for run, step in chosen])


def _measures(chosen: Sequence[tuple[Run, int]], columns: Sequence[str]) -> Table | None:
    metrics = [{r["step"]: r["metrics"] for r in run.evaluations}[step] for run, step in chosen]
    known = dict.fromkeys(key for each in metrics for key in each if not key.endswith(("/low", "/high")))
    keys = [*(key for key in MEASURES if key in known), *(key for key in known if key not in MEASURES)]
    rows = []
    for key in keys:
        found = [{at: rest for at, *rest in run.evaluated(key)}.get(step) for run, step in chosen]
        rows.append((MEASURES.get(key, visible(key)), tuple(map(_interval_cell, found))))
    return Table(tuple(columns), tuple(rows)) if rows else None


def all_metrics(run: Run) -> Table:
    """Of every metric the first, last, lowest and highest value."""
    rows = []
    for key in sorted(run.keys):
        values = run.series(key).finite
        ends = (values[0], values[-1], values.min(), values.max()) if len(values) else ()
        rows.append((visible(key), tuple(number(v) for v in ends) or ("not finite",) * 4))
    return Table(("first", "last", "lowest", "highest"), tuple(rows))


def config_text(run: Run) -> str:
    return visible(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)) if run.config else ""


def config_differences(runs: Sequence[Run]) -> Table:
    """The keys in which runs differ."""
    return _differences(
        runs, [flat({k: v for k, v in r.config.items() if k not in ("run_dir", "resume")}) for r in runs]
    )


def versions(runs: Sequence[Run]) -> Table:
    packages = list(dict.fromkeys(package for run in runs for package in run.versions))
    rows = tuple((visible(p), tuple(visible(r.versions.get(p, MISSING)) for r in runs)) for p in packages)
    return Table(tuple(visible(run.name) for run in runs), rows)


def command(run: Run) -> str:
    """Do this run again, in a new folder; or, when it stopped before its end, go on with it."""
    config = shlex.quote(visible(str(run.path / "config.yaml")))
    again = shlex.quote(visible(f"run_dir={run.path}-again"))
    return f"rayalign train {config} {again}"


def resume_command(run: Run) -> str:
    planned = run.planned_steps
    if planned is None or run.last_step >= planned:
        return ""
    config, here = (shlex.quote(visible(text)) for text in (str(run.path / "config.yaml"), f"run_dir={run.path}"))
    return f"rayalign train {config} {here} resume=true"


def _reward_tile(run: Run) -> Tile | None:
    found = run.evaluated("reward")
    if found:
        (_, mean, low, high), (_, new_mean, new_low, new_high) = found[0], found[-1]
        if len(found) == 1:
            return Tile("Held-out reward", number(mean), detail=_interval(low, high))
        rose = f"{number(new_mean - mean, sign=True)}; {_interval(low, high)} → {_interval(new_low, new_high)}"
        return Tile("Held-out reward", f"{number(mean)} → {number(new_mean)}", detail=rose)
    values = run.series("reward/mean").finite
    if not len(values):
        return None
    share = min(len(values), max(3, len(values) // 10))
    first, last = values[:share].mean(), values[-share:].mean()
    return Tile(
        "Reward in training", f"{number(first)} → {number(last)}", detail=f"mean of the first and last {_steps(share)}"
    )


def _kl_tile(run: Run) -> Tile | None:
    found = run.evaluated("kl/k1")
    if found:
        _, mean, low, high = found[-1]
        return Tile("KL (k1)", number(mean), "nats", f"{_interval(low, high)}, held-out prompts")
    values = run.series("kl/k1").finite
    if not len(values):
        return None
    share = min(len(values), max(3, len(values) // 10))
    return Tile("KL (k1)", number(values[-share:].mean()), "nats", f"mean of the last {_steps(share)}")


def _steps_tile(run: Run) -> Tile:
    planned = run.planned_steps
    done = f"{run.last_step:,}" + (f" / {planned:,}" if planned else "")
    learns = not {"loss", "critic/loss"}.isdisjoint(run.keys)
    others = [record for record in run.metrics if "loss" not in record] if learns else []
    critic = sum("critic/loss" in record for record in others)
    counts = {"critic only": critic, "skipped: nothing to learn from": len(others) - critic}
    return Tile("Steps", done, detail=", ".join(f"{count:,} {what}" for what, count in counts.items() if count))


def _machine_tiles(run: Run) -> list[Tile]:
    found = []
    times = run.series("time/step_s").finite
    if len(times):
        detail = f"median; {duration(times.sum())} in steps"
        found.append(Tile("Time of a step", f"{np.median(times):.1f}", "s", detail))
    speeds = run.series("rollout/tokens_per_s").finite
    if len(speeds):
        found.append(Tile("Sampling", f"{np.median(speeds):,.0f}", "tokens/s", "median"))
    memory = run.series("memory/peak_gib").finite
    if len(memory):
        found.append(Tile("Peak memory", f"{memory.max():.1f}", "GiB", PEAKS))
    return found


def _moment(run: Run, step: int) -> str:
    if step == 0:
        return "before"
    return f"after, step {step:,}" if step == run.last_step else f"step {step:,}"


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count:,} steps"


def _interval(low: float, high: float) -> str:
    return f"[{number(low)}, {number(high)}]" if math.isfinite(low) and math.isfinite(high) else ""


def _interval_cell(found: list[float] | None) -> Any:
    return (number(found[0]), _interval(found[1], found[2])) if found else (MISSING, "")


def _differences(runs: Sequence[Run], mappings: Sequence[dict[str, Any]]) -> Table:
    keys = list(dict.fromkeys(key for mapping in mappings for key in mapping))
    rows = [(visible(key), tuple(_plain(m[key]) if key in m else MISSING for m in mappings)) for key in keys]
    return Table(tuple(visible(run.name) for run in runs), tuple(row for row in rows if len(set(row[1])) > 1))


def _plain(value: Any) -> str:
    """As YAML would show it on one line."""
    return (
        visible(value)
        if isinstance(value, str)
        else visible(yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip())
    )

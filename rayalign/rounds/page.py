"""One page that shows all stages of a job: what ended, what it came to, and links to their own reports."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from rayalign.config import Rounds, Stage
from rayalign.errors import ConfigError
from rayalign.rounds.manifest import Manifest

SHOWN = 6  # numbers of a stage
FIRST = ("reward", "best_of_n/reward", "best_of_n/mean_reward", "best_of_n/kl_bound", "kl/k3", "held_out/nll")
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.4em .8em;"
    "border-bottom:1px solid #8884}code{font-size:90%}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}a{color:#8bf}}"
)


def write_page(run_dir: Path, rounds: Rounds, done: Mapping[str, Manifest]) -> Path:
    """run_dir/report.html, whole or not at all. Raises ConfigError when it cannot be written."""
    path = run_dir / "report.html"
    rows = "".join(_row(run_dir, stage, done.get(stage.folder)) for stage in rounds.stages)
    head = "".join(f"<th>{name}</th>" for name in ("stage", "algorithm", "from", "ended", "came to", "left"))
    title = escape(run_dir.name)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}: {len(done)} of {len(rounds.stages)} stages ended</h1>"
        f"<table><tr>{head}</tr>{rows}</table></html>\n"
    )
    writing = path.with_name(f".{path.name}.tmp")
    try:
        writing.write_text(page, encoding="utf-8")
        writing.replace(path)
    except OSError as error:
        raise ConfigError(
            "the report of the rounds cannot be written",
            where=str(path),
            value=error.strerror or type(error).__name__,
            rule="a place where a file can be made",
            remedy="free disk space, then resume=true",
        ) from None
    return path


def _row(run_dir: Path, stage: Stage, manifest: Manifest | None) -> str:
    report = Path("stages") / stage.folder / "report.html"
    name = escape(stage.folder)
    if (run_dir / report).is_file():
        name = f'<a href="{escape(report.as_posix())}">{name}</a>'
    inputs = "<br>".join(f"<code>{escape(key)}</code>: {escape(folder)}" for key, folder in stage.references.items())
    ended, metrics, left = "not yet", "", ""
    if manifest is not None:
        ended = escape(manifest.ended or ended)
        metrics = "<br>".join(f"{escape(key)} {value:.4g}" for key, value in shown(manifest.metrics))
        left = "<br>".join(f"<code>{escape(path)}</code>" for path in manifest.outputs.values())
    cells = (name, escape(stage.config.algorithm.name), inputs or "the start", ended, metrics, left)
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def shown(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """The few numbers that say most of a stage."""
    known = [key for key in FIRST if key in metrics]
    rest = [key for key in metrics if key.startswith(("held_out/", "judge/", "eval")) and key not in known]
    return [(key, metrics[key]) for key in (known + rest)[:SHOWN]]

"""`rayalign report`: one or more runs as one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rayalign.errors import ConfigError
from rayalign.report import figures, samples, summary
from rayalign.report.data import Run, load_runs

HERE = Path(__file__).parent


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or of several compared, and return where it is.

    Args:
        runs: folders of runs, or a file in them.
        out: default report.html in the folder of a single run; of several, in the current directory.

    Raises:
        ConfigError: a path that is no run, or a place that cannot be written.
        DataError: a file of a run that cannot be read.
    """
    loaded = load_runs([Path(run) for run in runs])
    if out is None:
        out = loaded[0].path / "report.html" if len(loaded) == 1 else Path("report.html")
    if out.is_dir():
        out = out / "report.html"
    page = render(loaded)
    whole = out.with_name(f".{out.name}.tmp")  # a reader never sees half a page
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(page, encoding="utf-8")
        whole.replace(out)
    except OSError as error:
        with suppress(OSError):
            whole.unlink()
        raise ConfigError(
            "the report cannot be written",
            where=str(out),
            value=error.strerror or type(error).__name__,
            rule="a place where a file can be made",
            remedy="name another one with --out FILE",
        ) from None
    return out


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters.update(number=summary.number, visible=samples.visible)
    groups = {
        "learning": figures.learning(runs),
        "machine": figures.machine(runs),
        "others": figures.others(runs),
    }
    scripts = [get_plotlyjs(), (HERE / "page.js").read_text(encoding="utf-8")]
    return environment.get_template("page.html").render(
        runs=runs,
        summary=summary,
        panels=groups,
        stories={"Held-out prompts": samples.held_out(runs), "Prompts of the rollouts": samples.trained_on(runs)},
        last_step=max(run.last_step for run in runs),
        made=datetime.now(),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
    )


def _hash(script: str) -> str:
    """For the content security policy: no script but these runs in the page, whatever a model wrote."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

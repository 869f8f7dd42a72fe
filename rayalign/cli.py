"""The command `rayalign`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Preference alignment of language models on a Ray cluster.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see configs/", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, as train.steps=5", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Train a policy as CONFIG says.

    \b
    Examples:
      rayalign train configs/demo.yaml
      rayalign train configs/demo.yaml train.steps=10 optimizer.lr=2e-5 run_dir=runs/short
      rayalign train configs/demo.yaml run_dir=runs/short resume=true
    """
    from rayalign.api import run_training
    from rayalign.config import load_config

    result = run_training(load_config(config, overrides or ()), name=config.stem)
    if result.stopped:
        raise typer.Exit(130)


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Evaluate a checkpoint on CONFIG's held-out prompts: reward, KL, length, distinct-n, with intervals.

    \b
    model=PATH is the policy to evaluate; CONFIG's own model stays the reference.
    Example:
      rayalign evaluate configs/demo.yaml model=runs/demo/checkpoints/step-48
    """
    from rayalign.api import run_evaluation
    from rayalign.config import load_config

    given = [item for item in overrides or () if item.startswith("model=")]
    others = [item for item in overrides or () if not item.startswith("model=")]
    run_evaluation(load_config(config, others), model=given[-1].removeprefix("model=") if given else None)


def main() -> None:
    """Run the command line; errors that are written to a person are printed without a traceback."""
    from rayalign.errors import RayalignError

    debug = "--debug" in sys.argv
    sys.path.insert(0, os.getcwd())  # where parts that a config names by dotted path are looked for first
    try:
        app()
    except RayalignError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:  # not one of ours: still one line; a run's log/driver.log has the traceback
        if debug:
            raise
        print(f"error: {type(error).__name__}: {error}\n  remedy: --debug shows the traceback", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; resume=true goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

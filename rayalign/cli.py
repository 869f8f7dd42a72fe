"""The command `rayalign`: each verb is a few lines here and a function elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Preference alignment of language models on a Ray cluster.",
    epilog="rayalign VERB --help shows examples. rayalign --install-completion completes verbs, files and keys.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

BEFORE, JOBS, LISTS = "Before a run", "Jobs on a cluster", "What a config can say"


def _overrides(*more: str) -> typer.models.ArgumentInfo:
    """KEY=VALUE, of which the shell completes the key: one of the config's, or one of `more`."""

    def complete(incomplete: str) -> list[str]:
        from rayalign.listing import config_keys

        return [f"{key}=" for key in (*more, *config_keys()) if key.startswith(incomplete)]

    return typer.Argument(
        metavar="KEY=VALUE", help="overrides, as train.steps=5", show_default=False, autocompletion=complete
    )


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see configs/", show_default=False)]
Overrides = Annotated[list[str] | None, _overrides()]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help="of the cluster's job server; default RAY_ADDRESS, then this machine's"
    ),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="as submit printed it", show_default=False)]


def _version(wanted: bool) -> None:
    if wanted:
        from rayalign import __version__

        print(f"rayalign {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None: ...


@app.command()
def train(config: ConfigPath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Train a policy as CONFIG says; with rounds in it, stage after stage.

    \b
    Examples:
      rayalign train configs/demo.yaml
      rayalign train configs/demo.yaml train.steps=10 run_dir=runs/short
      rayalign train configs/demo.yaml run_dir=runs/short resume=true
      rayalign train configs/rounds_llama3.yaml rounds.dpo.train.steps=5
    """
    from rayalign.config import load_job
    from rayalign.rounds import run_job

    result = run_job(load_job(config, overrides or ()), name=config.stem)
    if result.stopped:
        raise typer.Exit(130)


@app.command()
def label(config: ConfigPath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Write a data set of preferences: answers that CONFIG samples, or has, with its scorer's word. No training.

    \b
    labels.jsonl in the run's folder is what data.examples reads. Shards that are there are not paid for again.
    Examples:
      rayalign label configs/label.yaml
      rayalign label configs/demo.yaml run_dir=runs/labels
      rayalign label configs/demo.yaml run_dir=runs/labels resume=true
    """
    from rayalign.config import load_config
    from rayalign.label import run_labelling

    if run_labelling(load_config(config, overrides or ()), name=f"label-{config.stem}").stopped:
        raise typer.Exit(130)


@app.command()
def generate(
    config: ConfigPath, overrides: Annotated[list[str] | None, _overrides("model")] = None, debug: Debug = False
) -> None:
    """Complete the prompts of CONFIG, by samples or a search, with log-probs and scores. No scorer, no training.

    \b
    completions.jsonl in the run's folder has one line a prompt. model=PATH is another checkpoint.
    Examples:
      rayalign generate configs/generate.yaml
      rayalign generate configs/demo.yaml model=runs/demo/checkpoints/step-30
    """
    from rayalign.config import load_config
    from rayalign.generate import run_generation

    model, others = _take("model", overrides)
    if run_generation(load_config(config, others), model=model, name=f"generate-{config.stem}").stopped:
        raise typer.Exit(130)


@app.command()
def evaluate(
    config: ConfigPath, overrides: Annotated[list[str] | None, _overrides("model")] = None, debug: Debug = False
) -> None:
    """Evaluate a checkpoint on CONFIG's held-out prompts: reward, KL, length, distinct-n, with intervals.

    \b
    model=PATH is the policy to evaluate; CONFIG's own model stays the reference.
    Examples:
      rayalign evaluate configs/demo.yaml model=runs/demo/checkpoints/step-30
      rayalign evaluate configs/demo.yaml       (the model before training)
    """
    from rayalign.api import run_evaluation
    from rayalign.config import load_config

    model, others = _take("model", overrides)
    run_evaluation(load_config(config, others), model=model)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="RUN_A", help="a run, a checkpoint or a model", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="RUN_B", help="another one", show_default=False)],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="CONFIG", help="prompts and scorer; default: run A's")
    ] = None,
    tie: Annotated[float, typer.Option("--tie", help="scores that are no further apart are a tie")] = 0.0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="default: runs/compare-DATE-TIME")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare two models on held-out prompts, by a judge or any scorer: win, tie, loss, quality.

    \b
    The same prompts, the same seeds; intervals over prompts and a sign test.
    Examples:
      rayalign compare runs/a runs/b
      rayalign compare runs/a runs/a/checkpoints/step-15 evaluation.samples=1
      rayalign compare runs/a /models/start --config judged.yaml
    """
    from rayalign.compare import run_comparison

    run_comparison(a, b, config=config, overrides=overrides or (), tie=tie, out=out)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="default: report.html in the run's folder; several: here"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write one HTML file that shows a run, or compares several: curves, samples, configs. It needs no network.

    \b
    Examples:
      rayalign report runs/demo
      rayalign report runs/demo runs/short --out compare.html
    """
    from rayalign.report import write_report

    print(write_report(runs, out))


@app.command(rich_help_panel=BEFORE)
def plan(
    config: ConfigPath, overrides: Annotated[list[str] | None, _overrides("nodes")] = None, debug: Debug = False
) -> None:
    """Show what a run would be, and start nothing: keys, actors on nodes, batches, memory, and what does not fit.

    \b
    nodes=TEXT plans for machines that are not there. Without it: the cluster at placement.address, else this machine.
    Exit code 1: it does not fit; the nearest change that would is printed.
    Examples:
      rayalign plan configs/demo.yaml
      rayalign plan my.yaml nodes=2x8xH100 learner.ranks=8
      rayalign plan my.yaml nodes=1x4xA100-40+2x64cpu/256GiB
    """
    from rayalign.config import load_job
    from rayalign.plan.rounds import plan_job

    nodes, others = _take("nodes", overrides)
    raise typer.Exit(0 if plan_job(load_job(config, others), nodes=nodes) else 1)


@app.command(rich_help_panel=BEFORE)
def doctor(
    selftest: Annotated[
        bool, typer.Option("--selftest", help="train a tiny model through Ray, vLLM and DeepSpeed")
    ] = False,
    debug: Debug = False,
) -> None:
    """Look at this machine: versions, devices, memory, ports, Ray and vLLM. Every finding comes with its remedy.

    \b
    Exit code 1: something has to be mended first.
    Examples:
      rayalign doctor
      rayalign doctor --selftest
    """
    from rayalign.doctor import diagnose

    raise typer.Exit(1 if diagnose(selftest=selftest) else 0)


@app.command(rich_help_panel=JOBS)
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option(help="show the job's log until it ends")] = True,
    debug: Debug = False,
) -> None:
    """Train as CONFIG says, as a job on a Ray cluster. Uploads the config, its data, your modules and rayalign.

    \b
    The job's exit code is this command's. Ctrl-C leaves the job running.
    Examples:
      rayalign submit my.yaml --address http://head:8265
      rayalign submit my.yaml run_dir=/shared/runs/a train.steps=500 --no-follow
    """
    from rayalign.config import load_job
    from rayalign.submit import submit as submit_job

    code = submit_job(load_job(config, overrides or ()), name=config.stem, address=address, follow=follow, say=_say)
    raise typer.Exit(code)


@app.command(rich_help_panel=JOBS)
def status(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="none: list all", show_default=False)] = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Show how a submitted job is doing, or list the cluster's jobs.

    \b
    Examples:
      rayalign status
      rayalign status demo-20261121-093000-1a2b --address http://head:8265
    """
    from rayalign.runtime.jobs import job_status, list_jobs

    print(job_status(address, job) if job else list_jobs(address))


@app.command(rich_help_panel=JOBS)
def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option(help="until the job ends; its exit code is then this command's")] = True,
    debug: Debug = False,
) -> None:
    """Show a submitted job's log.

    \b
    Examples:
      rayalign logs demo-20261121-093000-1a2b
      rayalign logs demo-20261121-093000-1a2b --no-follow
    """
    from rayalign.runtime.jobs import job_logs

    raise typer.Exit(job_logs(address, job, follow=follow, say=_say))


@app.command(rich_help_panel=JOBS)
def stop(job: Job, address: Address = None, debug: Debug = False) -> None:
    """Stop a submitted job: its step is finished and a checkpoint written first.

    \b
    Example:
      rayalign stop demo-20261121-093000-1a2b --address http://head:8265
    """
    from rayalign.runtime.jobs import stop_job

    raise typer.Exit(stop_job(address, job, say=_say))


@app.command(rich_help_panel=LISTS)
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of configs, for editors that complete and check YAML.

    \b
    Example:
      rayalign schema > rayalign.schema.json
    and as the first line of a config:
      # yaml-language-server: $schema=rayalign.schema.json
    """
    import json

    from rayalign.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command(rich_help_panel=LISTS)
def algorithms(debug: Debug = False) -> None:
    """List the algorithms, a line each and the paper.

    \b
    Example:
      rayalign algorithms
    """
    from rayalign.algorithms import ALGORITHMS
    from rayalign.listing import entries, print_entries

    hint = "In a config: algorithm: {name: …}; one of your own: {name: my_pkg.my_algorithm:MyAlgorithm}"
    print_entries("Algorithms", entries(ALGORITHMS), hint=hint)


@app.command(rich_help_panel=LISTS)
def scorers(debug: Debug = False) -> None:
    """List the scorers, a line each and the paper.

    \b
    Example:
      rayalign scorers
    """
    from rayalign.listing import entries, print_entries
    from rayalign.scorers import SCORERS

    hint = "In a config: scorer: {name: …}; one of your own: {name: my_pkg.rewards:Politeness}"
    print_entries("Scorers", entries(SCORERS), hint=hint)


def _take(key: str, overrides: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """The last `key=value` among the overrides, which is not a key of the config, and the others."""
    given = [item for item in overrides or () if item.startswith(f"{key}=")]
    others = [item for item in overrides or () if not item.startswith(f"{key}=")]
    return (given[-1].partition("=")[2] if given else None), others


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line; errors that are written to a person are printed without a traceback."""
    from rayalign.errors import RayalignError

    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode shows "?" for what it cannot show
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


if __name__ == "__main__":
    main()

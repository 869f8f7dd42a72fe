"""`rayalign submit` against a Ray cluster of two nodes that is started for it, with a token and real jobs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rayalign.config import parse_config, save_config
from rayalign.errors import ConfigError
from rayalign.runtime.job_client import connect
from rayalign.runtime.jobs import follow_job, job_logs, job_status, list_jobs, stop_job
from rayalign.submit import submit
from tests.loop.conftest import records
from tests.parts import tiny_config, write_prompts

TOKEN = "5ec2e7" * 10
CLUSTER = {
    "placement": {"name": "ray", "start_deadline_s": 120},
    "engine": {"name": "transformers", "max_context": 64, "deadline_s": 60},
    "learner": {"name": "torch", "deadline_s": 60, "threads": 1},
    "data__prompts": "prompts.jsonl",
    "run_dir": "runs/a",
}
REWARDS = """
import os
from pathlib import Path
import ray, rayalign
from submit_helper import score
from rayalign.scorers.base import ScorerConfig

class Length(ScorerConfig):
    name: str
    report: str

    def start(self):
        lines = [str(path) for path in sorted(Path.cwd().rglob("*")) if path.is_file()]
        lines += [rayalign.__file__, ray.get_runtime_context().get_node_id()]
        Path(self.report, f"scorer-{os.getpid()}").write_text("\\n".join(lines))
        return score
"""
IN_THE_JOB = {"placement": "local", "engine": {"name": "transformers", "max_context": 64}}  # one process, soon ready
COMMAND = """
import signal
from rayalign.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
main()
"""
ROOT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Cluster:
    url: str
    gcs: str


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of a core each, guarded by a token of their own."""
    folder = Path(tempfile.mkdtemp(prefix="ra-", dir="/tmp"))  # short: sockets lie below it
    (folder / "token").write_text(TOKEN)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    gcs, dashboard, client = (free_port() for _ in range(3))
    node = ["--block", "--num-cpus=1", f"--object-store-memory={150 * 2**20}", "--dashboard-agent-listen-port=0"]
    node += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
    head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    processes = []
    url = f"http://127.0.0.1:{dashboard}"
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("w") as log:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            patch.delenv(name, raising=False)
        try:
            for role in ([*head, f"--temp-dir={folder}/t"], [f"--address=127.0.0.1:{gcs}"]):
                arguments = [str(Path(sys.executable).parent / "ray"), "start", *role, *node]
                processes.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=log))
                wait_for(lambda: takes_connections(gcs), "the cluster")  # which a second node may join then
            wait_for(lambda: nodes_of(url) == len(processes), "both nodes")
            yield Cluster(url, f"127.0.0.1:{gcs}")
        finally:
            family = [each for p in processes for each in psutil.Process(p.pid).children(recursive=True)]
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                process.wait(timeout=60)
            for process in psutil.wait_procs(family, timeout=10)[1]:
                process.kill()
            shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def takes_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def nodes_of(url: str) -> int:
    import requests

    try:
        answer = requests.get(f"{url}/nodes?view=summary", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=5)
        return sum(each["raylet"].get("state") == "ALIVE" for each in answer.json()["data"]["summary"])
    except (OSError, ValueError, KeyError):
        return 0


def wait_for(condition, what: str, limit_s: float = 90.0) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit, f"waited {limit_s} s for {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def place(tmp_path_factory, model) -> Iterator[Path]:
    """A user's folder: prompts, modules of their own, and what must not travel."""
    folder = tmp_path_factory.mktemp("place")
    write_prompts(folder / "prompts.jsonl")
    (folder / "submit_rewards.py").write_text(REWARDS)
    (folder / "submit_helper.py").write_text(
        "def score(groups):\n    return [[float(len(t)) - i for i, t in enumerate(g.texts)] for g in groups]\n"
    )
    for unwanted in (".git/config", "runs/old/metrics.jsonl", "checkpoints/model.safetensors", "notes.txt"):
        (folder / unwanted).parent.mkdir(parents=True, exist_ok=True)
        (folder / unwanted).write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture
def config(place, model):
    return lambda **changes: parse_config(tiny_config(place, model, **{**CLUSTER, "train__steps": 2, **changes}))


def test_the_jobs_exit_code_is_the_commands(cluster, config, place, capfd, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.gcs)  # the address that is given wins
    said: list[str] = []
    brief = config(**IN_THE_JOB, run_dir="runs/brief")
    assert submit(brief, name="my run", address=cluster.url, say=said.append) == 0
    out = capfd.readouterr().out
    assert [r["step"] for r in records(place / "runs" / "brief")] == [1, 2]
    assert "step 2/2" in out  # the log as it came
    assert "succeeded after" in said[-1]
    assert f"run directory on the cluster: {place}/runs/brief" in said
    # Once more into the same folder: the run itself refuses, and its code is ours. Another, whose scorer raises,
    # starts meanwhile.
    broken = config(**IN_THE_JOB, scorer={"name": "tests.parts:Raises", "when": "start"}, run_dir="runs/broken")
    assert submit(broken, name="broken", address=cluster.url, say=said.append, follow=False) == 0
    job = job_of(said)
    assert submit(brief, name="again", address=cluster.url, say=said.append) == 2
    assert "this run directory exists" in capfd.readouterr().out
    assert "failed with exit code 2 after" in said[-1]
    assert job_logs(cluster.url, job, say=said.append) == 1
    assert "FileNotFoundError: no lexicon here" in capfd.readouterr().out
    assert "failed with exit code 1 after" in said[-1]


def job_of(said: list[str]) -> str:
    """The job that was submitted last: its commands are told a line each, to be copied whole."""
    lines = [shlex.split(line) for line in said if line.startswith("  rayalign ")][-3:]
    assert [words[1] for words in lines] == ["logs", "status", "stop"]
    return lines[0][2]


def test_a_long_job_is_followed_left_followed_again_and_stopped(cluster, config, place, tmp_path, capsys):
    reports = tmp_path / "reports"
    reports.mkdir()
    scorer = {"name": "submit_rewards:Length", "count": 2, "report": str(reports)}
    save_config(config(train__steps=100_000, run_dir="runs/long", scorer=scorer), place / "long.yaml")
    command = [sys.executable, "-c", COMMAND, "submit", "long.yaml", "--address", cluster.url]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": ROOT}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    followed = subprocess.Popen(command, env=environment, **pipes)
    out = ""
    for line in followed.stdout:
        out += line
        if "step      1/100000" in line:
            break
    followed.send_signal(signal.SIGINT)
    rest, err = followed.communicate(timeout=60)
    assert followed.returncode == 130, out + err
    told, left = err.split("the job goes on; ")
    job = job_of(told.splitlines())
    assert left.splitlines()[1:] == [f"  rayalign {verb} {job} --address {cluster.url}" for verb in ("logs", "stop")]
    assert "Traceback" not in out + rest + err
    check_what_arrived(reports)
    assert "running for" in job_status(cluster.url, job)
    assert any(line.split()[:3] == [job, "running", "for"] for line in list_jobs(cluster.url).splitlines())
    assert job_logs(cluster.url, job, follow=False) == 0
    assert "step      1/100000" in capsys.readouterr().out

    said: list[str] = []
    with Relay(cluster.url) as relay:
        codes: list[int] = []
        again = threading.Thread(target=lambda: codes.append(follow_job(connect(relay.url), job, said.append)))
        again.start()
        wait_for(lambda: relay.carried > 1000, "the log")
        relay.cut()
        wait_for(lambda: any("does not answer" in line for line in said), "the loss to be noticed")
        relay.mend()
        wait_for(lambda: said[-1] == "the cluster answers again", "the log once more")
        assert stop_job(cluster.url, job, say=print) == 0
        again.join(timeout=60)
        assert codes == [130]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == len(set(lines)) == len(records(place / "runs" / "long"))  # none twice, none lost
    checkpoints = [path.name for path in (place / "runs" / "long" / "checkpoints").iterdir()]
    assert checkpoints == [f"step-{len(lines)}"]
    assert "stopped after" in job_status(cluster.url, job)
    assert stop_job(cluster.url, job, say=said.append) == 0
    assert "had ended before: stopped" in said[-1]
    assert TOKEN not in out + rest + err + "".join(said)
    assert not [path for path in (place / "runs" / "long").rglob("*") if path.is_file() and TOKEN in read(path)]


def check_what_arrived(folder: Path) -> None:
    """Two scorers on two nodes, beside rayalign as it is here, and not what the nodes have installed."""
    reports = [path.read_text().splitlines() for path in folder.glob("scorer-*")]
    assert len({lines[-1] for lines in reports}) == 2  # nodes
    for lines in reports:
        here = Path(lines[-2]).parents[1]
        assert "working_dir_files" in here.parts
        arrived = {str(Path(line).relative_to(here)) for line in lines[:-2]}
        assert {name for name in arrived if not name.startswith("rayalign/") and "__pycache__" not in name} == {
            "config.yaml",
            "prompts.jsonl",
            "submit_rewards.py",
            "submit_helper.py",
        }


def read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def test_ctrl_c_while_a_job_goes_out(cluster, config):
    said: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for path, words in ((b"PUT /api/packages/", "no job was submitted"), (b"POST /api/jobs/", "may have been")):
            with Relay(cluster.url, interrupt=path) as relay:
                assert submit(config(), name="cut", address=relay.url, say=said.append) == 130
            assert any(words in line for line in said[-3:])
    finally:
        signal.signal(signal.SIGINT, before)
    assert not [line for line in list_jobs(cluster.url).splitlines() if line.startswith("cut-")]


class Relay:
    """A connection to the cluster that can be cut, and that sends Ctrl-C instead of requests that begin so."""

    def __init__(self, url: str, interrupt: bytes = b""):
        self._interrupt = interrupt
        self._target = url.removeprefix("http://").split(":")
        self._open: list[socket.socket] = []
        self._up, self.carried = True, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        self._up = False
        for end in self._open:
            shut(end)

    def mend(self) -> None:
        self._up = True

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            if not self._up:
                here.close()
                continue
            there = socket.create_connection((self._target[0], int(self._target[1])))
            self._open += [here, there]
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self._interrupt and data.startswith(self._interrupt):
                    os.kill(os.getpid(), signal.SIGINT)
                    continue
                sink.sendall(data)
                self.carried += len(data)
        shut(sink)


def shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def test_a_token_that_is_missing_or_wrong_is_explained(cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 60)
    with pytest.raises(ConfigError, match="does not take this token") as error:
        list_jobs(cluster.url)
    assert "of RAY_AUTH_TOKEN" in str(error.value)
    assert "f" * 60 not in str(error.value)
    assert "scp HEAD:.ray/auth_token" in error.value.remedy
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="there is none here"):
        list_jobs(cluster.url)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=disabled"):
        list_jobs(cluster.url)


def test_jobs_and_addresses_that_are_not_there_are_said(cluster):
    with pytest.raises(ConfigError, match="there is no such job"):
        job_status(cluster.url, "absent")
    for address in (cluster.gcs, f"127.0.0.1:{free_port()}", "http://not a url"):
        with pytest.raises(ConfigError, match="no Ray job server answers there") as error:
            connect(address)
        assert address in str(error.value)
        assert "launch/ray_cluster.sh head" in error.value.remedy
    with pytest.raises(ConfigError, match="http://HEAD:8265"):
        connect("ray://head:10001")

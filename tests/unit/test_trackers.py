"""Trackers, offline, by the real libraries: what was logged is read back from their own files."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from rayalign.errors import ConfigError
from rayalign.trackers import Guarded, MLflow, TensorBoard, WeightsAndBiases, start_trackers

CONFIG = {"train": {"steps": 3}, "model": {"path": "m"}, "scorer": {"api_key": "sk-1"}}
STEPS = [(1, {"loss": 0.7, "time/step_s": 1.0, "kl/k1": float("nan")}), (2, {"loss": 0.6, "time/step_s": 2.0})]


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "runs" / "first run"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def log(record, run_dir, steps=STEPS, first_step=0):
    tracker = record.start(run_dir, first_step)
    for step, metrics in steps:
        tracker.log(step, metrics)
    tracker.close()


def test_tensorboard(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(TensorBoard(), run_dir)
    log(TensorBoard(), run_dir, [(2, {"loss": 0.5})], first_step=1)  # resumed: step 2 is made again
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(1, 0.7), (2, 0.5)]
    assert "kl/k1" not in events.Tags()["scalars"]


def wandb_records(file):
    """The protobuf records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, block, at, whole = file.read_bytes(), 32768, 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if block - at % block < 7:  # what is left of a block is too short for a record
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def test_wandb_offline(run_dir):
    log(WeightsAndBiases(mode="offline", project="p", tags=("a",)), run_dir)
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    records = list(wandb_records(file))
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, list(run.tags)) == ("p", "first run", ["a"])
    assert {u.key: u.value_json for u in run.config.update if u.key in CONFIG} == {
        "train": '{"steps":3}',
        "model": '{"path":"m"}',
        "scorer": '{"api_key":"***"}',
    }
    history = [
        {item.key or "/".join(item.nested_key): float(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [(h["step"], h["loss"], h["time/step_s"]) for h in history] == [(1, 0.7, 1.0), (2, 0.6, 2.0)]
    assert all("kl/k1" not in h for h in history)
    log(WeightsAndBiases(mode="offline"), run_dir, [(3, {"loss": 0.5})])  # resumed: the same run goes on
    ids = {f.name for f in run_dir.glob("wandb/offline-run-*/run-*.wandb")}
    assert len(ids) == 1


def test_mlflow_in_a_file(run_dir, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log(MLflow(), run_dir)
    log(MLflow(), run_dir, [(3, {"loss": 0.5})])
    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("rayalign").experiment_id])
    assert (run.info.run_name, run.info.status) == ("first run", "FINISHED")
    assert run.data.params == {"train.steps": "3", "model.path": "m", "scorer.api_key": "***"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 0.7),
        (2, 0.6),
        (3, 0.5),
    ]


class Failing:
    """A tracker whose server went away after its first step."""

    def __init__(self):
        self.calls = []

    def log(self, step, metrics):
        self.calls.append(step)
        if step > 1:
            raise ConnectionResetError("connection lost")

    def close(self):
        raise ConnectionResetError("connection lost")


def test_a_tracker_that_fails_is_not_called_again(caplog):
    tracker = Failing()
    guarded = Guarded(tracker, "mine")
    for step in (1, 2, 3):
        guarded.log(step, {"loss": 1.0})
    guarded.close()
    assert tracker.calls == [1, 2]
    assert [r.getMessage() for r in caplog.records] == [
        "mine did not take step 2; the run goes on without it: connection lost"
    ]


def test_a_server_that_goes_away_is_given_up_soon(run_dir, monkeypatch):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    asked = []

    class Busy(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.send_response(503)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Busy)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    with pytest.raises(ConfigError, match="MLflow did not take the run"):
        MLflow(tracking_uri=f"http://bob:hunter2@127.0.0.1:{server.server_port}").start(run_dir, 0)
    server.shutdown()
    assert 1 <= len(asked) <= 3


def test_a_resumed_run_goes_on_without_a_tracker_that_is_away(run_dir, caplog):
    records = [MLflow(tracking_uri="nosuch://bob:hunter2@server"), TensorBoard()]
    assert len(start_trackers(records, run_dir, 3, resume=True)) == 1
    assert "without the tracker mlflow" in caplog.text
    with pytest.raises(ConfigError) as error:
        start_trackers(records, run_dir, 0, resume=False)
    assert "hunter2" not in str(error.value) + caplog.text


def test_refusals_say_what_to_do(run_dir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "no-such-mode")
    with pytest.raises(ConfigError, match="did not take the run") as error:
        WeightsAndBiases().start(run_dir, 0)
    assert "WANDB_API_KEY" in str(error.value)
    with pytest.raises(ConfigError, match="MLflow did not take the run") as error:
        MLflow(tracking_uri="nosuch://server").start(run_dir, 0)
    assert "nosuch://server" in str(error.value)


@pytest.mark.parametrize(("tracker", "module"), [("WeightsAndBiases", "wandb"), ("MLflow", "mlflow")])
def test_an_extra_that_is_not_installed(run_dir, tracker, module):
    code = f"""
import sys, pathlib
sys.modules[{module!r}] = None  # what Python does for a module that cannot be imported
from rayalign.trackers import {tracker}
{tracker}().start(pathlib.Path({str(run_dir)!r}), 0)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f'pip install "rayalign[{module}]"' in ended.stderr

"""Children that crash, hang or lack a package are findings; doctor itself goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from rayalign.doctor.startup import stage_findings
from rayalign.selftest import in_folder
from rayalign.selftest.child import Child
from rayalign.selftest.devices import MAX_GAP, Gpu, engine_dtype, engine_settings, learner_dtype
from rayalign.selftest.stage import Stage, from_child, side_by_side
from rayalign.selftest.tiny_model import build_model
from rayalign.selftest.training import checkpoint_problem, push_problem, training_problem, written_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# In front of every import of the children: as if these were not installed.
HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def module(folder: Path, text: str) -> dict[str, str]:
    """A module `trial` with this text, and the environment in which it is found."""
    (folder / "trial.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


def run(folder: Path, text: str, *, deadline_s: float = 60) -> list[Stage]:
    child = Child(["trial"], deadline_s=deadline_s, log=folder / "log", environment=module(folder, text))
    return list(filter(None, from_child(child, ("one", "two", "three"))))


STAGES = "from rayalign.selftest.stage import stage\nwith stage('one') as note:\n    note.found = 'fine'\n"


def test_a_failed_stage_does_not_end_the_next(tmp_path: Path) -> None:
    done = run(
        tmp_path, STAGES + "with stage('two'):\n    1 / 0\nwith stage('three') as note:\n    note.found = 'too'\n"
    )
    assert [stage.outcome for stage in done] == ["passed", "failed", "passed"]
    assert "ZeroDivisionError" in done[1].found and str(tmp_path / "log") in done[1].remedy
    assert "1 / 0" in (tmp_path / "log").read_text()


def test_a_crash_is_the_next_stage_s_failure(tmp_path: Path) -> None:
    done = run(tmp_path, STAGES + "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    assert [stage.outcome for stage in done] == ["passed", "failed", "skipped"]
    assert done[1].found == "ended by SIGSEGV"


def test_a_hanging_child_is_ended_with_its_own_children(tmp_path: Path) -> None:
    text = "import subprocess, time\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\ntime.sleep(600)\n"
    child = Child(["trial"], deadline_s=3, log=tmp_path / "log", environment=module(tmp_path, text))
    pid = child.run()[0]
    assert child.late and child.trouble() == "no end within 3 s"
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_a_grandchild_that_holds_the_pipe_does_not_hold_us(tmp_path: Path) -> None:
    text = STAGES + "import subprocess\nsubprocess.Popen(['sleep', '20'], start_new_session=True)\n"
    done = run(tmp_path, text, deadline_s=15)
    assert [stage.outcome for stage in done] == ["passed", "failed", "skipped"]
    assert done[1].found == "the process ended before this stage"


def alive(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


@pytest.mark.parametrize("session", [False, True])
def test_leaving_early_ends_a_child_and_what_it_started(tmp_path: Path, session: bool) -> None:
    """Also a grandchild that does not end when asked, with a process group of its own or not, as Ray's workers are
    before they have started."""
    inner = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    text = f"""
import subprocess, sys, time
inner = subprocess.Popen([sys.executable, "-c", {inner!r}], stdout=subprocess.PIPE, start_new_session={session})
inner.stdout.readline()
print(inner.pid, flush=True)
time.sleep(600)
"""
    child = Child(["trial"], deadline_s=60, log=tmp_path / "log", environment=module(tmp_path, text))
    lines = child.lines()
    pid = next(filter(None, lines))
    assert alive(pid)
    lines.close()
    assert not alive(pid) and child.returncode == -15


def test_side_by_side_is_not_one_after_the_other(tmp_path: Path) -> None:
    """The first child waits for what the second one leaves, so one after the other would never end."""
    mark = tmp_path / "mark"
    texts = {
        "waits": f"import time, pathlib\nwhile not pathlib.Path({str(mark)!r}).exists():\n    time.sleep(0.05)\n"
        + STAGES,
        "leaves": STAGES.replace("one", "two") + f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n",
    }
    chains = []
    for (name, text), stage in zip(texts.items(), ("one", "two"), strict=True):
        (tmp_path / f"{name}.py").write_text(text)
        environment = {"PYTHONPATH": str(tmp_path)}
        child = Child([name], deadline_s=60, log=tmp_path / f"{name}.log", environment=environment)
        chains.append(from_child(child, (stage,)))
    assert {(done.name, done.outcome) for done in filter(None, side_by_side(chains))} == {
        ("one", "passed"),
        ("two", "passed"),
    }


@pytest.mark.parametrize(("outcome", "early", "stays"), [("passed", 0, 0), ("failed", 0, 1), ("failed", 1, 0)])
def test_only_a_failure_leaves_its_folder(tmp_path, monkeypatch, outcome, early, stays) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stages = in_folder("trial-", lambda folder: iter_of(Stage("a", outcome, str(folder))))
    found = next(stages)
    assert Path(found.found).parent == tmp_path and Path(found.found).is_dir()
    stages.close() if early else list(stages)
    assert len(list(tmp_path.iterdir())) == stays


def iter_of(*stages: Stage):
    yield from stages


@pytest.mark.parametrize(
    ("gpus", "engine", "learner"),
    [
        ([], "float32", "float32"),
        ([Gpu(80, 9.0), Gpu(40, 8.0)], "bfloat16", "bfloat16"),
        ([Gpu(80, 9.0), Gpu(16, 7.5)], "float16", "float32"),  # vLLM refuses bfloat16 below 8.0
    ],
)
def test_dtypes_follow_the_oldest_gpu(gpus, engine, learner) -> None:
    assert (engine_dtype(gpus), learner_dtype(gpus)) == (engine, learner)
    assert engine_settings(gpus)["dtype"] == engine and engine in MAX_GAP
    assert [Gpu.parse(str(gpu)) for gpu in gpus] == gpus


def test_a_checkpoint_has_to_hold_the_model_s_tensors(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    assert written_checkpoint(tmp_path) is None and "no checkpoint" in checkpoint_problem(model, None)
    written = build_model(tmp_path / "run" / "checkpoints" / "step-2", seed=1)
    assert checkpoint_problem(model, written_checkpoint(tmp_path)) == ""
    tensors = load_file(written / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, written / "model.safetensors")
    assert "1 tensors" in checkpoint_problem(model, written) and "model.norm.weight" in checkpoint_problem(
        model, written
    )


def test_the_cause_is_the_last_error_of_the_log(tmp_path: Path) -> None:
    child = Child(["trial"], deadline_s=60, log=tmp_path / "log", environment=module(tmp_path, "import nothing_here\n"))
    assert child.run() == []
    assert child.trouble() == "ModuleNotFoundError: No module named 'nothing_here'"


def test_stages_become_findings() -> None:
    stages = [
        Stage("a", "passed", "fine", seconds=2.0),
        Stage("b", "failed", "why", "do"),
        Stage("c", "skipped", "not tried"),
    ]
    found = list(stage_findings(stage for stage in stages))
    assert [finding.level for finding in found] == ["ok", "problem", "note"]
    assert found[0].found == "fine, 2.0 s" and found[1].remedy == "do"


def test_what_a_training_has_to_leave() -> None:
    steps = [
        {"loss": 0.69, "sync/version": 1, "sync/logp_gap_mean": 1e-6},
        {"loss": 0.6, "sync/version": 2, "sync/logp_gap_mean": 2e-6},
    ]
    samples = [{"step": 1, "version": 0}, {"step": 2, "version": 1}]
    assert training_problem(steps) == push_problem(steps, samples, max_gap=1e-3) == ""
    assert "not 2" in training_problem(steps[:1])
    assert "finite" in training_problem([steps[0], {"loss": float("nan")}])
    assert "did not move" in training_problem([steps[0], steps[0]])
    assert "were pushed" in push_problem(steps[:1], samples, max_gap=1e-3)
    assert "weights of the step before" in push_problem(steps, [samples[0], {"step": 2, "version": 0}], max_gap=1e-3)
    assert "at most 1e-06" in push_problem(steps, samples, max_gap=1e-6)
    assert "nan" in push_problem([steps[0], {"sync/version": 2}], samples, max_gap=1e-3)


@pytest.mark.parametrize("hidden", [("vllm", "ray"), ("torch",)])
def test_missing_packages_are_findings_and_not_tracebacks(tmp_path: Path, hidden: tuple[str, ...]) -> None:
    """About 15 s: the whole of doctor, with packages hidden from it and from its children."""
    (tmp_path / "sitecustomize.py").write_text(HIDDEN.format(names=set(hidden)))
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    script = "import sys; from rayalign.doctor import diagnose; sys.exit(min(diagnose(), 100))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    problems = [line for line in lines if line.startswith("✗")]
    assert done.returncode == len(problems) > 0 and lines[-1].startswith(f"{len(problems)} problem")
    for name in hidden:
        assert any(f"No module named '{name}'" in line for line in problems), done.stdout

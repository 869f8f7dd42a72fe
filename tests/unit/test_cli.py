"""The command line itself: help with examples, completion, lists. What verbs do is tested where it is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from rayalign import __version__
from rayalign.algorithms import ALGORITHMS
from rayalign.cli import app
from rayalign.scorers import SCORERS

VERBS = sorted(get_command(app).commands)


def invoke(*arguments):
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "NO_COLOR": "1"})
    return result.exit_code, result.output


def test_every_verb_is_in_the_help():
    code, shown = invoke("--help")
    assert code == 0
    assert all(f" {verb} " in shown for verb in VERBS)
    assert {"train", "evaluate", "plan", "doctor", "report", "submit", "status", "logs", "stop"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_examples_of_itself(verb):
    code, shown = invoke(verb, "--help")
    assert code == 0
    examples = shown[shown.index("Example") :]
    assert f"rayalign {verb}" in examples


@pytest.mark.parametrize("verb", VERBS)
def test_examples_can_be_copied_from_a_terminal_of_80_columns(verb):
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"}).output
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    written = [line.strip() for line in (get_command(app).commands[verb].help or "").splitlines()]
    for example in [line for line in written if line.startswith("rayalign ")]:
        assert " ".join(example.split()) in lines, shown


def test_the_version_is_told():
    assert invoke("--version") == (0, f"rayalign {__version__}\n")


def test_a_terminal_without_unicode_is_no_error():
    command = Path(sys.executable).with_name("rayalign")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([command, "algorithms"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "online_preference" in done.stdout


@pytest.mark.parametrize(("verb", "table"), [("algorithms", ALGORITHMS), ("scorers", SCORERS)])
def test_lists_name_every_part_with_a_line_and_its_paper(verb, table):
    code, shown = invoke(verb)
    assert code == 0
    for name in table:
        (line,) = [line for line in shown.splitlines() if line.startswith(name)]
        assert len(line.split()) > 4, line


def test_help_is_quick_because_it_loads_no_library():
    code = "import sys, rayalign.cli; print(*[m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == ""


@pytest.mark.parametrize(
    ("words", "expected", "unexpected"),
    [
        ("rayalign pl", "plan", "train"),
        ("rayalign train my.yaml train.st", "train.steps=", "train.epochs="),
        ("rayalign train my.yaml engine.tensor", "engine.tensor_parallel=", "engine.count="),
        ("rayalign plan my.yaml algorithm.loss.b", "algorithm.loss.beta=", "algorithm.loss.label_smoothing="),
        ("rayalign plan my.yaml no", "nodes=", "model="),
        ("rayalign evaluate my.yaml mod", "model=", "nodes="),
    ],
)
def test_the_shell_completes_verbs_and_keys(words, expected, unexpected):
    environment = {
        **os.environ,
        "_RAYALIGN_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = Path(sys.executable).with_name("rayalign")
    shown = subprocess.run([command], env=environment, capture_output=True, text=True).stdout.split()
    assert expected in shown
    assert unexpected not in shown

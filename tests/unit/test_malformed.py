"""Mistakes that people make, each with the whole message that they get. See tests/malformed/expected.yaml.

A case: `file` (a config, or a data file that base.yaml or pairs.yaml is tried with), `with` (overrides), and `says`.
{model} stands for the folder of a tiny model, {models} for the folder around it, {here} for tests/malformed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from rayalign.cli import main
from rayalign.config import load_config, save_config
from rayalign.config.habits import GRADIENTS, HABITS, OFFLINE
from rayalign.schema import json_schema

HERE = Path(__file__).resolve().parents[1] / "malformed"
ROOT = HERE.parents[1]
BASES = {
    "data/": ("base.yaml", "data.prompts"),
    "examples/": ("pairs.yaml", "data.examples"),
    "judges/": ("judge.yaml", "scorer.template"),
}
CASES = yaml.safe_load((HERE / "expected.yaml").read_text("utf-8"))
PLACE = re.compile(r"error: (command line|[^:]+(:\d+|, row \d+)?)?(, )?(key [^:]+)?: .+")


def filled(text: str, model: Path) -> str:
    places = {"{model}": model, "{models}": model.parent, "{here}": HERE}
    return re.sub(r"\{(model|models|here)\}", lambda found: str(places[found[0]]), text)


def command(case: dict, model: Path) -> list[str]:
    """The arguments of `rayalign` for a case."""
    file = case["file"]
    base, key = BASES.get("".join(file.partition("/")[:2]), (file, ""))
    data = [f"{key}={file}", f"model.path={model}"] if key else []
    given = [filled(each, model) for each in case.get("with", ())]
    return [case.get("verb", "train"), base, *data, *given]


def run(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the command line, run in this process in tests/malformed."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", ["rayalign", *arguments])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def name(case: dict) -> str:
    return " ".join([case["file"], *case.get("with", ())])


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_message_is_the_expected_one(case, model, monkeypatch, capsys):
    code = run(command(case, model), monkeypatch)
    out, err = capsys.readouterr()
    assert err == filled(case["says"], model)
    assert (code, out) == (2, "")
    assert not (HERE / "runs").exists()


@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_message_has_place_value_rule_and_remedy(case):
    first, *others = case["says"].splitlines()
    assert PLACE.fullmatch(first), first
    assert [line[:10] for line in others] == ["  found:  ", "  rule:   ", "  remedy: "]
    assert all(len(line) <= 200 for line in case["says"].splitlines())
    assert all(line[10:].strip() for line in others)
    assert "Traceback" not in case["says"]


def test_there_are_many_and_each_file_is_used():
    assert len({name(case) for case in CASES}) == len(CASES) >= 60
    files = {str(path.relative_to(HERE)) for path in HERE.glob("*/*") if "__pycache__" not in path.parts}
    assert files - {case["file"] for case in CASES} == {"data/good.jsonl", "examples/good.jsonl"}


@pytest.mark.parametrize("index", [0, len(CASES) - 1])
def test_a_process_says_the_same(index, model):
    case = CASES[index]
    ended = rayalign(*command(case, model))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == filled(case["says"], model)


def test_debug_shows_the_traceback(model):
    case = CASES[0]
    ended = rayalign(*command(case, model), "--debug")
    assert ended.returncode != 0
    assert ended.stderr.startswith("Traceback") and "ConfigError" in ended.stderr


def rayalign(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "rayalign.cli", *arguments], cwd=HERE, env=environment, capture_output=True, text=True
    )


WHOLE = (HERE / "base.yaml").read_bytes()


@pytest.mark.parametrize(
    "raw",
    [
        WHOLE.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + WHOLE,
        WHOLE.rstrip(b"\n"),
        WHOLE.replace(b"steps: 4", b'steps: "4"'),
        WHOLE.replace(b"{prompts: 4}", b"{prompts: &four 4}").replace(b"{steps: 4}", b"{steps: *four}"),
        json.dumps(yaml.safe_load(WHOLE), indent=4).encode(),
    ],
    ids=["crlf", "bom", "no-last-newline", "number-in-quotes", "alias", "json"],
)
def test_what_does_no_harm_is_taken(raw, tmp_path):
    (tmp_path / "c.yaml").write_bytes(raw)
    assert load_config(tmp_path / "c.yaml") == load_config(HERE / "base.yaml")


@pytest.mark.parametrize(
    ("text", "lr"), [("1e-6", 1e-6), ("1E-06", 1e-6), ("1.0e-6", 1e-6), ("5e-1", 0.5), (".5", 0.5)]
)
def test_numbers_are_read_as_people_write_them(text, lr, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{WHOLE.decode()}\noptimizer: {{lr: {text}}}\n")
    assert load_config(tmp_path / "c.yaml").optimizer.lr == lr
    assert load_config(HERE / "base.yaml", [f"optimizer.lr={text}"]).optimizer.lr == lr


@pytest.mark.parametrize(
    "text", ["1e-6", "yes", "on", "010", "089", "2026-01-01", "1:30", "null", "~", "0x1F", "a: b", "é"]
)
def test_a_text_is_the_same_text_when_it_is_saved(text, tmp_path):
    config = load_config(HERE / "base.yaml").model_copy(update={"run_dir": text})
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").run_dir == text
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text("utf-8"))["run_dir"] == text


def test_an_override_of_an_alias_leaves_the_other_key_alone(tmp_path):
    (tmp_path / "c.yaml").write_text(f"{WHOLE.decode()}\nevaluation: &rare {{every: 5}}\ncheckpoint: *rare\n")
    config = load_config(tmp_path / "c.yaml", ["checkpoint.every=7"])
    assert (config.evaluation.every, config.checkpoint.every) == (5, 7)


def test_every_key_of_other_libraries_leads_to_one_of_ours():
    known = set(_keys(json_schema(), json_schema()["$defs"]))
    gradients = {ours for keys in GRADIENTS.values() for ours in keys.values()}
    assert {*HABITS.values(), *OFFLINE, *OFFLINE.values(), *gradients} <= known


def _keys(node, defs, prefix=""):
    node = defs[node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    for form in node.get("anyOf", ()):
        yield from _keys(form, defs, prefix)
    for key, below in node.get("properties", {}).items():
        yield f"{prefix}{key}"
        yield from _keys(below, defs, f"{prefix}{key}.")

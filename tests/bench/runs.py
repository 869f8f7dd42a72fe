"""What benchmarks that keep their results share: whose results a folder holds, and runs of `rayalign` that go on."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def claim(folder: Path, arguments: argparse.Namespace, *names: str) -> None:
    """Keep what results in this folder depend on beside them, and end the program where they are of something else.
    With --table the arguments become those of the results."""
    file = folder / "arguments.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    if arguments.table:
        vars(arguments).update(known)
        return
    now = {name: getattr(arguments, name) for name in names}
    if known and known != now:
        others = ", ".join(
            f"{name}={known.get(name)}, not {now[name]}" for name in names if known.get(name) != now[name]
        )
        sys.exit(f"{folder} has results of {others}: give the same, or another --out")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now))


def run(config: dict[str, Any], run_dir: Path, verb: str = "train") -> bool:
    """One run, in a process of its own; goes on where it was cut short. Whether it ended well: its log is beside."""
    import yaml

    file, begun = run_dir.with_suffix(".yaml"), time.time()
    file.parent.mkdir(parents=True, exist_ok=True)
    resume = (run_dir / "config.yaml").is_file()
    file.write_text(yaml.safe_dump({**config, "run_dir": str(run_dir), "resume": resume}, sort_keys=False))
    command, environment = [sys.executable, "-m", "rayalign.cli", verb, str(file)], {**os.environ}
    try:
        with file.with_suffix(".log").open("a") as log:
            done = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment | {"PYTHONPATH": str(ROOT)}
            )
        return done.returncode == 0
    finally:
        total = 60 * minutes(run_dir) + time.time() - begun
        run_dir.with_suffix(".seconds").write_text(f"{total:.1f}")


def minutes(run_dir: Path) -> float:
    """That a run took, all its parts together."""
    file = run_dir.with_suffix(".seconds")
    return float(file.read_text()) / 60 if file.is_file() else 0.0

"""DeepSpeed starts without a compiler, and whatever an earlier process that was killed has left behind."""

from __future__ import annotations

import os
import subprocess
import sys

JOIN = "from rayalign.learners.deepspeed_config import init_process; init_process(0, 1); print('joined')"


def test_a_start_compiles_nothing_and_waits_for_no_lock_of_a_killed_build(tmp_path):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"  # torch's builds wait for ever while this file is there
    lock.parent.mkdir()
    lock.touch()
    done = subprocess.run(
        [sys.executable, "-c", JOIN],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "joined" in done.stdout, done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [lock]

"""Large data sets are opened without being read into memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import csv, parquet, table

ROWS = 200_000
LIMIT_MIB = 32  # what may stay in memory; 200,000 rows are some 140 MiB of text
CODE = """
import sys
from pathlib import Path
from tests.tiny_models import build_tokenizer
from tests.unit.examples_data import load, one

def own_mib():  # memory that is no file's
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

path, folder, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
import datasets, pyarrow.parquet
tokenizer = build_tokenizer()
one(tokenizer, folder, {"prompt": "q", "chosen": "x", "rejected": "y"}, max_tokens=4096)
before = own_mib()
loaded = load(tokenizer, path, held_out=0.2, max_tokens=4096)
assert (loaded.rows, len(loaded.held_out)) == (rows * 4 // 5, rows // 5)
groups = loaded.step(0, 64) + loaded.step(10**6, 64) + list(loaded.held_out[:64])
assert len({group.prompt.index for group in groups}) > 180
print("grown by", own_mib() - before)
"""


@pytest.mark.parametrize(("suffix", "rows"), [("jsonl", ROWS), ("csv", ROWS // 2), ("parquet", ROWS // 2)])
def test_hundreds_of_thousands_of_rows_stay_in_their_file(tmp_path: Path, suffix: str, rows: int) -> None:
    path = tmp_path / f"a.{suffix}"
    texts = {"prompt": [f"q{i} {'film ' * 40}" for i in range(rows)]}
    texts |= {"chosen": ["good " * 40] * rows, "rejected": ["bad " * 60] * rows}
    if suffix == "jsonl":
        with path.open("w") as file:
            file.writelines(
                json.dumps(dict(zip(texts, row, strict=True))) + "\n" for row in zip(*texts.values(), strict=True)
            )
        assert path.stat().st_size > 4 * LIMIT_MIB << 20
    else:
        (csv.write_csv if suffix == "csv" else parquet.write_table)(table(texts), path)
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PATH": "", "HF_HOME": str(tmp_path / "hf")}
    ended = subprocess.run(
        [sys.executable, "-c", CODE, str(path), str(tmp_path), str(rows)],
        capture_output=True, text=True, timeout=280, env=environment,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout.split()[-1]) < LIMIT_MIB

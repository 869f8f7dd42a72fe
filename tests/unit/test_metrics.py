"""Records of a run survive what models write, kills, and resumes."""

from __future__ import annotations

import pytest

from rayalign.errors import DataError
from rayalign.metrics import Clock, Recorder, read_records, records


def test_what_a_model_writes_does_not_cut_a_record(tmp_path):
    recorder = Recorder(tmp_path, [], 0)
    for step in (1, 2, 3):
        recorder.evaluation(step, {"metrics": {}, "text": "a\u2028b\u0085c\nd"})
    recorder.close()
    assert [r["step"] for r in read_records(tmp_path / "evaluations.jsonl")] == [1, 2, 3]
    Recorder(tmp_path, [], 2).close()
    assert [r["step"] for r in read_records(tmp_path / "evaluations.jsonl")] == [1, 2]


def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_records(path) == [{"step": 1}]


@pytest.mark.parametrize("damaged", [b'{"step"', b"\xff", b"\0\0\0\0", b"", b"7"])
def test_a_damaged_record_has_a_place(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    with pytest.raises(DataError, match="metrics.jsonl:2: a record of this run is damaged") as caught:
        read_records(path)
    assert caught.value.value and caught.value.rule and caught.value.remedy
    found = records(path)
    assert next(found) == {"step": 1}


def test_a_clock_adds_up():
    clock = Clock()
    for _ in range(2):
        with clock("update"):
            pass
    times = clock.stop()
    assert times.keys() == {"time/update_s", "time/step_s"}
    assert 0 < times["time/update_s"] <= times["time/step_s"]

"""Every run leaves a report, however it ends; one that cannot be written is no failure."""

from __future__ import annotations

import pytest

from tests.parts import PowerCut


def test_a_run_ends_with_a_report(train):
    result = train(evaluation__prompts=2, train__steps=2)
    page = (result.run_dir / "report.html").read_text()
    assert "write one sentence about film" in page  # a prompt, with what was sampled for it


def test_a_run_that_fails_leaves_a_report_of_what_it_did(train, tmp_path):
    with pytest.raises(PowerCut):
        train(train__steps=4, trackers=[{"name": "tests.parts:Stop", "step": 3}])
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_report_that_cannot_be_written_is_no_failure(train, tmp_path, capsys):
    train(train__steps=1, checkpoint__every=1)
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run" / "report.html" / "report.html").mkdir(parents=True)
    assert train(train__steps=2, resume=True).step == 2
    assert "no report was written: " in capsys.readouterr().err

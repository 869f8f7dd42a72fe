"""The line that a step leaves on the console."""

from __future__ import annotations

import pytest

from rayalign.console import Console

ALWAYS = {"completion/length_mean": 8.0, "time/step_s": 1.25}


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"loss": 0.5, "critic/loss": 0.25}, "loss 0.5000"),
        ({"critic/loss": 0.25, "critic/lr": 1e-5}, "critic only, its loss 0.2500"),
        ({"pairs/dropped": 4.0}, "skipped: nothing to learn from"),
    ],
)
def test_what_a_step_learned(metrics, says, capsys):
    Console().step(3, {**ALWAYS, **metrics})
    assert capsys.readouterr().err == f"step 3/0  {says}  8 tokens  1.2 s\n"


def test_a_shard_learns_nothing(capsys):
    Console().step(3, ALWAYS, learns=False)
    assert capsys.readouterr().err == "shard 3/0  8 tokens  1.2 s\n"

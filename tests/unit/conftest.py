"""What the tests of servers share."""

from __future__ import annotations

import pytest

from rayalign.scorers.server import ServerAsker


@pytest.fixture
def asker(tmp_path):
    """An asker of a service, with a cache of the test's own; closed at the end."""
    made = []

    def make(url: str, **settings):
        usual = {"model": "judge", "cache": str(tmp_path / "answers.sqlite"), "backoff_s": 0.001, "timeout_s": 30.0}
        usual["patience_s"] = 30.0
        config = ServerAsker(url=url, **{**usual, **settings})
        made.append(config.start())
        return made[-1]

    yield make
    for each in made:
        each.close()

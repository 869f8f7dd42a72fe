"""A comparison on Ray is the one in this process: engines and scorers come one after the other, learners not at all."""

from __future__ import annotations

import yaml

from rayalign.compare import run_comparison
from tests.parts import tiny_config
from tests.ray.conftest import LIGHT
from tests.tiny_models import build_tiny_llama


def test_actors_give_the_same_comparison(model, tmp_path, shared):
    other = build_tiny_llama(tmp_path / "other", seed=3)
    found = {}
    for name, placed in (("here", {}), ("ray", LIGHT)):
        config = tiny_config(tmp_path, model, evaluation={"prompts": 4, "samples": 2}, **placed)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        found[name] = run_comparison(other, model, config=tmp_path / f"{name}.yaml", out=tmp_path / name)
    here, there = found["here"], found["ray"]
    assert [pair.texts for pair in there.pairs] == [pair.texts for pair in here.pairs]
    assert there.verdicts.record() == here.verdicts.record()
    started = [path.name for path in (tmp_path / "ray" / "log").iterdir()]
    assert any(name.startswith("engine") for name in started) and not any(n.startswith("learner") for n in started)

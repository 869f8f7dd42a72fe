"""The configs that bring their own rows: the algorithm finds in them what it learns from."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayalign.build import examples_for, load_tokenizer
from rayalign.config import load_config

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {path: path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))}
LOCAL = [path for path, text in SHIPPED.items() if "examples: configs/" in text and "\nrounds:\n" not in text]


@pytest.mark.parametrize("path", LOCAL, ids=lambda path: path.stem)
def test_the_rows_of_a_step_are_learned_from(path, model, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path, [f"model.path={model}", "data.chat_template=false"])
    rows = examples_for(config, load_tokenizer(config))
    groups = rows.step(0, config.rollout.prompts)
    examples, metrics = config.algorithm.for_held_out().examples(groups)  # of self-play, before an opponent answers
    assert len(groups) == config.rollout.prompts and examples
    kept, dropped = (sum(n for name, n in metrics.items() if name.endswith(end)) for end in ("/kept", "/dropped"))
    assert kept > 4 * dropped, metrics  # some ranked answers are equally good
    assert rows.counts["held_out"] > 0 and rows.counts["skipped"] == 0


def test_the_rated_pairs_have_probabilities_and_margins(model, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/preference_soft.yaml", [f"model.path={model}", "data.chat_template=false"])
    groups = examples_for(config, load_tokenizer(config)).step(0, 50)
    probabilities = [group.preferences[0][1] for group in groups]
    assert 0.5 < min(probabilities) < 0.6 and max(probabilities) > 0.9
    assert all(0 < group.prompt.extra["margin"] < 2 for group in groups)

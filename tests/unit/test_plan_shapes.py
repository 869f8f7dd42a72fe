"""Parameters counted from config.json alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayalign.errors import ConfigError
from rayalign.plan.shapes import read_shape

SHAPES = Path(__file__).parent / "shapes"


@pytest.mark.parametrize(
    ("name", "parameters", "tied"),
    [
        ("SmolLM2-135M-Instruct", 134_515_008, True),
        ("Qwen2.5-1.5B-Instruct", 1_543_714_304, True),
        ("Llama-3.1-8B", 8_030_261_248, False),
        ("Llama-3.1-70B", 70_553_706_496, False),
        ("llava-1.5-7b-hf", 7_063_427_072, False),
    ],
)
def test_parameters_are_exact_without_weights(name, parameters, tied):
    assert [path.name for path in (SHAPES / name).iterdir()] == ["config.json"]
    shape = read_shape(str(SHAPES / name))
    dtype = "float16" if name.startswith("llava") else "bfloat16"
    assert (shape.parameters, shape.tied, shape.dtype) == (parameters, tied, dtype)


def test_the_shape_is_that_of_the_config(model):
    shape = read_shape(str(model))
    assert (shape.layers, shape.hidden, shape.intermediate, shape.vocabulary) == (2, 64, 128, 160)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.largest) == (4, 2, 32, 160 * 64)


def test_a_hub_id_that_is_not_at_hand_is_said_without_asking_the_hub(capfd):
    with pytest.raises(ConfigError) as caught:
        read_shape("nobody/no-such-model")
    error = caught.value
    assert error.value == "nobody/no-such-model" and "config.json" in error.rule
    assert error.remedy == "give a folder with config.json (weights need not be there)"
    assert capfd.readouterr() == ("", "")


def test_what_is_no_language_model_is_said(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        read_shape(str(tmp_path))
    with pytest.raises(ConfigError, match="holds no model"):
        (tmp_path / "empty").mkdir()
        read_shape(str(tmp_path / "empty"))

"""rayalign: preference alignment of language models on a Ray cluster.

from rayalign import load_config, run_training, run_evaluation

result = run_training(load_config("configs/demo.yaml", ["train.steps=10"]))
run_evaluation(load_config("configs/demo.yaml"), model=result.run_dir / "checkpoints/step-10")
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_config", "run_comparison", "run_evaluation", "run_training"]


def __getattr__(name: str) -> Any:
    """The entry points, imported when they are asked for: `import rayalign` stays light."""
    if name == "load_config":
        from rayalign.config import load_config

        return load_config
    if name in ("run_evaluation", "run_training"):
        from rayalign import api

        return getattr(api, name)
    if name == "run_comparison":
        from rayalign.compare import run_comparison

        return run_comparison
    raise AttributeError(f"module 'rayalign' has no attribute {name!r}")

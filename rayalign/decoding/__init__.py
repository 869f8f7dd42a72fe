"""How completions are drawn from next-token distributions; the names that `sampling:` in a config knows."""

from __future__ import annotations

SAMPLINGS = {
    "sample": "rayalign.decoding.config:SamplingConfig",
    "diverse_beam": "rayalign.decoding.config:DiverseBeamConfig",
}

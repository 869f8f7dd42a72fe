"""Who holds weights: the policy that is trained, and the frozen models beside it.

A config record of this table has `build(...)`, which makes one rank of the learner that it describes.
"""

from __future__ import annotations

LEARNERS = {
    "torch": "rayalign.learners.torch:TorchLearnerConfig",
    "deepspeed": "rayalign.learners.deepspeed:DeepSpeedLearnerConfig",
}

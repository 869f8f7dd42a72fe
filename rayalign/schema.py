"""The whole of a config file as frozen records. What a key means stands in its description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from rayalign.algorithms import ALGORITHMS
from rayalign.checkpoint import CheckpointConfig
from rayalign.data.prompts import DataConfig
from rayalign.engines import ENGINES
from rayalign.evaluate import EvaluationConfig
from rayalign.learners import LEARNERS
from rayalign.learners.settings import OptimizerConfig
from rayalign.record import Record
from rayalign.registry import tagged
from rayalign.rollouts import RolloutConfig
from rayalign.run import TrainConfig
from rayalign.runtime.placement import PLACEMENTS
from rayalign.scorers import SCORERS
from rayalign.sync.handshake import SyncConfig
from rayalign.trackers import TRACKERS
from rayalign.types import Sampling

AnyAlgorithm = Annotated[SerializeAsAny[Record], tagged("algorithm", ALGORITHMS, "examples")]
AnyEngine = Annotated[SerializeAsAny[Record], tagged("engine", ENGINES, "build")]
AnyLearner = Annotated[SerializeAsAny[Record], tagged("learner", LEARNERS, "build")]
AnyScorer = Annotated[SerializeAsAny[Record], tagged("scorer", SCORERS, "start")]
AnyPlacement = Annotated[SerializeAsAny[Record], tagged("placement", PLACEMENTS, "model_dump")]
AnyTracker = Annotated[SerializeAsAny[Record], tagged("tracker", TRACKERS, "start")]


class ModelConfig(Record):
    """The model to align. The reference starts as the same."""

    path: str = Field(description="folder of a Hugging Face checkpoint, or a hub id")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of learner and engine unless they say else")
    trust_remote_code: bool = Field(False, description="run code that the checkpoint brings")


class SamplingConfig(Record):
    """How completions are sampled."""

    max_tokens: int = Field(64, ge=1, description="longest completion, in tokens")
    min_tokens: int = Field(0, ge=0, description="no end token before this many tokens")
    temperature: float = Field(1.0, ge=0, description="of the softmax; 0 is greedy. The learner applies it too")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1 is off")
    top_k: int = Field(0, ge=0, description="0 is off")

    @model_validator(mode="after")
    def _room(self) -> SamplingConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens may not be above max_tokens")
        return self

    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.top_k, self.min_tokens)


class Config(Record):
    """One run."""

    model: ModelConfig
    algorithm: AnyAlgorithm
    data: DataConfig
    scorer: AnyScorer
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    engine: AnyEngine = Field({"name": "vllm"})
    learner: AnyLearner = Field({"name": "deepspeed"})
    optimizer: OptimizerConfig = OptimizerConfig()
    placement: AnyPlacement = Field({"name": "ray"})
    sync: SyncConfig = SyncConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: tuple[AnyTracker, ...] = Field(({"name": "tensorboard"},), description="where metrics go besides files")
    run_dir: str | None = Field(None, description="folder of the run; default runs/NAME-DATE-TIME")
    resume: bool = Field(False, description="go on from the last checkpoint in run_dir")
    seed: int = Field(0, ge=0, lt=2**31, description="of everything random")

    def to_dict(self) -> dict[str, Any]:
        """As YAML would hold it, defaults included."""
        return self.model_dump(mode="json", by_alias=True)

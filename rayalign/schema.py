"""The whole of a config file as frozen records. What a key means stands in its description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from rayalign.algorithms import ALGORITHMS
from rayalign.engines import ENGINES
from rayalign.learners import LEARNERS
from rayalign.learners.base import OptimizerConfig
from rayalign.record import Record
from rayalign.registry import tagged
from rayalign.runtime.placement import PLACEMENTS
from rayalign.scorers import SCORERS
from rayalign.trackers import TRACKERS
from rayalign.types import Sampling

AnyAlgorithm = Annotated[SerializeAsAny[Record], tagged("algorithm", ALGORITHMS)]
AnyEngine = Annotated[SerializeAsAny[Record], tagged("engine", ENGINES)]
AnyLearner = Annotated[SerializeAsAny[Record], tagged("learner", LEARNERS)]
AnyScorer = Annotated[SerializeAsAny[Record], tagged("scorer", SCORERS)]
AnyPlacement = Annotated[SerializeAsAny[Record], tagged("placement", PLACEMENTS)]
AnyTracker = Annotated[SerializeAsAny[Record], tagged("tracker", TRACKERS)]


class ModelConfig(Record):
    """The model to align. The reference starts as the same."""

    path: str = Field(description="folder of a Hugging Face checkpoint, or a hub id")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of learner and engine unless they say else")
    trust_remote_code: bool = Field(False, description="run code that the checkpoint brings")


class DataConfig(Record):
    """Where the prompts come from."""

    prompts: str = Field(description="a .jsonl, .json, .csv or .parquet file, or a hub id")
    split: str = Field("train", description="of a hub data set")
    prompt_column: str = Field("prompt", description="column with a text, or with chat messages")
    system: str | None = Field(None, description="system message put before every prompt")
    chat_template: bool = Field(True, description="apply the model's chat template (off: continue the text as it is)")
    held_out: float = Field(0.2, ge=0, lt=1, description="share of the prompts kept for evaluation")
    long_prompts: Literal["skip", "refuse"] = Field(
        "skip", description="prompts that leave no room in the context: skip and count them, or refuse the file"
    )
    shuffle_seed: int = Field(0, ge=0, description="of the split into training and held-out prompts")


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


class RolloutConfig(Record):
    """How many prompts are sampled, and how fresh the samples are."""

    prompts: int = Field(8, ge=1, description="prompts of one rollout; one rollout feeds one training step")
    depth: int = Field(0, ge=0, le=8, description="0: on-policy; d: rollout t is sampled by the weights of step t−d")
    resample_every: int = Field(1, ge=1, description="training steps that use one rollout before the next is sampled")
    monitor: int = Field(4, ge=0, description="first completions of a rollout on which KL and the log-prob gap are seen")
    max_empty_steps: int = Field(5, ge=1, description="stop after so many steps in a row without a training example")


class TrainConfig(Record):
    """The length of the run, and the use of one rollout."""

    steps: int = Field(100, ge=1, description="training steps")
    epochs: int = Field(1, ge=1, description="passes over the examples of one step")
    minibatches: int = Field(1, ge=1, description="optimiser steps in one pass")


class SyncConfig(Record):
    """How a push of weights is verified."""

    max_gap: float | None = Field(
        None, gt=0, description="largest mean log-prob gap on the probe after a push; default by dtype (1e-3 or 0.3)"
    )
    probe_prompts: int = Field(2, ge=1, description="prompts whose log-probs are compared after each push")


class EvaluationConfig(Record):
    """Held-out prompts, sampled with the same seeds each time."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: before and after training only")
    prompts: int = Field(40, ge=0, description="held-out prompts; 0: never evaluate")
    samples: int = Field(4, ge=1, description="completions for each of them")
    show: int = Field(3, ge=0, description="prompts shown before and after")


class CheckpointConfig(Record):
    """Checkpoints: policy in Hugging Face format, and all that a resumed run needs."""

    every: int = Field(50, ge=0, description="steps between checkpoints; 0: at the end only")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")


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

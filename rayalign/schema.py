"""The whole of a config file as frozen records. What a key means stands in its description."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SerializeAsAny, model_validator
from pydantic.json_schema import GenerateJsonSchema

from rayalign.algorithms import ALGORITHMS
from rayalign.checkpoint import CheckpointConfig
from rayalign.data.prompts import DataConfig
from rayalign.decoding import SAMPLINGS
from rayalign.engines import ENGINES
from rayalign.evaluate import EvaluationConfig
from rayalign.gradient_rules import check_course_of_critic, check_ratios, check_scores, check_steps
from rayalign.learners import LEARNERS
from rayalign.learners.settings import LoraConfig, OptimizerConfig
from rayalign.protocols import needs_reference
from rayalign.record import Record, Unfit
from rayalign.registry import Tagged
from rayalign.rollouts import RolloutConfig
from rayalign.run import TrainConfig
from rayalign.runtime.placement import PLACEMENTS
from rayalign.scorers import SCORERS
from rayalign.sync.handshake import SyncConfig
from rayalign.trackers import TRACKERS

ROUNDS_KEYS = {
    "rounds": "stages that run one after the other: each has a name, and the keys in which it differs from the others; "
    '"stage:NAME" stands for the weights, or the rows, of one that came before',
    "repeat": "how often the stages run, one after the other; each time from the newest policy",
}

AnyAlgorithm = Annotated[SerializeAsAny[Record], Tagged("algorithm", ALGORITHMS, "examples")]
AnySampling = Annotated[SerializeAsAny[Record], Tagged("sampling", SAMPLINGS, "sampling", "sample")]
AnyEngine = Annotated[SerializeAsAny[Record], Tagged("engine", ENGINES, "build", "vllm")]
AnyLearner = Annotated[SerializeAsAny[Record], Tagged("learner", LEARNERS, "build", "deepspeed")]
AnyScorer = Annotated[SerializeAsAny[Record], Tagged("scorer", SCORERS, "start")]
AnyPlacement = Annotated[SerializeAsAny[Record], Tagged("placement", PLACEMENTS, "model_dump", "ray")]
AnyTracker = Annotated[SerializeAsAny[Record], Tagged("tracker", TRACKERS, "start")]


class ModelConfig(Record):
    """The model to align. The reference starts as the same."""

    path: str = Field(description="folder of a Hugging Face checkpoint, or a hub id", examples=["/models/my-model"])
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of learner and engine unless they say else")
    trust_remote_code: bool = Field(False, description="run code that the checkpoint brings")
    lora: LoraConfig | None = Field(
        None, description="train adapters of low rank instead of all weights", examples=[{"rank": 16, "alpha": 32}]
    )


class Config(Record):
    """One run of rayalign."""

    model: ModelConfig = Field(
        description="the model that is aligned, and what the reference starts as",
        examples=[{"path": "/models/my-model"}],
    )
    algorithm: AnyAlgorithm = Field(
        description="what is asked of the engines, and the loss", examples=[{"name": "online_preference"}]
    )
    data: DataConfig = Field(
        description="where prompts, and rows to learn from, come from", examples=[{"prompts": "my_prompts.jsonl"}]
    )
    scorer: AnyScorer | None = Field(
        None,
        description="what tells good completions from bad ones, where completions are sampled",
        examples=[{"name": "rules", "rule": "vader"}],
    )
    sampling: AnySampling = Field({"name": "sample"}, description="how completions are sampled, or searched")
    rollout: RolloutConfig = Field(RolloutConfig(), description="how many prompts a step, and how fresh their samples")
    train: TrainConfig = Field(TrainConfig(), description="the length of the run, and the use of one rollout")
    engine: AnyEngine = Field({"name": "vllm"}, description="what samples completions")
    learner: AnyLearner = Field({"name": "deepspeed"}, description="what trains the policy")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW and its learning rate")
    placement: AnyPlacement = Field({"name": "ray"}, description="where engines, scorers and learners run")
    sync: SyncConfig = Field(SyncConfig(), description="how a push of weights is verified")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="how often held-out prompts are sampled")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="how often checkpoints are written and kept")
    trackers: tuple[AnyTracker, ...] = Field(({"name": "tensorboard"},), description="where metrics go besides files")
    run_dir: str | None = Field(None, description="folder of the run; default runs/NAME-DATE-TIME")
    resume: bool = Field(False, description="go on from the last checkpoint in run_dir")
    seed: int = Field(0, ge=0, lt=2**31, description="of everything random")

    @model_validator(mode="after")
    def _whole(self) -> Config:
        samples, rows = bool(self.algorithm.request(self.sampling.sampling())), self.algorithm.rows
        name = self.algorithm.name
        if samples and not self.data.prompts:
            raise Unfit(
                "there are no prompts to sample completions for",
                key="data.prompts",
                rule=f"{name} learns from samples of its own",
                remedy="set data.prompts to a file with a column prompt",
            )
        if not samples and not self.data.examples:
            raise Unfit(
                "there is nothing to learn from",
                key="data.examples",
                rule=f"{name} learns from a data set with rows of the kind {' or '.join(rows)}",
                remedy="set data.examples to a file, say my_pairs.jsonl",
            )
        if self.data.prompts and self.algorithm.network != "causal":
            raise Unfit(
                "a model that gives scores or classes writes no completions",
                key="data.prompts",
                rule=f"{name} is evaluated on held-out rows of data.examples",
                remedy="take data.prompts out",
            )
        if self.data.prompts and self.scorer is None and not getattr(self.algorithm, "unscored", False):
            raise Unfit(
                "nothing scores the completions of the prompts",
                key="scorer",
                rule="a scorer where data.prompts are sampled, in training or in evaluations",
                remedy="set scorer: {name: rules, rule: vader}, say"
                + ("" if samples else "; or take data.prompts out"),
            )
        if self.data.prompts and getattr(getattr(self.algorithm, "reference", None), "cached", False):
            raise Unfit(
                "a cached reference knows nothing of samples",
                key="data.prompts",
                rule="a live reference where completions are sampled: KL is measured on them",
                remedy="set algorithm.reference.cached=false, or take data.prompts out",
            )
        return self

    @model_validator(mode="after")
    def _searched(self) -> Config:
        """A search gives as many completions as it has beams."""
        search, asked = self.sampling.sampling().search, self.algorithm.request(self.sampling.sampling())
        if search is None:
            return self
        if asked and len(asked) != search.beams:
            raise Unfit(
                "the search gives another number of completions than the algorithm takes",
                key="sampling.beams",
                rule=f"algorithm.samples={len(asked)}, or samples as beams={search.beams}",
                remedy=f"set algorithm.samples={search.beams}, or beams={len(asked)} with groups that divide it",
            )
        if self.self_play:
            raise Unfit(
                f"{self.algorithm.name} takes one answer for each row, drawn from the policy",
                key="sampling.name",
                rule=f"sample with {self.algorithm.name}",
                remedy="take sampling.name out, and the keys of the search",
            )
        return self

    @model_validator(mode="after")
    def _what_is_learned_from(self) -> Config:
        name, passes = self.algorithm.name, self.train.epochs
        if self.algorithm.request(self.sampling.sampling()):
            if self.data.examples:
                raise Unfit(
                    "nothing would be learned from these rows",
                    key="data.examples",
                    rule=f"{name} learns from samples of its own here"
                    + (f", {self.algorithm.samples} a prompt" if hasattr(self.algorithm, "samples") else ""),
                    remedy="take data.examples out, or use an algorithm that learns from a data set, as preference "
                    "does (cringe and kto with samples: 0)",
                )
            return self
        if passes > 1:
            raise Unfit(
                "a step's rows would be learned from several times in a row",
                key="train.epochs",
                rule=f"1 with data.examples: each step of {name} takes the next rollout.prompts rows, pass after pass",
                remedy=f"set algorithm.epochs={passes}"
                if self.self_play
                else f"for {passes} passes over the data raise train.steps to {passes} × rows ÷ rollout.prompts",
            )
        rollout = self.rollout
        for key, usual in (("depth", 0), ("resample_every", 1), ("at_once", None)):
            if getattr(rollout, key) != usual:
                raise Unfit(
                    "there are no samples that could be old, or used again",
                    key=f"rollout.{key}",
                    rule=f"not set where {name} learns from data.examples",
                    remedy=f"take rollout.{key} out",
                )
        return self

    @model_validator(mode="after")
    def _ratios(self) -> Config:
        """Of policy gradients, whose ratios are of whole distributions, and of the policy that sampled."""
        if getattr(self.algorithm, "whole_distribution", False):
            check_ratios(self)
            check_scores(self)
            check_steps(self)
        if getattr(self.algorithm, "critic", None) is not None:
            check_course_of_critic(self)
        return self

    @model_validator(mode="after")
    def _course(self) -> Config:
        """Of self-play: the rows can be counted, and the run is as long as its iterations."""
        if not self.self_play:
            return self
        name = self.algorithm.name
        if self.data.prompts:
            raise Unfit(
                f"{name} has its prompts from the rows that it learns from",
                key="data.prompts",
                rule="not set: in evaluations the prompts of held-out rows are answered",
                remedy="take data.prompts out",
            )
        if self.scorer is not None and self.evaluation.prompts and not self.evaluation.before:
            raise Unfit(
                "the win rate is against what the first model answers before the first step",
                key="evaluation.before",
                rule=f"true with {name} and a scorer",
                remedy="take evaluation.before out, or leave the scorer out",
            )
        for source in self.data.examples:
            if source.stream or source.weight is not None:
                raise Unfit(
                    f"{name} answers each row once an iteration",
                    key="data.examples",
                    rule="data sets without stream and weight, so that all rows are known",
                    remedy=f"take {'stream' if source.stream else 'weight'} out; limit reads only the first rows",
                )
        total, given = self.algorithm.total_steps, "steps" in self.train.model_fields_set
        if total is not None and given and self.train.steps != total:
            raise Unfit(
                "a run ends where its iterations end",
                key="train.steps",
                rule=f"{total}, the steps of {self.algorithm.iterations} iterations, or not set",
                remedy="take train.steps out, and set algorithm.steps, the steps of an iteration",
            )
        if total is not None:
            object.__setattr__(self, "train", self.train.model_copy(update={"steps": total}))
        return self

    @model_validator(mode="after")
    def _lent_engine(self) -> Config:
        if not self.lends_engine:
            return self
        if self.self_play:
            raise Unfit(
                "the judge would be the policy itself: the reference, which judges, is replaced by it",
                key="scorer.ask",
                rule=f"a judge that stays the same, with {self.algorithm.name}",
                remedy="give the judge an engine: ask: {name: engine, model: …}",
            )
        if self.rollout.depth:
            raise Unfit(
                "the policy's engine cannot sample ahead while it judges",
                key="rollout.depth",
                rule="0 with a scorer that asks the policy's engine",
                remedy="set rollout.depth=0, or give the judge an engine: ask: {name: engine, model: …}",
            )
        if not self.samples:
            raise Unfit(
                "there is no engine that could be asked",
                key="scorer.ask",
                rule="an engine of the judge's own where nothing is sampled",
                remedy="set scorer.ask: {name: engine, model: /models/my-judge}",
            )
        if self.learns and not needs_reference(self.algorithm):
            raise Unfit(
                "there is no reference whose weights could judge",
                key="scorer.ask",
                rule="an algorithm with a reference, as online_preference with loss: dpo",
                remedy="use such a loss, or give the judge an engine: ask: {name: engine, model: …}",
            )
        return self

    def critic_optimizer(self) -> OptimizerConfig:
        """The policy's, but for what the algorithm says of its critic's."""
        return OptimizerConfig(**{**self.optimizer.model_dump(), **self.algorithm.critic.optimizer})

    @property
    def dtypes(self) -> set[str]:
        """That learner and engine compute in."""
        return {self.engine.dtype or self.model.dtype, self.learner.dtype or self.model.dtype}

    @property
    def samples(self) -> bool:
        """Whether completions are sampled at all, in training or in evaluations."""
        return self.data.prompts is not None or self.self_play

    @property
    def self_play(self) -> bool:
        """Whether the policy answers the prompts of the data's rows."""
        return getattr(self.algorithm, "self_play", False)

    @property
    def scored(self) -> bool:
        """Whether a scorer is asked: of samples, or of answers of a data set that are to be labelled."""
        return self.scorer is not None and (self.samples or not self.learns)

    @property
    def lends_engine(self) -> bool:
        """Whether the scorer asks the policy's engine, between samplings, and lives with the driver."""
        return self.scored and getattr(self.scorer, "borrows_engine", False)

    @property
    def scorer_actors(self) -> int:
        return self.scorer.count if self.scored and not self.lends_engine else 0

    @property
    def learns(self) -> bool:
        """Whether a policy is trained, or a data set written."""
        return getattr(self.algorithm, "learns", True)

    def to_dict(self) -> dict[str, Any]:
        """As YAML would hold it, defaults included."""
        return self.model_dump(mode="json", by_alias=True)


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a config file, for editors: keys, descriptions, defaults, and every name
    that selects a part. It allows what `load_config` allows, but for rules that join several keys, numbers in
    quotes, the keys of parts from outside, which it cannot know, and what stands below the keys of a stage."""
    whole = {"$schema": GenerateJsonSchema.schema_dialect, **record_schema(Config), "title": "rayalign config"}
    names = {"name": {"type": "string", "description": "of the stage, and of its folder"}}
    below = {key: {"description": each["description"]} for key, each in whole["properties"].items()}
    stage = {"type": "object", "required": ["name"], "properties": {**names, **below}, "additionalProperties": False}
    rounds = {"type": "array", "minItems": 1, "items": stage, "description": ROUNDS_KEYS["rounds"]}
    repeat = {"type": "integer", "minimum": 1, "default": 1, "description": ROUNDS_KEYS["repeat"]}
    whole["properties"] = {**whole["properties"], "rounds": rounds, "repeat": repeat}
    whole["anyOf"] = [{"required": ["rounds"]}, {"required": whole.pop("required")}]
    return whole


@cache
def record_schema(record: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of one record, its keys as a config spells them."""
    return record.model_json_schema(schema_generator=_Untitled)


class _Untitled(GenerateJsonSchema):
    """Without a title for each key, which would repeat the key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

"""What a learner is told: the optimiser, the settings that all learners share, and the whole order for one role."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rayalign.learners.roles import RoleSettings
from rayalign.record import Record, Unfit

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Record):
    """AdamW (Loshchilov 2019) and its learning rate."""

    lr: float = Field(1e-6, gt=0, description="learning rate after warm-up")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decay of the first and second moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="the rate after warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps in which the rate rises linearly")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where linear and cosine end, as a share of lr")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of a step counted from 0. Never 0 before the end: warm-up starts at lr / warmup_steps.

    Raises:
        ValueError: a negative step.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    share = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


class LoraConfig(Record):
    """LoRA (Hu et al. 2021): frozen weights W, and W + alpha/rank · B·A with small trained matrices A and B beside
    them. Without dropout: log-probs of rollout, reference and policy have to be one function of the weights."""

    rank: int = Field(16, ge=1, description="rows of A and columns of B")
    alpha: float = Field(32.0, gt=0, description="B·A counts alpha/rank times")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="layers with an adapter: all linear ones below the head, or names such as [q_proj]"
    )
    merge: bool = Field(
        True,
        description="checkpoints hold the model with its adapter merged, as vllm serve and transformers load it; "
        "else the adapter alone, in peft's format. adapter/ has it either way",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_dropout(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("dropout") == 0:
            return {key: value for key, value in data.items() if key != "dropout"}
        if isinstance(data, Mapping) and "dropout" in data:
            raise Unfit(
                "adapters have no dropout here",
                key="dropout",
                rule="0: log-probs of rollout, reference and policy have to be one function of the weights",
                remedy="take dropout out; a lower rank or fewer targets regularise too",
            )
        return data

    @model_validator(mode="after")
    def _some_target(self) -> LoraConfig:
        if not self.targets:
            raise Unfit(
                "there is nothing to train",
                key="targets",
                rule="names of linear layers, or all-linear",
                remedy="set targets: all-linear, or take lora out",
            )
        return self


class LearnerSettings(Record):
    """What all learners share."""

    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the forward and backward pass and of pushed weights; none: the model's own"
    )
    micro_batch_tokens: int = Field(8192, ge=1, description="tokens of a micro-batch on one rank, padding included")
    packing: bool = Field(
        False, description="sequences behind one another instead of padded rows; micro_batch_tokens are then real ones"
    )
    logprob_chunk: int = Field(2048, ge=1, description="completion positions whose logits are held at a time")
    gradient_checkpointing: bool = Field(False, description="recompute layers in the backward pass to save memory")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="attention implementation of transformers")
    train_vision: bool = Field(False, description="of a model that sees images: train the part that sees them as well")
    threads: int | None = Field(None, ge=1, description="CPU threads of one rank; none: its share")
    deadline_s: float = Field(1800.0, gt=0, description="seconds after which a call to this learner counts as lost")
    roles: Mapping[str, RoleSettings] = Field(
        {},
        description="by role (critic, reference): in what it differs from the policy, and whether it lives apart",
        examples=[{"critic": {"ranks": 2}}],
    )

    def of_role(self, role: str) -> Self:
        """These settings with what the role has of its own."""
        own = self.roles.get(role)
        return self.model_copy(update={**(own.changes() if own is not None else {}), "roles": {}})

    def is_apart(self, role: str) -> bool:
        """Whether the role lives in a group of actors of its own."""
        return role in self.roles and self.roles[role].lives_apart

    @model_validator(mode="after")
    def _policys_own(self) -> Self:
        if "policy" in self.roles:
            raise Unfit(
                "the policy's settings are the learner's",
                key="roles",
                rule="roles other than the policy: critic, reference",
                remedy="write its settings under learner, and take roles.policy out",
            )
        return self

    @model_validator(mode="after")
    def _packable(self) -> LearnerSettings:
        if self.packing and self.attention != "sdpa":
            raise Unfit(
                "packed rows have their own attention",
                key="attention",
                rule="sdpa, which packed rows use a sequence at a time",
                remedy="set attention=sdpa, or packing=false",
            )
        return self


@dataclass(frozen=True)
class LearnerSpec:
    """Everything one role is built from; picklable.

    Attributes:
        role: "policy", "reference", … the key under which it registers beside its peers.
        model: path of a Hugging Face checkpoint.
        dtype: "float32" or "bfloat16"; None is `settings.dtype`, and failing that the checkpoint's own.
        trainable: whether it has an optimiser.
        temperature: of the rollouts; log-probs are those of softmax(logits / temperature).
        total_steps: of the run, for the learning-rate schedule.
        optimizer: needed when trainable.
        pad_id: any valid token id.
        network: "causal", a language model; "score", one with a head for scores or classes.
        classes: names of a score network's classes, in their order; none: it has one score.
        class_weights: what each class is worth, for whoever scores with the checkpoint; it is written into its config.
        segments: whether a prompt and its answer are two segments of an encoder, see data.tokens.Turns.
        lora: train an adapter instead of the weights.
        adapters: roles that get an adapter of their own beside this role's, in the same model.
        value_head: of a language model: a scalar head beside its own, for STATE_VALUES. It is trained, saved and
            restored with the learner, and neither pushed nor exported.
        shares: the role, built before this one, whose model is this one's too: with the adapter that it has for this
            role, or else without any.
    """

    role: str
    model: str
    dtype: str | None = None
    trainable: bool = True
    temperature: float = 1.0
    total_steps: int = 1
    optimizer: OptimizerConfig | None = None
    settings: LearnerSettings = field(default_factory=LearnerSettings)
    pad_id: int = 0
    network: Literal["causal", "score"] = "causal"
    classes: tuple[str, ...] = ()
    class_weights: tuple[float, ...] = ()
    segments: bool = False
    trust_remote_code: bool = False
    seed: int = 0
    lora: LoraConfig | None = None
    adapters: tuple[str, ...] = ()
    value_head: bool = False
    shares: str | None = None

    def __post_init__(self) -> None:
        if self.trainable and self.optimizer is None:
            raise ValueError(f"the {self.role} learner is trainable and needs an optimizer")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.shares is not None and (self.trainable or self.lora is not None or self.network != "causal"):
            raise ValueError(f"the {self.role} learner cannot share a model: it is trained, or has a head of its own")
        if self.lora is None and self.adapters:
            raise ValueError(f"the {self.role} learner has adapters, but no lora")


def by_group(settings: LearnerSettings, specs: Sequence[LearnerSpec]) -> dict[str, list[LearnerSpec]]:
    """The groups of actors that the roles of a run live in: "learner" has the policy and all roles beside it, and each
    role apart has one of its name. The settings are the learner's, the specs' own are those of their roles."""
    found: dict[str, list[LearnerSpec]] = {}
    for spec in specs:
        found.setdefault(spec.role if settings.is_apart(spec.role) else "learner", []).append(spec)
    return found


def apart_ranks(settings: LearnerSettings, specs: Sequence[LearnerSpec]) -> dict[str, int]:
    """The groups of roles apart → their ranks."""
    groups = {name: inside[0].settings for name, inside in by_group(settings, specs).items() if name != "learner"}
    return {name: getattr(own, "ranks", 1) for name, own in groups.items()}

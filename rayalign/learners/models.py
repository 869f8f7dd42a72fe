"""A causal language model that gives numbers of completion tokens instead of logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rayalign.errors import ConfigError
from rayalign.learners.columns import ColumnHead, Teacher, scattered
from rayalign.learners.network import Images, Network, load_pretrained
from rayalign.learners.settings import LearnerSpec
from rayalign.types import AnyColumn, Column

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# Encoders that count positions from the padding id + 1 on, so that some of their embeddings are never used.
PADDED_POSITIONS = frozenset(
    "camembert data2vec-text esm ibert longformer luke mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl "
    "xmod".split()
)


def most_positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model has positions for; None where its config does not say."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if most is None or text.model_type not in PADDED_POSITIONS:
        return most
    return most - (text.pad_token_id or 0) - 1


def resolve_dtype(spec: LearnerSpec) -> torch.dtype:
    """The dtype of the learner's compute: the order's, the settings', or the checkpoint's own.

    Raises:
        ConfigError: a dtype other than float32 and bfloat16.
    """
    name = spec.dtype or spec.settings.dtype
    if name is None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
        name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise ConfigError(
            f"the {spec.role} learner cannot run in this dtype",
            where=f"{spec.role}.dtype",
            value=name,
            rule="float32 or bfloat16",
            remedy="set dtype to one of them",
        )
    return getattr(torch, name)


class CausalPolicy(Network):
    """A Hugging Face causal LM: log-probs, entropies, top logits and KL of completion tokens.

    Args:
        model: the Hugging Face model.
        gradient_checkpointing: recompute layers in the backward pass.
        packing: see Network.
    """

    def __init__(self, model: PreTrainedModel, *, gradient_checkpointing: bool = False, packing: bool = False):
        super().__init__(model, gradient_checkpointing=gradient_checkpointing, packing=packing)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or model.base_model is model:
            raise _unknown_head(model)
        self._vocabulary = head.out_features
        self.head = ColumnHead(head, _logit_scaling(model.config.get_text_config()))
        self.value_head: nn.Linear | None = None
        self.eval()
        self._check_head()
        self._check_packing()

    @classmethod
    def load(cls, spec: LearnerSpec, dtype: torch.dtype) -> CausalPolicy:
        """From the spec's checkpoint, with parameters in `dtype`.

        Raises:
            ConfigError: the folder holds no causal language model that can be read, or not all of one: a reward
                model, say, whose output head would be random numbers.
        """
        from transformers import AutoModelForCausalLM

        model, missing = load_pretrained(AutoModelForCausalLM, spec, dtype, "causal language model")
        check_whole(spec, model, missing)
        model.requires_grad_(spec.trainable)
        checkpointing = spec.settings.gradient_checkpointing and spec.trainable
        return cls(model, gradient_checkpointing=checkpointing, packing=spec.settings.packing)

    @property
    def vocabulary(self) -> int:
        return self._vocabulary

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        positions: Tensor,
        mask: Tensor,
        columns: Sequence[AnyColumn],
        temperature: float = 1.0,
        chunk: int = 2048,
        teacher: Teacher | None = None,
        teaching: bool = False,
        images: Images | None = None,
    ) -> dict[str, Tensor]:
        """See Network.forward. `teaching` gives "hidden" [N, H], "weight" [V, H] and "bias" [V] or none."""
        keep = mask.bool()
        hidden, flat = self._states(input_ids, attention_mask, positions, keep, images), labels[keep]  # [N, H], [N]
        if Column.STATE_VALUES in columns and self.value_head is not None:
            others = tuple(column for column in columns if column is not Column.STATE_VALUES)
            values = self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0]
            numbers = self.head(hidden, flat, others, temperature, chunk, teacher, False) if others else ()
            named = [column.value for column in (*others, Column.STATE_VALUES)]
            return dict(zip(named, scattered(keep, [*numbers, values]), strict=True))
        found = self.head(hidden, flat, tuple(columns), temperature, chunk, teacher, teaching)
        if teaching:
            weight, bias = found
            return {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
        return dict(zip([column.value for column in columns], scattered(keep, found), strict=True))

    def add_value_head(self) -> None:
        """All zeros: every state is worth nothing until it has learned."""
        head = self.head.weight
        self.value_head = nn.Linear(head.shape[1], 1, device=head.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def extra_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.value_head is not None:
            yield from self.value_head.named_parameters("value_head")

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raises ConfigError when this architecture does more to its logits than is known here."""
        ids = torch.arange(1, 5, device=self.model.device).unsqueeze(0)
        ones = torch.ones_like(ids)
        want = self.model(input_ids=ids, attention_mask=ones, use_cache=False).logits[0].float()
        got = self.head.logits(self._hidden(ids, ones)[0]).float()
        if got.shape != want.shape or (got - want).abs().max() > 1e-2 * (1e-3 + want.abs().max()):
            raise _unknown_head(self.model)


def check_whole(spec: LearnerSpec, model: PreTrainedModel, missing: Sequence[str]) -> None:
    """Raises ConfigError when a language model was loaded from something else, or from a part of one."""
    kinds = model.config.architectures or []
    # With tied embeddings nothing of a reward model is missing, and yet it is no language model any more.
    if missing or any(kind.endswith("ForSequenceClassification") for kind in kinds):
        without = f", without {', '.join(missing[:3])}" if missing else ""
        raise ConfigError(
            f"the {spec.role} model is not a whole language model",
            where=f"{spec.role}.model",
            value=f"{spec.model}: saved as {', '.join(kinds) or 'unknown'}{without}",
            rule="the checkpoint of a causal language model, its output head included",
            remedy="a reward model cannot be a policy: give the language model that it was trained from",
        )


def _unknown_head(model: PreTrainedModel) -> ConfigError:
    return ConfigError(
        "this architecture makes its logits in a way that is not known here",
        value=type(model).__name__,
        rule="logits = a linear head of the last hidden state",
        remedy="use another model, or add what it does to rayalign/learners/models.py",
    )


def _logit_scaling(config: object) -> Callable[[Tensor], Tensor]:
    """What architectures do to logits after the head, as their configs name it."""
    factor = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        factor *= float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        factor /= float(config.logits_scaling)
    if getattr(config, "lm_head_multiplier", None) is not None:  # Falcon H1
        factor *= float(config.lm_head_multiplier)
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later

    def scale(logits: Tensor) -> Tensor:
        logits = logits if factor == 1.0 else logits * factor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return scale

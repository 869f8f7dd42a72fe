"""A causal language model that gives numbers of completion tokens instead of logits of all tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayalign.errors import ConfigError
from rayalign.learners.settings import LearnerSpec
from rayalign.maths.logprobs import token_entropy, token_logprobs
from rayalign.types import Column

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


class ColumnHead(nn.Module):
    """The output head, from hidden states to columns, some positions at a time.

    It holds the parameters of the model's own head (tied to the embeddings or not) and is called once a forward
    pass, whatever the number of positions: ZeRO-3 gathers parameters once a call of a module, on all ranks
    together, and ranks differ in positions.
    """

    def __init__(self, linear: nn.Linear, scale: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] → [N, V]."""
        return self.scale(nn.functional.linear(hidden, self.weight, self.bias))

    def forward(self, hidden: Tensor, labels: Tensor, columns: tuple[Column, ...], temperature: float, chunk: int):
        """hidden [N, H] and labels [N] → for each column [N]."""

        def compute(hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            logits = self.logits(hidden).unsqueeze(0)  # [1, n, V]
            return tuple(_column(column, logits, labels.unsqueeze(0), temperature)[0] for column in columns)

        parts = list(zip(hidden.split(chunk), labels.split(chunk), strict=True))
        if len(parts) > 1 and torch.is_grad_enabled():
            # Not re-entrant: that kind would add to the gradient of the head once a chunk, which ZeRO-3 refuses.
            pieces = [checkpoint(compute, *part, use_reentrant=False) for part in parts]
        else:
            pieces = [compute(*part) for part in parts]
        return tuple(torch.cat(column) for column in zip(*pieces, strict=True))


class CausalPolicy(nn.Module):
    """A Hugging Face causal LM whose forward pass gives columns of completion tokens.

    The backbone, the output head and the log-softmax are inside one `forward`, so that the hooks of ZeRO-3
    see a tied head. Dropout is off, in training too: the log-probs of rollout, reference and policy have to
    be those of one function of the weights.

    Args:
        model: the Hugging Face model.
        gradient_checkpointing: recompute layers in the backward pass.
    """

    def __init__(self, model: PreTrainedModel, *, gradient_checkpointing: bool = False):
        super().__init__()
        self.model = model
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or model.base_model is model:
            raise _unknown_head(model)
        self.head = ColumnHead(head, _logit_scaling(model.config.get_text_config()))
        self.eval()
        self._check_head()

    @classmethod
    def load(cls, spec: LearnerSpec, dtype: torch.dtype) -> CausalPolicy:
        """From the spec's checkpoint, with parameters in `dtype`.

        Raises:
            ConfigError: the folder holds no causal language model that can be read.
        """
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                spec.model,
                dtype=dtype,
                trust_remote_code=spec.trust_remote_code,
                attn_implementation=spec.settings.attention,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the {spec.role} model cannot be loaded",
                where=f"{spec.role}.model",
                value=spec.model,
                rule="the folder of a Hugging Face causal language model",
                remedy=f"{type(error).__name__}: {error}",
            ) from error
        model.requires_grad_(spec.trainable)
        checkpointing = spec.settings.gradient_checkpointing and spec.trainable
        return cls(model, gradient_checkpointing=checkpointing)

    def train(self, mode: bool = True) -> CausalPolicy:
        """Stays in evaluation mode (no dropout), whoever asks; only layers to be recomputed are told."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        super().train(False)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = bool(getattr(module, "gradient_checkpointing", False))
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        positions: Tensor,
        mask: Tensor,
        columns: Sequence[Column],
        temperature: float = 1.0,
        chunk: int = 2048,
    ) -> dict[str, Tensor]:
        """Numbers of the completion tokens, in float32.

        Rows are padded on the right, so that the model's own positions 0, 1, 2 … are the right ones.

        Args:
            input_ids, attention_mask: [R, S].
            labels, positions, mask: [R, T], see types.Batch.
            columns: which numbers.
            temperature: the logits are divided by it.
            chunk: completion positions whose logits are held at a time.

        Returns:
            Column value ("logps", …; ZeRO-3's hooks want text for keys) → [R, T] in nats, 0 where the mask is 0.
        """
        keep = mask.bool()
        states = self._hidden(input_ids, attention_mask)  # [R, S, H]
        row = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(labels)
        hidden, flat = states[row[keep], positions[keep]], labels[keep]  # [N, H], [N]
        del states
        found = self.head(hidden, flat, tuple(columns), temperature, chunk)
        empty = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        return {
            column.value: empty.masked_scatter(keep, numbers) for column, numbers in zip(columns, found, strict=True)
        }

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.last_hidden_state

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raises ConfigError when this architecture does more to its logits than is known here."""
        ids = torch.arange(1, 5, device=self.model.device).unsqueeze(0)
        ones = torch.ones_like(ids)
        want = self.model(input_ids=ids, attention_mask=ones, use_cache=False).logits[0].float()
        got = self.head.logits(self._hidden(ids, ones)[0]).float()
        if got.shape != want.shape or (got - want).abs().max() > 1e-2 * (1e-3 + want.abs().max()):
            raise _unknown_head(self.model)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their Hugging Face names, tied ones once."""
        return self.model.named_parameters()

    def export(self, path: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Write `state` (all of `named_weights`, full tensors) as a checkpoint in `dtype`."""
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
        persistent = self.model.state_dict().keys()
        tensors.update({name: buffer for name, buffer in self.model.named_buffers() if name in persistent})
        before = self.model.config.dtype
        self.model.save_pretrained(str(path), state_dict=tensors)
        self.model.config.dtype = before
        # save_pretrained writes the dtype of the live parameters, which may be a float32 master copy.
        config = json.loads((path / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _unknown_head(model: PreTrainedModel) -> ConfigError:
    return ConfigError(
        "this architecture makes its logits in a way that is not known here",
        value=type(model).__name__,
        rule="logits = a linear head of the last hidden state",
        remedy="use another model, or add what it does to rayalign/learners/models.py",
    )


def _column(column: Column, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    if column is Column.LOGPS:
        return token_logprobs(logits, labels, temperature=temperature)
    if column is Column.ENTROPY:
        return token_entropy(logits, temperature=temperature)
    raise ValueError(f"a causal policy has no column {column}")


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

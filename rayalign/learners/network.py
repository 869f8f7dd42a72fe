"""What all networks of learners share: a Hugging Face model whose forward pass gives columns of completion tokens."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rayalign.errors import ConfigError
from rayalign.learners import packing
from rayalign.learners.columns import Teacher
from rayalign.learners.settings import LearnerSpec
from rayalign.types import AnyColumn, Picture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Images = Mapping[str, Any]  # what a vision-language model takes besides tokens


class Network(nn.Module):
    """A Hugging Face model whose forward pass gives columns of completion tokens.

    Backbone and head are inside one `forward`, so that the hooks of ZeRO-3 see a tied head. Dropout is off, in
    training too: the numbers of rollout, reference and policy have to be those of one function of the weights.

    Args:
        model: the Hugging Face model.
        gradient_checkpointing: recompute layers in the backward pass.
        packing: lay the sequences behind one another; the model's attention has to be packing.ATTENTION.
    """

    def __init__(self, model: PreTrainedModel, *, gradient_checkpointing: bool = False, packing: bool = False):
        super().__init__()
        self.model, self.packing = model, packing
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            _no_dropout(model)

    @abstractmethod
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
        """Numbers of the completion tokens, in float32.

        Args:
            input_ids, attention_mask: [R, S], padded on the right.
            labels, positions, mask: [R, T], see types.Batch.
            columns: which numbers.
            temperature: the logits are divided by it.
            chunk: completion positions whose logits are held at a time.
            teacher: of the same micro-batch, for REFERENCE_KL.
            teaching: give what a Teacher is made of, instead of columns.
            images: as `image_inputs` gives them, for a network that sees.

        Returns:
            Column value ("logps", …; ZeRO-3's hooks want text for keys) → [R, T, …], 0 where the mask is 0; of CLASSES
            [R, L].

        Raises:
            ConfigError: a column that this kind of network does not have.
        """

    @property
    def vocabulary(self) -> int | None:
        """The number of next-token logits; None for a network without."""
        return None

    def finished(self, name: str, tensor: Tensor) -> Tensor:
        """A weight as it is exported: as it is, unless something was fitted after training that belongs to it."""
        return tensor

    def image_inputs(self, images: Sequence[tuple[Picture, ...]], device: torch.device) -> Images:
        """What `forward` takes for the images of each row. Raises ConfigError for a network that sees none."""
        raise ConfigError(
            "this network sees no images",
            value=type(self.model).__name__,
            rule="rows with images train a vision-language model (AutoModelForImageTextToText)",
            remedy="use such a model, or rows without images",
        )

    def _check_packing(self) -> None:
        """Raises ConfigError when this architecture cannot be packed."""
        if self.packing:
            packing.check_apart(self.model)

    def train(self, mode: bool = True) -> Network:
        """Stays in evaluation mode (no dropout), whoever asks; only layers to be recomputed are told."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        super().train(False)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = bool(getattr(module, "gradient_checkpointing", False))
        return self

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor, images: Images | None = None) -> Tensor:
        """[R, S] → [R, S, H]. Rows are padded on the right, so that the model's own positions 0, 1, 2 … are right."""
        output = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.last_hidden_state

    def _states(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, keep: Tensor, images: Images | None = None
    ) -> Tensor:
        """The last hidden states at `positions` [R, T] where `keep` [R, T] is true: [N, H]."""
        if self.packing:
            output = self.model.base_model(**packing.packed(input_ids, attention_mask), use_cache=False)
            at = packing.starts_of(attention_mask).unsqueeze(1) + positions
            return output.last_hidden_state[0, at[keep]]
        row = torch.arange(len(keep), device=keep.device).unsqueeze(1).expand_as(keep)[keep]
        return self._hidden(input_ids, attention_mask, images)[row, positions[keep]]

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their Hugging Face names, tied ones once."""
        return self.model.named_parameters()

    def extra_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters beside the model's own, which are neither pushed nor exported."""
        yield from ()

    def add_value_head(self) -> None:
        """A scalar head for STATE_VALUES, where there is none. Raises ConfigError for a network that can have none."""
        raise ConfigError(
            "this network takes no value head",
            value=type(self.model).__name__,
            rule="a language model, which shares its trunk with the critic",
            remedy="set algorithm.critic.shared=false",
        )

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


def _no_dropout(model: PreTrainedModel) -> None:
    """Layers that are recomputed are told that they train, and some apply dropout themselves when they do."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)):
        for name in [name for name, value in vars(layer).items() if "drop" in name and isinstance(value, float)]:
            setattr(layer, name, 0.0)


def load_pretrained(auto: Any, spec: LearnerSpec, dtype: torch.dtype, what: str, **extra: Any) -> tuple[Any, list[str]]:
    """A model of `spec.model` with parameters in `dtype`, and the names of those that the checkpoint lacks.

    Raises:
        ConfigError: the folder holds nothing that can be read as one.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is the caller's to judge, and to say
    try:
        model, found = auto.from_pretrained(
            spec.model,
            dtype=dtype,
            trust_remote_code=spec.trust_remote_code,
            attn_implementation=packing.register() if spec.settings.packing else spec.settings.attention,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the {spec.role} model cannot be loaded",
            where=f"{spec.role}.model",
            value=spec.model,
            rule=f"the folder of a Hugging Face {what}",
            remedy=f"{type(error).__name__}: {error}",
        ) from error
    finally:
        logging.set_verbosity(before)
    return model, sorted(found["missing_keys"])

"""A vision-language model: the columns of a causal one, for prompts with images."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rayalign.errors import ConfigError
from rayalign.learners.models import CausalPolicy, check_whole
from rayalign.learners.network import Images, load_pretrained
from rayalign.learners.settings import LearnerSpec
from rayalign.types import Picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedModel

BLANK = 56  # pixels a side of what a micro-batch without images looks at


class VisionPolicy(CausalPolicy):
    """AutoModelForImageTextToText: its language part gives the columns, with the images in place of their tokens.

    Args:
        model: the Hugging Face model.
        path: of the checkpoint, for what turns images into tensors.
        gradient_checkpointing: recompute layers in the backward pass.
        packing: see Network; rows with images cannot be packed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        *,
        gradient_checkpointing: bool = False,
        packing: bool = False,
        trust_remote_code: bool = False,
    ):
        super().__init__(model, gradient_checkpointing=gradient_checkpointing, packing=packing)
        self._path, self._trust = path, trust_remote_code
        self._takes = frozenset(inspect.signature(model.base_model.forward).parameters)
        # Parameters right below the backbone are gathered by ZeRO-3 in its own forward pass alone.
        own = any(True for _ in model.base_model.parameters(recurse=False))
        self._shares = "mm_encoder_outputs" in self._takes and not own

    @classmethod
    def load(cls, spec: LearnerSpec, dtype: torch.dtype) -> VisionPolicy:
        """From the spec's checkpoint, with parameters in `dtype`; what sees is trained with learner.train_vision only.

        Raises:
            ConfigError: the folder holds no such model that can be read, or not all of one.
        """
        from transformers import AutoModelForImageTextToText

        model, missing = load_pretrained(AutoModelForImageTextToText, spec, dtype, "vision-language model")
        check_whole(spec, model, missing)
        model.requires_grad_(spec.trainable)
        encoder = encoder_of(model)
        if encoder is not None and not spec.settings.train_vision:
            encoder.requires_grad_(False)
        return cls(
            model,
            spec.model,
            gradient_checkpointing=spec.settings.gradient_checkpointing and spec.trainable,
            packing=spec.settings.packing,
            trust_remote_code=spec.trust_remote_code,
        )

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's processor, or of it only what turns images into tensors, where the rest of it (for videos)
        asks for a library that is not here. Raises ConfigError."""
        from transformers import AutoImageProcessor, AutoProcessor

        for auto in (AutoProcessor, AutoImageProcessor):
            try:
                return auto.from_pretrained(self._path, trust_remote_code=self._trust)
            except Exception as error:  # a different class for every way of not finding something
                found = error
        raise ConfigError(
            "nothing here turns images into tensors",
            where="key model.path",
            value=f"{self._path}: {' '.join(str(found).split())}",
            rule="the checkpoint's processor beside its weights",
            remedy="save it there: AutoProcessor.from_pretrained(…).save_pretrained(folder)",
        )

    def image_inputs(self, images: Sequence[tuple[Picture, ...]], device: torch.device) -> Images:
        """Tensors of the images, each different one once where the architecture can share its features.

        Returns:
            "pixels": arguments of the image features; "order": which of them, image by image, row after row.
        """
        self._check_images()
        flat = [picture for row in images for picture in row]
        different = list(dict.fromkeys(flat)) if self._shares else flat
        place = {picture: index for index, picture in enumerate(different)}
        order = [place[picture] for picture in flat] if self._shares else list(range(len(flat)))
        pixels = _pixels(self.processor, [decoded(picture) for picture in different] or [_blank()])
        return {
            "pixels": {name: tensor.to(device) for name, tensor in pixels.items()},
            "order": torch.tensor(order, dtype=torch.long),
        }

    def _check_images(self) -> None:
        if self.packing:
            raise ConfigError(
                "rows with images cannot be packed",
                where="key learner.packing",
                value="true",
                rule="padded rows",
                remedy="set learner.packing=false",
            )
        if "token_type_ids" in self._takes:
            raise ConfigError(
                "how this architecture looks at images is not known here",
                where="key model.path",
                value=type(self.model).__name__,
                rule="attention that is causal over the tokens of images too, as that of LLaVA and Qwen2-VL",
                remedy="use another model",
            )

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor, images: Images | None = None) -> Tensor:
        if images is None:
            return super()._hidden(input_ids, attention_mask)
        backbone, pixels, order = self.model.base_model, dict(images["pixels"]), images["order"]
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if not len(order):
            # Other micro-batches of the step have images: the same layers take part in this one's gradient, with 0.
            features = backbone.get_image_features(**pixels, return_dict=True).pooler_output
            return backbone(**arguments).last_hidden_state + 0.0 * sum(each.sum() for each in features)
        if "mm_token_type_ids" in self._takes:
            arguments["mm_token_type_ids"] = (input_ids == self.model.config.image_token_id).int()
        if self._shares:
            found = backbone.get_image_features(**pixels, return_dict=True)
            found.pooler_output = [found.pooler_output[index] for index in order.tolist()]
            pixels.pop("pixel_values")
            pixels = {name: tensor[order.to(tensor.device)] for name, tensor in pixels.items() if name in self._takes}
            arguments["mm_encoder_outputs"] = {"image": found}
        return backbone(**arguments, **pixels).last_hidden_state

    def export(self, path: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """With the processor, so that what is written can be asked about images."""
        super().export(path, state, dtype)
        self.processor.save_pretrained(str(path))


def sees(spec: LearnerSpec) -> bool:
    """Whether the checkpoint was saved as a vision-language model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError):
        return False  # loading the model says what is wrong
    return saved_to_see(config)


def saved_to_see(config: PretrainedConfig) -> bool:
    """Whether a model's config names the class of a vision-language model: some kinds are saved either way."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as names

    return names.get(config.model_type) in (config.architectures or [])


def encoder_of(model: PreTrainedModel) -> nn.Module | None:
    """The part of a model that turns images into features; None for a model without."""
    found = model.get_encoder(modality="image")
    return None if found is model or found is model.base_model else found


def decoded(picture: Picture) -> Image:
    """The image upright and in RGB; of one with a box, that part, as large as the whole was."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(picture.data)) as file:
        whole = ImageOps.exif_transpose(file).convert("RGB")
    if picture.box is None:
        return whole
    width, height = whole.size
    left, top, right, bottom = picture.box
    x, y = min(int(left * width), width - 1), min(int(top * height), height - 1)
    part = whole.crop((x, y, max(x + 1, round(right * width)), max(y + 1, round(bottom * height))))
    return part.resize(whole.size, Image.Resampling.BICUBIC)


def _blank() -> Image:
    from PIL import Image

    return Image.new("RGB", (BLANK, BLANK))


def _pixels(processor: Any, images: Sequence[Image]) -> dict[str, Tensor]:
    found = getattr(processor, "image_processor", processor)(images=list(images), return_tensors="pt")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}

"""Tiny random vision-language models of real architectures, with what turns images into their tensors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rayalign.types import Picture
from tests.tiny_models import EOS_ID, PAD_ID, VOCAB_SIZE, build_tokenizer, tiny_config

IMAGE = "<image>"
IMAGE_ID = VOCAB_SIZE
SIDE, PATCH = 16, 8  # pixels of an image as llava sees it: four tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<eos>"
    "{% else %}<user>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    found = build_tokenizer()
    found.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", IMAGE]})
    assert found.convert_tokens_to_ids(IMAGE) == IMAGE_ID
    return found


def processor() -> LlavaProcessor:
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True
    )
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_llava(path: str | Path, *, seed: int = 0, tied: bool = False) -> Path:
    """Save a random LLaVA (CLIP, projector, llama) with its processor. The same seed gives the same weights."""
    text = tiny_config(tied=tied)
    text.vocab_size = VOCAB_SIZE + 1
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
    )
    _random(LlavaForConditionalGeneration, config, seed).save_pretrained(str(path))
    processor().save_pretrained(str(path))
    return Path(path)


def build_tiny_qwen2_vl(path: str | Path, *, seed: int = 0) -> Path:
    """Save a random Qwen2-VL with its image processor. Images have as many tokens as their size asks for."""
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=VOCAB_SIZE + 1,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            pad_token_id=PAD_ID,
            eos_token_id=EOS_ID,
        ),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=7),
        image_token_id=IMAGE_ID,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )
    _random(Qwen2VLForConditionalGeneration, config, seed).save_pretrained(str(path))
    Qwen2VLImageProcessorPil(patch_size=7, min_pixels=14 * 14, max_pixels=56 * 56).save_pretrained(str(path))
    tokenizer().save_pretrained(str(path))
    return Path(path)


def _random(kind: type, config: object, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter) * (0.02 if "norm" in name else 0.12))
    return model


def painted(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    """An image of a few random patches, so that parts of it differ."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def picture(seed: int, width: int = 24, height: int = 20, box: tuple | None = None) -> Picture:
    return Picture(png(painted(seed, width, height)), (width, height), box)

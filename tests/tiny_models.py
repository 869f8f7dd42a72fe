"""Tiny random models with a real tokenizer, made in milliseconds, so that no test needs a download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<eos>", "<user>", "<assistant>")
PAD_ID, EOS_ID, USER_ID, ASSISTANT_ID = range(4)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}<eos>"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = (
    "the a is was not very good bad fine awful great film review story actor space opera happy sad love hate "
    "write one sentence about of and it that I you"
).split()
VOCAB_SIZE = 160


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Specials, every printable ASCII character and a few words: 160 ids, no unknown ASCII text, and
    decode(encode(text)) == text."""
    pieces = list(SPECIALS) + ["\n"] + [chr(code) for code in range(32, 127)]
    pieces += [" " + word for word in WORDS]
    pieces += [f"<extra_{index}>" for index in range(VOCAB_SIZE - len(pieces))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    assert len(vocab) == VOCAB_SIZE
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    known = "|".join(f" {word}(?![A-Za-z])" for word in WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{known}|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(*, tied: bool = False, layers: int = 2) -> LlamaConfig:
    """A llama of 2 layers whose head counts divide by two (for tensor parallel engines)."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=EOS_ID,
    )


def build_tiny_llama(
    path: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False, layers: int = 2
) -> Path:
    """Save a random tiny llama with its tokenizer as a Hugging Face checkpoint and return its folder.

    The same seed gives the same weights. They are larger than a fresh model's, so that next-token
    distributions are far from uniform and wrong weights show in the log-probs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(tied=tied, layers=layers))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 0.02 if "norm" in name else 0.15
                parameter.add_(torch.randn_like(parameter) * spread)
    model.to(dtype).save_pretrained(str(path))
    build_tokenizer().save_pretrained(str(path))
    return Path(path)

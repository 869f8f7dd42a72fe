"""What the tests of data.examples share: writing files, loading them, and a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rayalign.data.config import DataConfig
from rayalign.data.examples import ExampleSet, load_examples

KINDS = ("completion", "pair", "label", "ranked", "votes")
PAIRS = [{"prompt": f"film {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(
    tokenizer,
    examples,
    kinds=KINDS,
    *,
    max_tokens: int = 200,
    context: int | None = None,
    seed: int = 0,
    held_out: float = 0.0,
    **settings,
) -> ExampleSet:
    config = DataConfig(examples=examples, held_out=held_out, max_tokens=max_tokens, **settings)
    room = max_tokens if context is None else min(max_tokens, context)
    return load_examples(config, tokenizer, kinds=kinds, max_tokens=room, seed=seed)


def one(tokenizer, folder: Path, row: dict, **settings):
    """The only group of a data set of this row."""
    found = load(tokenizer, str(write(folder / "one.jsonl", [row])), **settings).step(0, 1)
    assert len(found) == 1
    return found[0]


def texts(tokenizer, group) -> list[str]:
    """The prompt and the answers as the model sees them."""
    return [tokenizer.decode(ids) for ids in (group.prompt.token_ids, *(c.token_ids for c in group.completions))]


def bytes_tokenizer(template: str | None = CHATML, *, adds_begin: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, <s> before every text, and a turn that ends with another token than the end of sequence."""
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocab = {piece: i for i, piece in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[2:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast

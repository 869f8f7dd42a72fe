"""What tests of servers, and those of score networks, share."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from rayalign.scorers.server import ServerAsker
from tests.tiny_models import EOS_ID, PAD_ID, build_tiny_llama


@pytest.fixture(params=["llama", "llama-tied", "gpt2"])
def causal(request, tmp_path):
    """The folder of a tiny language model, of each kind of head."""
    if request.param.startswith("llama"):
        return build_tiny_llama(tmp_path / "causal", tied=request.param == "llama-tied")
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=160, n_embd=32, n_layer=2, n_head=2, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


@pytest.fixture
def asker(tmp_path):
    """An asker of a service, with a cache of the test's own; closed at the end."""
    made = []

    def make(url: str, **settings):
        usual = {"model": "judge", "cache": str(tmp_path / "answers.sqlite"), "backoff_s": 0.001, "timeout_s": 30.0}
        usual["patience_s"] = 30.0
        config = ServerAsker(url=url, **{**usual, **settings})
        made.append(config.start())
        return made[-1]

    yield make
    for each in made:
        each.close()

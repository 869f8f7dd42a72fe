"""The recipe of group_beam.json: what the group beam search of transformers 4.55 gives. Not run by the tests.

transformers 5 has no group beam search, so that this needs an environment of its own:

    python -m venv tf455
    tf455/bin/pip install transformers==4.55.4 torch==2.13.0 safetensors numpy
    tf455/bin/python tests/unit/decoding/make_group_beam.py [folder of SmolLM2-135M-Instruct]

Without the folder the numbers of SmolLM2 stay as they are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.unit.decoding.group_beam_model import EOS, build_group_beam_model  # noqa: E402

OUT = Path(__file__).with_name("group_beam.json")
TINY_PROMPTS = ((2, 40, 57, 9, 3), (5, 6), (33,) * 8 + (12, 7, 61))
# beams, groups, penalty, length_penalty, min_tokens, max_tokens, further end tokens
TINY_CASES = (
    (4, 4, 4.0, 1.0, 0, 16, ()),
    (6, 6, 0.7, 0.0, 0, 16, ()),
    (6, 6, 1.5, 2.0, 3, 12, ()),
    (10, 10, 4.0, 1.0, 0, 24, ()),
    (5, 5, 0.3, -1.0, 2, 9, (7, 20)),
    (6, 3, 0.8, 1.0, 0, 16, ()),
    (6, 2, 0.4, 0.6, 4, 14, ()),
    (9, 3, 1.2, 1.5, 0, 20, ()),
    (8, 4, 2.5, -0.5, 0, 12, (7, 20)),
    (10, 5, 4.0, 1.0, 1, 10, (7,)),
    (4, 2, 0.5, 1.0, 5, 5, ()),
)
TEXTS = ("Write one sentence of a film review of a space opera, about the acting.", "What helps against worry?")
SMOL_CASES = ((10, 10, 4.0, 1.0, 0, 24, ()), (6, 6, 1.0, 1.0, 0, 20, ()), (6, 3, 0.6, 1.0, 4, 16, ()))


@torch.no_grad()
def search(model: Any, prompt: tuple[int, ...], case: tuple[Any, ...], eos: int) -> dict[str, Any]:
    """One case: settings, and each candidate's tokens up to its end, its score, and its sum of plain log-probs."""
    beams, groups, penalty, length_penalty, min_tokens, max_tokens, more = case
    ends = [eos, *more]
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=beams,
        num_beam_groups=groups,
        diversity_penalty=penalty,
        length_penalty=length_penalty,
        min_new_tokens=min_tokens or None,
        max_new_tokens=max_tokens,
        num_return_sequences=beams,
        do_sample=False,
        early_stopping=False,
        eos_token_id=ends,
        pad_token_id=eos,
        return_dict_in_generate=True,
        output_scores=True,
    )
    candidates = []
    for sequence, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        tokens = sequence[len(prompt) :]
        tokens = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens  # which end token it was is not told
        logps = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        sum_logp = logps.gather(1, torch.tensor(tokens)[:, None]).double().sum().item()
        told = not more or tokens[-1] != eos
        candidates.append({"token_ids": tokens, "score": score, "sum_logp": sum_logp if told else None})
    names = ("beams", "groups", "penalty", "length_penalty", "min_tokens", "max_tokens", "further_ends")
    settings = dict(zip(names, case, strict=True))
    return {"prompt_ids": list(prompt), **settings, "candidates": candidates}


def tiny() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        model = load(build_group_beam_model(Path(folder) / "tiny"))
        return [search(model, prompt, case, EOS) for prompt in TINY_PROMPTS for case in TINY_CASES]


def smollm2(folder: Path) -> list[dict[str, Any]]:
    """4.55 reads a checkpoint of transformers 5 once `rope_theta` stands at the top of its config."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chats = (f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in TEXTS)
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.glob("*.safetensors*"):
            (Path(copy) / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text())
        config |= {"rope_theta": config.get("rope_parameters", config).get("rope_theta"), "torch_dtype": "float32"}
        (Path(copy) / "config.json").write_text(json.dumps(config))
        model, eos = load(Path(copy)), int(config["eos_token_id"])
        prompts = [tuple(tokenizer.encode(chat).ids) for chat in chats]
        return [search(model, prompt, case, eos) for prompt in prompts for case in SMOL_CASES]


def load(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), torch_dtype=torch.float32)
    model.generation_config = transformers.GenerationConfig()
    return model.eval()


def main() -> None:
    torch.set_num_threads(1)
    there = json.loads(OUT.read_text()) if OUT.exists() else {}
    found = {"transformers": transformers.__version__, "torch": torch.__version__, "tiny": tiny()}
    found["smollm2"] = smollm2(Path(sys.argv[1])) if len(sys.argv) > 1 else there.get("smollm2", [])
    OUT.write_text(json.dumps(found).replace('{"prompt_ids"', '\n{"prompt_ids"') + "\n")
    ended = [len({len(c["token_ids"]) for c in case["candidates"]}) > 1 for case in found["tiny"]]
    print(f"{len(ended)} cases of the tiny model, {sum(ended)} with candidates of different lengths: {OUT}")


if __name__ == "__main__":
    main()

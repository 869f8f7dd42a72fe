"""Tokens a second of diverse beam search on vLLM, against plain sampling on the same engine, in one run.

Eight prompts, ten completions of each, 48 tokens each (no end token before that, so that all ways make as many):

- plain sampling, ten requests a prompt, as rayalign asks: each with a seed, a least length and log-probs
- vLLM alone: n=10, without any of these
- groups = beams: one pass of the engine
- groups < beams: requests that go on greedily, and new ones where the search takes another token

  python tests/bench/diverse_beam.py                          three rounds, the median of each
  python tests/bench/diverse_beam.py --small                  two prompts, 8 tokens, one round: whether it works
  python tests/bench/diverse_beam.py --oracle tf455/bin/python   and the group beam search of transformers 4.55, run
                                                              by that Python; see tests/unit/decoding/make_group_beam.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODEL = "~/.cache/rayalign/models/SmolLM2-135M-Instruct"
PROMPTS = ROOT / "configs/prompts/film_reviews.jsonl"
PENALTY = 4.0
VLLM_ALONE = "vLLM alone"


def prompts_of(model: str, count: int) -> list[tuple[int, ...]]:
    from transformers import AutoTokenizer

    from rayalign.data.config import DataConfig
    from rayalign.data.prompts import load_prompts

    found = load_prompts(DataConfig(prompts=str(PROMPTS)), AutoTokenizer.from_pretrained(model), max_prompt_tokens=88)
    return [prompt.token_ids for prompt in found.training[:count]]


def ways(arguments: argparse.Namespace) -> dict[str, tuple[int, Any]]:
    """Name → requests a prompt, and their sampling."""
    from rayalign.types import DiverseBeam, Sampling

    beams, tokens = arguments.beams, arguments.tokens
    found: dict[str, tuple[int, Any]] = {
        f"plain sampling, n={beams}": (beams, Sampling(tokens, min_tokens=tokens)),
        f"diverse beam, {beams} groups of 1 (one pass)": (
            1,
            Sampling(tokens, min_tokens=tokens, search=DiverseBeam(beams, beams, PENALTY)),
        ),
    }
    for groups in arguments.groups:
        search = DiverseBeam(beams, groups, PENALTY)
        name = f"diverse beam, {groups} groups of {beams // groups} (steps)"
        found[name] = (1, Sampling(tokens, min_tokens=tokens, search=search))
    return found


def measure(engine: Any, prompts: list[tuple[int, ...]], way: tuple[int, Any], label: str) -> float:
    """Tokens a second."""
    from rayalign.types import Request

    each, sampling = way
    engine._drop_prefix_cache()  # a search is the same each time: it would find its own keys and values again
    requests = [
        Request(f"{label}/{p}/{k}", prompt, sampling, seed=100 * p + k)
        for p, prompt in enumerate(prompts)
        for k in range(each)
    ]
    done, begun = 0, time.perf_counter()
    engine.submit(requests)
    tokens = 0
    while done < len(requests):
        for completion in engine.poll():
            done += 1
            tokens += sum(len(each.token_ids) for each in completion.candidates or (completion,))
    return tokens / (time.perf_counter() - begun)


def alone(engine: Any, prompts: list[tuple[int, ...]], arguments: argparse.Namespace) -> float:
    """Tokens a second of vLLM's own n completions, which look for no end token and keep no log-prob."""
    from vllm import SamplingParams

    params = SamplingParams(n=arguments.beams, max_tokens=arguments.tokens, ignore_eos=True, detokenize=False)
    engine._drop_prefix_cache()
    begun = time.perf_counter()
    found = engine._llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
    tokens = sum(len(each.token_ids) for output in found for each in output.outputs)
    return tokens / (time.perf_counter() - begun)


def of_4_55(arguments: argparse.Namespace, model: str, prompts: list[tuple[int, ...]]) -> dict[int, float]:
    """The same search by transformers 4.55 in the same dtype: prompts in a batch (one, all) → tokens a second."""
    with tempfile.TemporaryDirectory() as folder:
        for file in Path(model).glob("*.safetensors*"):
            (Path(folder) / file.name).symlink_to(file)
        config = json.loads((Path(model) / "config.json").read_text())
        config["rope_theta"] = config.get("rope_parameters", config).get("rope_theta")  # as 4.55 reads it
        (Path(folder) / "config.json").write_text(json.dumps(config))
        asked = {"folder": folder, "prompts": prompts, "beams": arguments.beams, "tokens": arguments.tokens}
        asked |= {"dtype": arguments.dtype, "threads": arguments.threads, "repeats": arguments.repeats}
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [arguments.oracle, __file__, "--child"], input=json.dumps(asked), capture_output=True, text=True,
            env=environment,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"transformers 4.55 failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {int(at_once): statistics.median(speeds) for at_once, speeds in found.items()}


def child() -> None:
    """In the environment of transformers 4.55."""
    import torch
    import transformers

    asked = json.loads(sys.stdin.read())
    torch.set_num_threads(asked["threads"])
    dtype = getattr(torch, asked["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["folder"], torch_dtype=dtype).eval()
    eos = model.config.eos_token_id
    longest, many = max(map(len, asked["prompts"])), len(asked["prompts"])
    all_ids = torch.tensor([[eos] * (longest - len(prompt)) + prompt for prompt in asked["prompts"]])
    all_masks = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked["prompts"]])
    model.generation_config = transformers.GenerationConfig()
    speeds: dict[int, list[float]] = {1: [], many: []}
    for _ in range(asked["repeats"]):
        for at_once in speeds:
            begun = time.perf_counter()
            for ids, mask in zip(all_ids.split(at_once), all_masks.split(at_once), strict=True):
                search(model, ids, mask, asked, eos)
            speeds[at_once].append(many * asked["beams"] * asked["tokens"] / (time.perf_counter() - begun))
    print(json.dumps(speeds))


def search(model: Any, ids: Any, mask: Any, asked: dict[str, Any], eos: int) -> None:
    """Group beam search of 4.55."""
    import torch

    with torch.no_grad():
        model.generate(
            ids, attention_mask=mask, num_beams=asked["beams"], num_beam_groups=asked["beams"],
            diversity_penalty=PENALTY, num_return_sequences=asked["beams"], min_new_tokens=asked["tokens"],
            max_new_tokens=asked["tokens"], do_sample=False, eos_token_id=eos, pad_token_id=eos,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--groups", type=int, nargs="*", default=[5, 2], help="of the searches with groups of several")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--oracle", metavar="PYTHON", help="of an environment with transformers 4.55")
    parser.add_argument("--small", action="store_true", help="a trial")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child()
        return
    if arguments.small:
        arguments.prompts, arguments.tokens, arguments.repeats = 2, 8, 1
    from rayalign.engines.vllm import VLLMEngineConfig
    from rayalign.run_dir import versions

    model = str(Path(arguments.model).expanduser())
    prompts = prompts_of(model, arguments.prompts)
    config = VLLMEngineConfig(
        dtype=arguments.dtype,
        max_context=max(map(len, prompts)) + arguments.tokens,
        max_running=arguments.beams * len(prompts),
        kv_cache_gib=1.0,
        threads=arguments.threads,
    )
    engine = config.build(model=model)
    found: dict[str, list[float]] = {name: [] for name in (*ways(arguments), VLLM_ALONE)}
    for number in range(-1, arguments.repeats):  # the first round is thrown away
        for name, way in ways(arguments).items():
            if number < 0 and not arguments.small:
                measure(engine, prompts[:1], way, "warm")
            elif number >= 0:
                found[name].append(measure(engine, prompts, way, f"round-{number}"))
                print(f"{name}: {found[name][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
        if number >= 0:
            found[VLLM_ALONE].append(alone(engine, prompts, arguments))
    engine.close()
    speeds = {name: statistics.median(each) for name, each in found.items()}
    if arguments.oracle:
        for at_once, speed in of_4_55(arguments, model, prompts).items():
            speeds[f"transformers 4.55, group beam search, {at_once} prompts a batch"] = speed
    plain, bare = next(iter(speeds.values())), speeds[VLLM_ALONE]
    print(f"{len(prompts)} prompts × {arguments.beams} completions × {arguments.tokens} tokens, {arguments.dtype}\n")
    print("| way | tokens/s | of plain sampling | of vLLM alone |\n|---|---|---|---|")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:.0f} | {speed / plain:.2f} | {speed / bare:.2f} |")
    print(f"\nmedian of {arguments.repeats}; {arguments.threads} threads, {os.cpu_count()} cores, {cpu()}")
    print(", ".join(f"{name} {number}" for name, number in versions().items()))


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()

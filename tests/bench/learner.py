"""Our DPO step against the plain transformers training step of the same work: `python tests/bench/learner.py`.

Both do one optimiser step a batch of pairs: log-probs of the frozen reference, then of the policy, the DPO loss,
AdamW. The plain step is what one writes first: chosen and rejected padded into one batch in the data's order,
logits of all positions, log-softmax in float32. Ours is `TorchLearner`, with padded and with packed rows, its
micro-batches no larger than the plain ones. Every row of the table is a process of its own; the losses have to
agree, or there is no table. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402

from rayalign.algorithms.preference import Preference  # noqa: E402
from rayalign.learners.settings import LearnerSpec, OptimizerConfig  # noqa: E402
from rayalign.learners.torch import TorchLearnerConfig  # noqa: E402
from rayalign.memory import peak_gib  # noqa: E402
from rayalign.protocols import UpdatePlan  # noqa: E402
from rayalign.run_dir import versions  # noqa: E402
from rayalign.types import Column, Example  # noqa: E402
from rayalign.types import Sequence as Row  # noqa: E402

MODEL = "~/.cache/rayalign/models/SmolLM2-135M-Instruct"
BETA, LR = 0.1, 1e-6
VARIANTS = ("plain", "padded", "packed")
COLUMNS = (("tokens_s", 1), ("cpu_s", 1), ("peak_gib", 2))


def pairs(count: int, vocabulary: int, seed: int = 0) -> list[Example]:
    """Random tokens; prompts around 50 tokens and answers around 60, with the long tail of real ones."""
    rng = random.Random(seed)

    def ids(median: float, most: int) -> tuple[int, ...]:
        length = min(most, max(4, round(median * math.exp(rng.gauss(0, 0.6)))))
        return tuple(rng.randrange(3, vocabulary) for _ in range(length))

    made = []
    for _ in range(count):
        prompt = ids(50, 160)
        made.append(Example((Row(prompt, ids(60, 256)), Row(prompt, ids(60, 256)))))
    return made


def plain_step(args: argparse.Namespace, examples: list[Example]) -> Callable[[int], float]:
    """A step written with transformers and torch alone. Gives the loss."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval() for _ in range(2)
    )
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def batch(part: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = [example.sequences[side] for side in (0, 1) for example in part]  # chosen, then rejected
        ids, mask, answer = (torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long) for _ in range(3))
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row.prompt_ids + row.completion_ids)
            mask[index, : len(row)] = 1
            answer[index, len(row.prompt_ids) : len(row)] = 1
        return ids.to(device), mask.to(device), answer.to(device)

    def logps(model: Any, ids: torch.Tensor, mask: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        found = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
        return (found * answer[:, 1:]).sum(1)

    def step(_: int) -> float:
        total = 0.0
        for start in range(0, len(examples), args.micro_pairs):
            part = examples[start : start + args.micro_pairs]
            inputs = batch(part)
            with torch.no_grad():
                known = logps(reference, *inputs)
            ratio = logps(policy, *inputs) - known
            chosen, rejected = ratio.chunk(2)
            loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).sum() / len(examples)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def our_step(args: argparse.Namespace, examples: list[Example], packing: bool) -> Callable[[int], float]:
    """The same by TorchLearner. Micro-batches as large as the largest plain one, padding included."""
    largest = max(
        2 * len(part) * max(len(row) for example in part for row in example.sequences)
        for start in range(0, len(examples), args.micro_pairs)
        for part in [examples[start : start + args.micro_pairs]]
    )
    settings = TorchLearnerConfig(dtype=args.dtype, micro_batch_tokens=largest, packing=packing)
    specs = [
        LearnerSpec("policy", args.model, optimizer=OptimizerConfig(lr=LR), settings=settings),
        LearnerSpec("reference", args.model, trainable=False, settings=settings),
    ]
    roles = settings.build(specs, rank=0, world_size=1, address=("127.0.0.1", 0))
    algorithm = Preference.model_validate({"loss": {"name": "dpo", "beta": BETA}})

    def step(index: int) -> float:
        known = roles["reference"].annotate(examples, [Column.LOGPS])
        return roles["policy"].update(known, algorithm, UpdatePlan(step=index))["loss"]

    return step


def child(args: argparse.Namespace) -> dict[str, Any]:
    """One variant: seconds of the fastest step after a first one, which also allocates."""
    from transformers import AutoConfig

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    examples = pairs(args.pairs, AutoConfig.from_pretrained(args.model).vocab_size)
    step = plain_step(args, examples) if args.child == "plain" else our_step(args, examples, args.child == "packed")
    losses, times, busy = [], [], []
    for index in range(1 + args.steps):
        start, used = time.perf_counter(), time.process_time()
        losses.append(step(index))
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
    tokens = sum(len(row) for example in examples for row in example.sequences)
    found = {"tokens_s": tokens / min(times[1:]), "cpu_s": min(busy[1:]), "peak_gib": peak_gib()}
    return found | {"losses": losses, "tokens": tokens}


def measured(args: argparse.Namespace, variant: str, dtype: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", variant, "--dtypes", dtype, "--model", args.model]
    for name in ("pairs", "micro_pairs", "steps", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def processor() -> str:
    """The name of the processor, where the machine tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(args: argparse.Namespace) -> None:
    print(f"{args.pairs} pairs a step, {args.micro_pairs} a plain micro-batch; fastest of {args.steps} steps")
    print("CPU s is of all threads, for a machine that does other work at the same time")
    print(
        "".join(
            f"{title:>10}" for title in ("dtype", "step", "tokens/s", "ratio", "CPU s", "ratio", "peak GiB", "ratio")
        )
    )
    for dtype in args.dtypes.split(","):
        plain = None
        for variant in VARIANTS:
            row = measured(args, variant, dtype)
            plain = plain or row
            tolerance = 1e-4 if dtype == "float32" else 3e-2
            gap = max(abs(a - b) for a, b in zip(row["losses"], plain["losses"], strict=True))
            if gap > tolerance:
                raise SystemExit(f"{variant} does other work than the plain step: losses differ by {gap:.2g}")
            cells = [f"{row[name]:>10.{digits}f}{row[name] / plain[name]:>10.2f}" for name, digits in COLUMNS]
            print(f"{dtype:>10}{variant:>10}{''.join(cells)}", flush=True)
    known = versions()
    print(f"{plain['tokens']} tokens a step; {Path(args.model).name}; {args.threads} threads; {processor()}")
    print(", ".join(f"{name} {known[name]}" for name in sorted(known)))
    print(f"load before the last minute: {os.getloadavg()[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a Hugging Face causal language model")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the forward and backward pass")
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    parser.add_argument("--micro-pairs", type=int, default=4, help="of a plain micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after a first one")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = str(Path(args.model).expanduser())
    if args.child:
        args.dtype = args.dtypes
        print(json.dumps(child(args)))
    else:
        table(args)


if __name__ == "__main__":
    main()

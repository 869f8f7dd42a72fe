"""What the tests of self-play share: rows, a config, and what the files of a run say."""

from __future__ import annotations

import json

from rayalign.config import parse_config
from tests.parts import tiny_config

ROWS = 20  # 15 of them to train on
ITERATIONS, STEPS = 3, 3
WORDS = "film review story actor space opera happy sad love hate".split()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft_rows(count=ROWS):
    prompts = (f"write about {WORDS[i % 10]} {i}" for i in range(count))
    return [{"prompt": prompt, "completion": f"a {WORDS[i % 7]} film"} for i, prompt in enumerate(prompts)]


def self_play(tmp_path, model):
    """What makes the config of a tiny self-play run in this process, of rows and changes (keys with __ for dots)."""

    def build(rows=None, **changes):
        base = tiny_config(tmp_path, model)
        base |= {
            "algorithm": {"name": "spin", "iterations": ITERATIONS, "steps": STEPS, "lam": 1.0, "shard": 4},
            "data": {
                "examples": write(tmp_path / "sft.jsonl", sft_rows() if rows is None else rows),
                "chat_template": False,
                "held_out": 0.25,
                "max_tokens": 48,
            },
            "rollout": {"prompts": 5},
            "optimizer": {"lr": 2e-3},
            "evaluation": {"prompts": 3, "samples": 2},
        }
        del base["train"]
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = base
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return parse_config(base)

    return build


def generated(run_dir, iteration):
    """Row → answer, as the files say."""
    found = {}
    for path in sorted((run_dir / f"generations/iteration-{iteration}").glob("shard-*.jsonl")):
        for line in path.read_text().splitlines()[1:]:
            answer = json.loads(line)
            found[answer["row"]] = answer
    return found

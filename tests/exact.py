"""A language model whose whole output space can be enumerated, trained by the real loop, and where it should end.

Six tokens, one of which ends an answer; answers of one token, or of up to two: 6, or 31. Engine (transformers), scorer,
learner (torch), verified push and loop are those of any run; only the numbers are small. Rewards are a table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rayalign.api import run_training
from rayalign.config import parse_config
from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.types import Group, Judgement

TOKENS = ("<eos>", "a", "b", "c", "d", "e")
EOS = 0
REWARD = (0.3, 1.0, -0.5, 0.8, 0.0, -0.2)  # of an answer's first token
SECOND = (0.0, 0.4, -0.6, 0.2, 0.7, -0.3)  # and of its second
BETA = 0.5


def reward(answer: Sequence[int]) -> float:
    return REWARD[answer[0]] + (SECOND[answer[1]] if len(answer) > 1 else 0.0)


class Table(ScorerConfig):
    """Scores an answer by its tokens; `tokens`: and says what each of them gives."""

    name: str
    tokens: bool = False

    def start(self) -> ScoreFunction:
        def judged(group: Group) -> Judgement:
            rows = [[REWARD[c.token_ids[0]], *(SECOND[i] for i in c.token_ids[1:])] for c in group.completions]
            scores = tuple(map(sum, rows))
            return Judgement(scores, token_scores=tuple(map(tuple, rows)) if self.tokens else ())

        return lambda groups: [judged(group) for group in groups]


def build_model(folder: Path) -> Path:
    """A llama of one layer over six tokens, saved with its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        pad_token_id=EOS,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(str(folder))
    inner = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(str(folder))
    return folder


def answers(length: int) -> list[tuple[int, ...]]:
    """All of them, of at most so many tokens."""
    shorter = {(EOS,)}
    for count in range(2, length + 1):
        shorter |= {(*each, EOS) for each in product(range(1, len(TOKENS)), repeat=count - 1)}
    whole = {each for each in product(range(len(TOKENS)), repeat=length) if EOS not in each[:-1]}
    return sorted(shorter | whole)


@torch.no_grad()
def distribution(model: Path | str, prompt: Sequence[int], length: int) -> Tensor:
    """[A] the probability of each answer, float64."""
    network = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).double()
    found = []
    for answer in answers(length):
        ids = torch.tensor([[*prompt, *answer]])
        logps = network(input_ids=ids).logits[0].log_softmax(-1)
        at = range(len(prompt) - 1, ids.shape[1] - 1)
        found.append(sum(logps[i, ids[0, i + 1]] for i in at))
    return torch.stack(found).exp()


def optimum(start: Tensor, length: int, beta: float = BETA) -> Tensor:
    """π* ∝ π_ref·exp(r/β)."""
    rewards = torch.tensor([reward(answer) for answer in answers(length)], dtype=torch.float64)
    return (start.log() + rewards / beta).softmax(-1)


def preference_optimum(start: Tensor, tau: float) -> Tensor:
    """Where online IPO ends for answers of one token: π ∝ π_ref·exp(u/τ), u(y) = E_{y′∼π} σ(r(y) − r(y′))."""
    rewards = torch.tensor(REWARD, dtype=torch.float64)
    wins = torch.sigmoid(rewards.unsqueeze(1) - rewards)
    found = start.clone()
    for _ in range(20000):
        found = 0.9 * found + 0.1 * (start.log() + wins @ found / tau).softmax(-1)
    return found


def standardised_optimum(start: Tensor, samples: int, beta: float) -> Tensor:
    """Where GRPO's own objective is stationary for answers of one token: E[Σ_k A_k ∇log π(y_k)]/K = β·∇KL(π_ref‖π),
    by enumeration of all groups; A = (r − mean)/(std + 1e-6), and k3 in the loss has the gradient of KL(π_ref‖π)."""
    scores = torch.tensor(REWARD, dtype=torch.float64)
    groups = torch.tensor(list(product(range(len(TOKENS)), repeat=samples)))  # [G, K]
    own = scores[groups]
    spread = own.std(1, keepdim=True)
    advantage = torch.where(spread > 1e-12, (own - own.mean(1, keepdim=True)) / (spread + 1e-6), 0.0)
    logits = start.log().clone()
    for _ in range(20000):
        policy = logits.softmax(-1)
        weight = policy[groups].prod(1, keepdim=True) * advantage / samples  # [G, K]
        pull = torch.zeros_like(policy).index_add_(0, groups.flatten(), weight.flatten())
        move = pull - policy * pull.sum() - beta * (policy - start)
        logits = logits + 0.5 * move
        if move.abs().max() < 1e-12:
            break
    return logits.softmax(-1)


def variation(one: Tensor, other: Tensor) -> float:
    """Total variation distance."""
    return float((one - other).abs().sum() / 2)


def run(folder: Path, model: Path, algorithm: dict[str, Any], *, length: int, **changes: Any) -> tuple[Tensor, list]:
    """Train; the policy's answers [A], and the metrics of each step."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "a b"}) + "\n" for _ in range(64)))
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"prompts": str(prompts), "held_out": 0.0},
        "algorithm": algorithm,
        "scorer": {"name": "tests.exact:Table"},
        "sampling": {"max_tokens": length},
        "rollout": {"prompts": 8, "monitor": 0},
        "train": {"steps": 60},
        "optimizer": {"lr": 0.03, "schedule": "cosine"},
        "engine": {"name": "transformers", "max_context": 16, "max_running": 1024},
        "learner": {"name": "torch", "threads": 1},
        "placement": {"name": "local"},
        "evaluation": {"prompts": 0},
        "checkpoint": {"every": 0},
        "trackers": [],
        "run_dir": str(folder / "run"),
    }
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    result = run_training(parse_config(config))
    metrics = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = sorted((result.run_dir / "checkpoints").glob("step-*"))
    return distribution(steps[-1], (1, 2), length), metrics

"""A reward model: a checkpoint with a scalar head, as training one here writes it, or anybody's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from rayalign.data.files import content
from rayalign.data.groups import fit
from rayalign.data.tokens import Turns
from rayalign.engines.common import quiet_loading
from rayalign.errors import ConfigError, DataError, RayalignError, ScoreError
from rayalign.learners.settings import LearnerSettings, LearnerSpec
from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.sharding import split
from rayalign.types import Column, Example, Group
from rayalign.types import Sequence as Row

Ids = tuple[int, ...]


class RewardModelScorer(ScorerConfig):
    """A reward model (AutoModelForSequenceClassification with one label): the score of the last token.

    Prompt and answer become tokens by its own tokenizer, as those of a data set do in training, the token that ends
    an answer included: the score of a text is the one that the learner gave it. An answer that was cut is scored as
    if it had ended there. In bfloat16 the last product is one in float32. On a cluster with GPUs each of its actors
    takes one, unless `device: cpu`.
    """

    paper: ClassVar = "Ouyang et al. 2022, arXiv:2203.02155"
    name: Literal["reward_model"] = "reward_model"
    model: str = Field(
        description="folder of a checkpoint with one label, or a hub id", examples=["runs/reward/checkpoints/step-30"]
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="none: as the checkpoint is saved")
    chat_template: bool = Field(
        True, description="apply the model's chat template, as data.chat_template in its training"
    )
    max_tokens: int = Field(
        1024, ge=2, description="of prompt and answer; longer ones are cut, as data.max_tokens cuts in training"
    )
    micro_batch_tokens: int = Field(8192, ge=1, description="tokens that are scored at once, padding included")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="attention implementation of transformers")
    trust_remote_code: bool = Field(False, description="run code that the checkpoint brings")
    device: Literal["auto", "cpu"] = Field("auto", description="auto: a GPU where there is one")
    threads: int | None = Field(None, ge=1, description="CPU threads of one actor; none: its share")

    @property
    def gpus(self) -> int:
        return int(self.device == "auto")

    def check(self, model: str, *, trust_remote_code: bool = False) -> None:
        """What can be told without its weights: whether there is a checkpoint, and of one label. Raises ConfigError."""
        _check_checkpoint(self)

    def contents(self) -> dict[str, str]:
        own = content(Path(self.model).expanduser())
        return {"model": own} if own else {}

    def start(self) -> ScoreFunction:
        return _Scores(self)


class _Scores:
    """The ScoreFunction: groups → scores."""

    def __init__(self, config: RewardModelScorer):
        import torch
        from transformers import AutoTokenizer

        from rayalign.learners.models import resolve_dtype
        from rayalign.learners.score import ScoreNetwork

        _check_checkpoint(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        folder = str(Path(config.model).expanduser()) if Path(config.model).expanduser().is_dir() else config.model
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        self._turns = Turns(tokenizer, chat_template=config.chat_template)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        spec = LearnerSpec(
            "scorer",
            folder,
            dtype=config.dtype,
            trainable=False,
            settings=LearnerSettings(attention=config.attention),
            pad_id=pad,
            network="score",
            trust_remote_code=config.trust_remote_code,
        )
        self._config, self._pad = config, pad
        self._device = torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu")
        try:
            with quiet_loading():
                self._network = ScoreNetwork.load(spec, resolve_dtype(spec)).to(self._device)
        except RayalignError:
            raise
        except Exception as error:  # a file that is half a file fails in the reader of its format
            raise ConfigError(
                "the reward model cannot be loaded",
                where="key scorer.model",
                value=f"{config.model}: {type(error).__name__}: {error}",
                rule="a whole checkpoint, and the memory for it",
                remedy="look at its files; write them again if one is cut off",
            ) from error
        _head_in_float32(self._network)
        longest = getattr(self._network.model.config.get_text_config(), "max_position_embeddings", None)
        self._room = min(config.max_tokens, longest or config.max_tokens)

    def __call__(self, groups: Sequence[Group]) -> list[list[float]]:
        rows = [ids for group in groups for ids in self._tokens(group)]
        scores = iter(self._score(rows))
        return [[next(scores) for _ in group.texts] for group in groups]

    def _tokens(self, group: Group) -> list[Ids]:
        """Each completion with its prompt, as a row of a data set would be."""
        where = f"prompt {group.prompt.index}"
        messages = [dict(each) for each in group.prompt.messages] or [{"role": "user", "content": group.prompt.text}]
        try:
            prompt = self._turns.prompt(messages, where)
            answers = [self._turns.answer(messages, text, where) for text in group.texts]
        except DataError as error:
            raise ScoreError(
                f"the reward model's tokenizer: {error.what}",
                where=error.where,
                value=error.value,
                rule=error.rule,
                remedy="set scorer.chat_template as data.chat_template was when the reward model was trained",
            ) from error
        prompt, answers = fit(prompt, answers, self._room, begin=self._turns.tokenizer.bos_token_id)
        return [prompt + answer for answer in answers]

    def _score(self, rows: Sequence[Ids]) -> list[float]:
        """The value at the last token of each row."""
        import torch

        from rayalign.collate import collate

        if empty := [place for place, ids in enumerate(rows) if len(ids) < 2]:
            raise ScoreError(
                "there is nothing to score",
                where=f"completion {empty[0]} of the call",
                value=f"{len(rows[empty[0]])} tokens",
                rule="prompt and answer have two tokens at least",
                remedy="use a reward model whose tokenizer has an end token",
            )
        # Only the last token's value is wanted, so that it alone stands as the completion.
        examples = [Example((Row(ids[:-1], ids[-1:]),)) for ids in rows]
        budget = self._config.micro_batch_tokens
        found = [0.0] * len(rows)
        for micro in split([(len(ids),) for ids in rows], ranks=1, micro_batch_tokens=budget)[0]:
            batch = collate([examples[index] for index in micro], pad_id=self._pad)
            tensors = (batch.input_ids, batch.attention_mask, batch.labels, batch.positions, batch.mask)
            with torch.inference_mode():
                values = self._network(*(each.to(self._device) for each in tensors), (Column.VALUES,))
            for index, value in zip(micro, values[Column.VALUES.value][:, 0].float().tolist(), strict=True):
                found[index] = value
        return found


def _head_in_float32(network: Any) -> None:
    """The last product alone, so that in bfloat16 good answers and slightly better ones do not round to a tie."""
    if network.tokenwise:
        head = network.model.score.float()
        head.register_forward_pre_hook(lambda module, arguments: tuple(each.float() for each in arguments))


def _check_checkpoint(config: RewardModelScorer) -> None:
    """Raises ConfigError when the folder is none, or holds a policy or a classifier. A hub id that is not on this
    machine is looked at where it is loaded."""
    from transformers import AutoConfig

    path = Path(config.model).expanduser()
    if not path.is_dir() and (config.model.startswith((".", "/", "~")) or config.model.count("/") > 1):
        raise ConfigError(
            "there is no such folder",
            where="key scorer.model",
            value=config.model,
            rule="the checkpoint of a reward model",
            remedy="train one with algorithm: reward_model, and name a folder of its run: checkpoints/step-…",
        )
    try:
        known: Any = AutoConfig.from_pretrained(
            str(path) if path.is_dir() else config.model,
            trust_remote_code=config.trust_remote_code,
            local_files_only=not path.is_dir(),
        )
    except (OSError, ValueError, KeyError) as error:
        if not path.is_dir():
            return
        raise ConfigError(
            "this folder holds no model that can be read",
            where="key scorer.model",
            value=f"{config.model}: {' '.join(str(error).split())}",
            rule="config.json, tokenizer and weights of a reward model",
            remedy="name a folder of a reward model's run: checkpoints/step-…",
        ) from error
    kinds = known.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ConfigError(
            "this is no reward model",
            where="key scorer.model",
            value=f"{config.model}: saved as {', '.join(kinds) or 'unknown'}",
            rule="a model with a scalar head (…ForSequenceClassification); a policy's new head would score at random",
            remedy="train one with algorithm: reward_model, and name its checkpoint",
        )
    if known.num_labels != 1:
        raise ConfigError(
            "this is a classifier",
            where="key scorer.model",
            value=f"{config.model}: {known.num_labels} labels",
            rule="one label, the score",
            remedy="use a reward model, or score with scorer: {name: python, …}",
        )

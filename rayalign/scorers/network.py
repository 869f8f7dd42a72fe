"""Scorers that are networks: a checkpoint with a head for scores or classes, given prompt and answer as in training."""

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
from rayalign.scorers.base import ScorerConfig
from rayalign.sharding import split
from rayalign.types import Column, Example, Group
from rayalign.types import Sequence as Row

Ids = tuple[int, ...]


class NetworkScorer(ScorerConfig):
    """What scorers with a checkpoint of a score network share."""

    what: ClassVar[str] = "reward model"
    head: ClassVar[str] = "scalar head"
    algorithm: ClassVar[str] = "reward_model"  # that trains one
    labels: ClassVar[str] = "one label, the score"

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
        """What can be told without its weights: whether there is such a checkpoint. Raises ConfigError."""
        check_checkpoint(self)

    def contents(self) -> dict[str, str]:
        own = content(Path(self.model).expanduser())  # type: ignore[attr-defined]
        return {"model": own} if own else {}

    def fits(self, count: int) -> bool:
        """Whether so many labels are what it scores by."""
        return count == 1


class NetworkScores:
    """A loaded score network: groups → numbers of each completion."""

    def __init__(self, config: NetworkScorer):
        import torch
        from transformers import AutoConfig, AutoTokenizer

        from rayalign.learners.models import most_positions, resolve_dtype
        from rayalign.learners.score import ScoreNetwork

        known: Any = check_checkpoint(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        folder = str(Path(config.model).expanduser()) if Path(config.model).expanduser().is_dir() else config.model
        known = known or AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        self._turns = Turns(tokenizer, chat_template=config.chat_template, segments=True)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        spec = LearnerSpec(
            "scorer",
            folder,
            dtype=config.dtype,
            trainable=False,
            settings=LearnerSettings(attention=config.attention),
            pad_id=pad,
            network="score",
            classes=classes_of(known) if config.fits(2) else (),
            segments=self._turns.segments,
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
                f"the {config.what} cannot be loaded",
                where="key scorer.model",
                value=f"{config.model}: {type(error).__name__}: {error}",
                rule="a whole checkpoint, and the memory for it",
                remedy="look at its files; write them again if one is cut off",
            ) from error
        head_in_float32(self._network)
        self.model_config: Any = self._network.model.config
        longest = most_positions(self.model_config)
        self._room = min(config.max_tokens, longest or config.max_tokens)

    def __call__(self, groups: Sequence[Group]) -> list[Any]:
        """For each group a tensor [K, L] in float32: the score, or the classes' logits, of each completion."""
        rows = [row for group in groups for row in self._tokens(group)]
        return list(self._numbers(rows).split([len(group.texts) for group in groups]))

    def _tokens(self, group: Group) -> list[Row]:
        """Each completion with its prompt, as a row of a data set would be."""
        where = f"prompt {group.prompt.index}"
        messages = [dict(each) for each in group.prompt.messages] or [{"role": "user", "content": group.prompt.text}]
        try:
            prompt = self._turns.prompt(messages, where)
            answers = [self._turns.answer(messages, text, where) for text in group.texts]
        except DataError as error:
            raise ScoreError(
                f"the {self._config.what}'s tokenizer: {error.what}",
                where=error.where,
                value=error.value,
                rule=error.rule,
                remedy="set scorer.chat_template as data.chat_template was when the model was trained",
            ) from error
        prompt, answers = fit(prompt, answers, self._room, begin=self._turns.begin)
        # A row has a prompt and an answer, if it has two tokens: one of them may be empty without a template.
        whole = [prompt + answer for answer in answers]
        return [
            Row(prompt, answer) if prompt and answer else Row(ids[:-1], ids[-1:])
            for answer, ids in zip(answers, whole, strict=True)
        ]

    def _numbers(self, rows: Sequence[Row]) -> Any:
        import torch

        from rayalign.collate import collate

        if empty := [place for place, row in enumerate(rows) if len(row) < 2]:
            raise ScoreError(
                "there is nothing to score",
                where=f"completion {empty[0]} of the call",
                value=f"{len(rows[empty[0]])} tokens",
                rule="prompt and answer have two tokens at least",
                remedy=f"use a {self._config.what} whose tokenizer has an end token",
            )
        labels, budget = self._network.labels, self._config.micro_batch_tokens
        found = torch.zeros(len(rows), labels)
        for micro in split([(len(row),) for row in rows], ranks=1, micro_batch_tokens=budget)[0]:
            batch = collate([Example((rows[index],)) for index in micro], pad_id=self._pad)
            tensors = [
                each.to(self._device)
                for each in (batch.input_ids, batch.attention_mask, batch.labels, batch.positions, batch.mask)
            ]
            column = Column.VALUES if labels == 1 else Column.CLASSES
            with torch.inference_mode():
                values = self._network(*tensors, (column,))[column.value].float().cpu()
            found[list(micro)] = values.gather(1, batch.mask.sum(1, keepdim=True) - 1) if labels == 1 else values
        return found


def classes_of(known: Any) -> tuple[str, ...]:
    """The names of a classifier's classes, in the order of its logits."""
    return tuple(str(known.id2label[place]) for place in range(known.num_labels))


def head_in_float32(network: Any) -> None:
    """The last product alone, so that in bfloat16 good answers and slightly better ones do not round to a tie."""
    if network.tokenwise:
        head = network.model.score.float()
        head.register_forward_pre_hook(lambda module, arguments: tuple(each.float() for each in arguments))


def check_checkpoint(config: Any) -> Any:
    """The checkpoint's config.json; None for a hub id that is not on this machine: it is looked at as it is loaded.

    Raises:
        ConfigError: the folder is none, or holds a model with another head.
    """
    from transformers import AutoConfig

    path = Path(config.model).expanduser()
    if not path.is_dir() and (config.model.startswith((".", "/", "~")) or config.model.count("/") > 1):
        raise ConfigError(
            "there is no such folder",
            where="key scorer.model",
            value=config.model,
            rule=f"the checkpoint of a {config.what}",
            remedy=f"train one with algorithm: {config.algorithm}, and name a folder of its run: checkpoints/step-…",
        )
    try:
        known: Any = AutoConfig.from_pretrained(
            str(path) if path.is_dir() else config.model,
            trust_remote_code=config.trust_remote_code,
            local_files_only=not path.is_dir(),
        )
    except (OSError, ValueError, KeyError) as error:
        if not path.is_dir():
            return None
        raise ConfigError(
            "this folder holds no model that can be read",
            where="key scorer.model",
            value=f"{config.model}: {' '.join(str(error).split())}",
            rule=f"config.json, tokenizer and weights of a {config.what}",
            remedy=f"name a folder of a {config.what}'s run: checkpoints/step-…",
        ) from error
    kinds = known.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ConfigError(
            f"this is no {config.what}",
            where="key scorer.model",
            value=f"{config.model}: saved as {', '.join(kinds) or 'unknown'}",
            rule=f"a model with a {config.head} (…ForSequenceClassification); a policy's new head would score at "
            "random",
            remedy=f"train one with algorithm: {config.algorithm}, and name its checkpoint",
        )
    if not config.fits(known.num_labels):
        one = known.num_labels == 1
        raise ConfigError(
            "this is a reward model" if one else "this is a classifier",
            where="key scorer.model",
            value=f"{config.model}: {known.num_labels} label{'' if one else 's'}",
            rule=config.labels,
            remedy="score with scorer: {name: reward_model, …}, or train a classifier with algorithm: disagreement"
            if one
            else "score with scorer: {name: dpm, …}, or use a reward model",
        )
    return known

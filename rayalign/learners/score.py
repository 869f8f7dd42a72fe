"""A head for scores or classes on any backbone: reward models, critics, and classifiers of answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayalign.errors import ConfigError
from rayalign.learners.columns import Teacher, refused, scattered
from rayalign.learners.models import CausalPolicy
from rayalign.learners.network import Network, load_pretrained
from rayalign.learners.packing import unfit
from rayalign.learners.score_model import check_labels, last_layer, start, unknown, values_tokens
from rayalign.learners.settings import LearnerSpec
from rayalign.learners.vision import VisionPolicy, sees
from rayalign.types import AnyColumn, Column

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ScoreNetwork(Network):
    """AutoModelForSequenceClassification: VALUES of completion tokens with one label, CLASSES with several.

    On a decoder the head is applied to the last hidden state of each completion token: the score of what has been
    read so far, and at the last token that of the whole. An encoder scores only the whole, by its own pooling:
    there every completion token of a row holds that one score. The logits of several classes are those of the whole.

    Args:
        model: the Hugging Face model.
        gradient_checkpointing: recompute layers in the backward pass.
        packing: see Network; encoders cannot be packed.
        pad_id: what rows are padded with; exported as the model's own, unless it is an end token.
        segments: an encoder is told which tokens are the completion's, where it has token types.

    Attributes:
        temperature: the logits of classes are divided by it, here and in exports.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        gradient_checkpointing: bool = False,
        packing: bool = False,
        pad_id: int = 0,
        segments: bool = False,
    ):
        super().__init__(model, gradient_checkpointing=gradient_checkpointing, packing=packing)
        self._pad_id, self.labels, self.temperature = pad_id, int(model.config.num_labels), 1.0
        self._typed = segments and (getattr(model.config, "type_vocab_size", None) or 0) > 1
        self._last = last_layer(model, self.labels)
        self.eval()
        self.tokenwise = values_tokens(model)
        if packing and not self.tokenwise:
            raise unfit(model, "it scores a row as a whole")
        self._check_head()
        self._check_packing()

    @classmethod
    def load(cls, spec: LearnerSpec, dtype: torch.dtype) -> ScoreNetwork:
        """From a saved one, or, to train, from any language model; its new head is drawn from the spec's seed.

        Raises:
            ConfigError: no model, one with other labels, weights missing beside the head, or the head missing where
                it is not to be trained.
        """
        from transformers import AutoModelForSequenceClassification

        what, count = ("classifier", len(spec.classes)) if spec.classes else ("reward model", 1)
        check_labels(spec)
        with torch.random.fork_rng(devices=[]):
            model, missing = load_pretrained(
                AutoModelForSequenceClassification, spec, dtype, f"language model or {what}", num_labels=count
            )
        if spec.classes:
            model.config.id2label = dict(enumerate(spec.classes))
            model.config.label2id = {name: place for place, name in enumerate(spec.classes)}
            model.config.problem_type = "single_label_classification"
            if spec.class_weights:
                model.config.class_weights = list(spec.class_weights)
        backbone = f"{model.base_model_prefix}."
        beside = [name for name in missing if name.startswith(backbone) and ".pooler." not in name]
        if beside:
            raise ConfigError(
                f"the {spec.role} model is not whole",
                where=f"{spec.role}.model",
                value=f"{spec.model}: without {', '.join(beside[:3])}",
                rule="all weights of the backbone; only the head may be new",
                remedy=f"give a checkpoint of a language model, or of a {what}",
            )
        if missing and not spec.trainable:
            raise ConfigError(
                f"this is a language model: it has no {'head for classes' if spec.classes else 'scalar head'}",
                where=f"{spec.role}.model",
                value=f"{spec.model}: without {', '.join(missing[:3])}",
                rule=f"a saved {what}, where nothing is trained; a new head would score at random",
                remedy=f"give a checkpoint of a {what}, say model=runs/a/checkpoints/step-200",
            )
        start(model, missing, spec.seed)
        model.requires_grad_(spec.trainable)
        checkpointing = spec.settings.gradient_checkpointing and spec.trainable
        return cls(
            model,
            gradient_checkpointing=checkpointing,
            packing=spec.settings.packing,
            pad_id=spec.pad_id,
            segments=spec.segments,
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        positions: Tensor,
        mask: Tensor,
        columns: Sequence[AnyColumn],
        temperature: float = 1.0,
        chunk: int = 2048,
        teacher: Teacher | None = None,
        teaching: bool = False,
    ) -> dict[str, Tensor]:
        """See Network.forward. The columns are VALUES and, of a decoder, STATE_VALUES, in the unit of the score; or
        with several labels CLASSES. The temperature plays no part."""
        own = (Column.VALUES, Column.STATE_VALUES) if self.labels == 1 else (Column.CLASSES,)
        wrong = [column for column in columns if column not in own or not (self.tokenwise or column is own[0])]
        if wrong or teaching:
            raise refused("a score network", wrong[0] if wrong else Column.REFERENCE_KL)
        keep = mask.bool()
        if Column.CLASSES in own:
            return {Column.CLASSES.value: self._classes(input_ids, attention_mask, positions, keep)}
        if not self.tokenwise:
            scores = self._pooled(input_ids, attention_mask, positions)[:, 0]
            return {Column.VALUES.value: scattered(keep, [scores.unsqueeze(1).expand(keep.shape)[keep]])[0]}
        found = {}
        for column in columns:
            # `positions` predict the labels; the value of having read the label is one further on.
            at = positions + 1 if column is Column.VALUES else positions
            values = self.model.score(self._states(input_ids, attention_mask, at, keep))[:, 0]
            found[column.value] = scattered(keep, [values])[0]
        return found

    def _classes(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        """[R, L] of the whole sequences, in float32."""
        if not self.tokenwise:
            return self._pooled(input_ids, attention_mask, positions).float() / self.temperature
        last = torch.zeros_like(keep).scatter_(1, keep.sum(1, keepdim=True).clamp(min=1) - 1, True)
        return self.model.score(self._states(input_ids, attention_mask, positions + 1, last)).float() / self.temperature

    def _pooled(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """[R, L] by an encoder's own forward pass."""
        types = {}
        if self._typed:
            place = torch.arange(input_ids.shape[1], device=input_ids.device)
            types["token_type_ids"] = (place > positions[:, :1]).long() * attention_mask
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raises ConfigError when the model scores in another way than `forward` does."""
        ids = torch.arange(1, 5, device=self.model.device).unsqueeze(0)
        ones = torch.ones_like(ids)
        want = self._own_score(ids, ones)
        if want.shape != (1, self.labels):
            raise unknown(self.model)
        if self.tokenwise:
            got = self.model.score(self._hidden(ids, ones)[:, -1]).float()
        else:  # a pooling that does not look at the mask would score the padding
            nothing = torch.zeros_like(ids[:, :2])
            got = self._own_score(torch.cat([ids, nothing], 1), torch.cat([ones, nothing], 1))
        if (got - want).abs().max() > 1e-2 * (1e-3 + want.abs().max()):
            raise unknown(self.model)

    def _own_score(self, ids: Tensor, ones: Tensor) -> Tensor:
        """By the model's own forward pass, whatever its pad id is: it looks for the last token that is another."""
        config = self.model.config.get_text_config()
        before, config.pad_token_id = config.pad_token_id, None
        try:
            extra = {"use_cache": False} if self.tokenwise else {}
            return self.model(input_ids=ids, attention_mask=ones, **extra).logits.float()
        finally:
            config.pad_token_id = before

    def finished(self, name: str, tensor: Tensor) -> Tensor:
        """The last layer's weights divided by the temperature, so that whoever loads the export has it applied."""
        if self.temperature == 1.0 or name not in self._last:
            return tensor
        return tensor.float() / self.temperature

    def export(self, path: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """A sequence-classification checkpoint whose own forward pass gives the score of the last token."""
        super().export(path, state, dtype)
        file = path / "config.json"
        config = json.loads(file.read_text())
        pad = self._exported_pad()
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["pad_token_id"] = pad
        config.pop("fitted_temperature", None)
        if self.temperature != 1.0:
            config["fitted_temperature"] = self.temperature  # for people: it is in the weights already
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _exported_pad(self) -> int | None:
        """A token that no sequence ends with. Decoders' own forward pass takes the score at the last token that is
        not padding: with the end token for padding, that of the token before the end. Without a better one none
        is named: transformers then scores one sequence at a time, rightly, and refuses to score several."""
        config = self.model.config.get_text_config()
        ends = config.eos_token_id
        ends = set(ends) if isinstance(ends, list | tuple) else {ends}
        if not self.tokenwise:
            return self._pad_id
        fitting = [each for each in (self._pad_id, config.pad_token_id, config.bos_token_id) if each is not None]
        return next((each for each in fitting if each not in ends), None)


def load_network(spec: LearnerSpec, dtype: torch.dtype) -> Network:
    """The network that the spec names, from its checkpoint. Raises ConfigError."""
    if spec.network == "score":
        return ScoreNetwork.load(spec, dtype)
    return (VisionPolicy if sees(spec) else CausalPolicy).load(spec, dtype)

"""A scalar head on any backbone: reward models and critics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rayalign.errors import ConfigError
from rayalign.learners.columns import Teacher, refused, scattered
from rayalign.learners.models import CausalPolicy
from rayalign.learners.network import Network, load_pretrained
from rayalign.learners.packing import unfit
from rayalign.learners.settings import LearnerSpec
from rayalign.learners.vision import VisionPolicy, sees
from rayalign.types import AnyColumn, Column

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ScoreNetwork(Network):
    """AutoModelForSequenceClassification with one label: VALUES of completion tokens.

    On a decoder the head is applied to the last hidden state of each completion token: the score of what has been
    read so far, and at the last token that of the whole. An encoder scores only the whole, by its own pooling:
    there every completion token of a row holds that one score.

    Args:
        model: the Hugging Face model.
        gradient_checkpointing: recompute layers in the backward pass.
        packing: see Network; encoders cannot be packed.
        pad_id: what rows are padded with; exported as the model's own, unless it is an end token.
    """

    def __init__(
        self, model: PreTrainedModel, *, gradient_checkpointing: bool = False, packing: bool = False, pad_id: int = 0
    ):
        super().__init__(model, gradient_checkpointing=gradient_checkpointing, packing=packing)
        self._pad_id = pad_id
        self.eval()
        self.tokenwise = isinstance(getattr(model, "score", None), nn.Linear)
        if packing and not self.tokenwise:
            raise unfit(model, "it scores a row as a whole")
        self._check_head()
        self._check_packing()

    @classmethod
    def load(cls, spec: LearnerSpec, dtype: torch.dtype) -> ScoreNetwork:
        """From a saved reward model, or, to train, from any language model; its new head is drawn from the spec's seed.

        Raises:
            ConfigError: no model, a classifier with several labels, weights missing beside the head, or the head
                missing where it is not to be trained.
        """
        from transformers import AutoModelForSequenceClassification

        _check_labels(spec)
        with torch.random.fork_rng(devices=[]):
            model, missing = load_pretrained(
                AutoModelForSequenceClassification, spec, dtype, "language model or reward model", num_labels=1
            )
        backbone = f"{model.base_model_prefix}."
        beside = [name for name in missing if name.startswith(backbone) and ".pooler." not in name]
        if beside:
            raise ConfigError(
                f"the {spec.role} model is not whole",
                where=f"{spec.role}.model",
                value=f"{spec.model}: without {', '.join(beside[:3])}",
                rule="all weights of the backbone; only the head may be new",
                remedy="give a checkpoint of a language model, or of a reward model",
            )
        if missing and not spec.trainable:
            raise ConfigError(
                "this is a language model: it has no scalar head",
                where=f"{spec.role}.model",
                value=f"{spec.model}: without {', '.join(missing[:3])}",
                rule="a saved reward model, where nothing is trained; a new head would score at random",
                remedy="give a checkpoint of a reward model, say model=runs/a/checkpoints/step-200",
            )
        _start(model, missing, spec.seed)
        model.requires_grad_(spec.trainable)
        checkpointing = spec.settings.gradient_checkpointing and spec.trainable
        packing = spec.settings.packing
        return cls(model, gradient_checkpointing=checkpointing, packing=packing, pad_id=spec.pad_id)

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
        """See Network.forward. The only column is VALUES, in the unit of the score; the temperature plays no part."""
        wrong = [column for column in columns if column is not Column.VALUES]
        if wrong or teaching:
            raise refused("a score network", wrong[0] if wrong else Column.REFERENCE_KL)
        keep = mask.bool()
        if self.tokenwise:
            # `positions` predict the labels; the value is that of having read the label, one further on.
            hidden = self._states(input_ids, attention_mask, positions + 1, keep)
            values = self.model.score(hidden)[:, 0]
        else:
            scores = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0]
            values = scores.unsqueeze(1).expand(keep.shape)[keep]
        return {Column.VALUES.value: scattered(keep, [values])[0]}

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raises ConfigError when the model scores in another way than `forward` does."""
        ids = torch.arange(1, 5, device=self.model.device).unsqueeze(0)
        ones = torch.ones_like(ids)
        want = self._own_score(ids, ones)
        if want.shape != (1, 1):
            raise _unknown(self.model)
        if self.tokenwise:
            got = self.model.score(self._hidden(ids, ones)[:, -1]).float()
        else:  # a pooling that does not look at the mask would score the padding
            nothing = torch.zeros_like(ids[:, :2])
            got = self._own_score(torch.cat([ids, nothing], 1), torch.cat([ones, nothing], 1))
        if (got - want).abs().max() > 1e-2 * (1e-3 + want.abs().max()):
            raise _unknown(self.model)

    def _own_score(self, ids: Tensor, ones: Tensor) -> Tensor:
        """By the model's own forward pass, whatever its pad id is: it looks for the last token that is another."""
        config = self.model.config.get_text_config()
        before, config.pad_token_id = config.pad_token_id, None
        try:
            extra = {"use_cache": False} if self.tokenwise else {}
            return self.model(input_ids=ids, attention_mask=ones, **extra).logits.float()
        finally:
            config.pad_token_id = before

    def export(self, path: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """A sequence-classification checkpoint whose own forward pass gives the score of the last token."""
        super().export(path, state, dtype)
        file = path / "config.json"
        config = json.loads(file.read_text())
        pad = self._exported_pad()
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["pad_token_id"] = pad
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


def _check_labels(spec: LearnerSpec) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError):
        return  # loading the model says what is wrong
    kinds = config.architectures or []
    if any(kind.endswith("ForSequenceClassification") for kind in kinds) and config.num_labels != 1:
        raise ConfigError(
            f"the {spec.role} model is a classifier",
            where=f"{spec.role}.model",
            value=f"{spec.model}: {config.num_labels} labels",
            rule="a reward model has one label; a language model gets a new head",
            remedy="give a language model, or a reward model saved by training one",
        )


@torch.no_grad()
def _start(model: Any, missing: Sequence[str], seed: int) -> None:
    """A head that the checkpoint lacks: small and random, a function of the seed alone; scores start near 0."""
    own = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed % 2**63)
    for name in missing:
        parameter = own[name]
        if parameter.ndim < 2:
            parameter.zero_()
            continue
        inputs = parameter.shape[-1]
        # The last layer starts smaller: hidden states have norm √H, so that scores have a spread of 1/√H.
        spread = 1.0 / (inputs + 1) if parameter.shape[0] == 1 else inputs**-0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


def _unknown(model: PreTrainedModel) -> ConfigError:
    return ConfigError(
        "this architecture makes its score in a way that is not known here",
        value=type(model).__name__,
        rule="one score: a linear head of the last hidden state, or of an encoder's pooled state",
        remedy="use another model, or add what it does to rayalign/learners/score.py",
    )


def load_network(spec: LearnerSpec, dtype: torch.dtype) -> Network:
    """The network that the spec names, from its checkpoint. Raises ConfigError."""
    if spec.network == "score":
        return ScoreNetwork.load(spec, dtype)
    return (VisionPolicy if sees(spec) else CausalPolicy).load(spec, dtype)

"""Sequence-classification models as score networks need them: their labels, where heads start, their last layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rayalign.errors import ConfigError
from rayalign.learners.settings import LearnerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_labels(spec: LearnerSpec) -> None:
    """Raises ConfigError when the checkpoint is a classifier with other labels than the spec wants."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError):
        return  # loading the model says what is wrong
    if not any(kind.endswith("ForSequenceClassification") for kind in config.architectures or []):
        return
    if not spec.classes and config.num_labels != 1:
        raise ConfigError(
            f"the {spec.role} model is a classifier",
            where=f"{spec.role}.model",
            value=f"{spec.model}: {config.num_labels} labels",
            rule="a reward model has one label; a language model gets a new head",
            remedy="give a language model, or a reward model saved by training one",
        )
    names = tuple(str(config.id2label[place]) for place in range(config.num_labels))
    unnamed = all(name == f"LABEL_{place}" for place, name in enumerate(names))
    if spec.classes and names != spec.classes and not (unnamed and len(names) == len(spec.classes)):
        one = len(names) == 1
        raise ConfigError(
            f"the {spec.role} model {'gives one score' if one else 'has other classes'}",
            where=f"{spec.role}.model",
            value=f"{spec.model}: {'1 label' if one else ', '.join(names)}",
            rule=f"the classes {', '.join(spec.classes)} in this order; a language model gets a new head",
            remedy="give a language model"
            + ("" if one else f", or set algorithm.classes=[{', '.join(names)}], in this order"),
        )


@torch.no_grad()
def start(model: Any, missing: Sequence[str], seed: int) -> None:
    """A head that the checkpoint lacks: small and random, a function of the seed alone; scores start near 0."""
    own = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed % 2**63)
    last = last_layer(model, int(model.config.num_labels))
    norms = {f"{name}.weight" for name, module in model.named_modules() if "Norm" in type(module).__name__}
    for name in missing:
        parameter = own[name]
        if parameter.ndim < 2:
            parameter.fill_(float(name in norms))
            continue
        inputs = parameter.shape[-1]
        # The last layer starts smaller: hidden states have norm √H, so that scores have a spread of 1/√H.
        spread = 1.0 / (inputs + 1) if name in last else inputs**-0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


def last_layer(model: PreTrainedModel, labels: int) -> tuple[str, ...]:
    """Names of the weights of the last linear layer, which makes the logits: outside the backbone, as wide as there
    are labels."""
    backbone = f"{model.base_model_prefix}."
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == labels and not name.startswith(backbone)
    ]
    return tuple(f"{layers[-1]}.{part}" for part in ("weight", "bias")) if layers else ()


def values_tokens(model: PreTrainedModel) -> bool:
    """Whether its head scores at each token what was read so far, as a decoder's does; an encoder scores the whole."""
    return isinstance(getattr(model, "score", None), torch.nn.Linear)


def unknown(model: PreTrainedModel) -> ConfigError:
    return ConfigError(
        "this architecture makes its score in a way that is not known here",
        value=type(model).__name__,
        rule="one score, or logits of classes: a linear head of the last hidden state, or of an encoder's pooled state",
        remedy="use another model, or add what it does to rayalign/learners/score.py",
    )

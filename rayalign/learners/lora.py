"""LoRA (Hu et al. 2021) by peft: adapters of low rank beside frozen weights, and what a role calls its own.

One model serves several roles. The policy is the model with its adapter; the reference is the same model without
any adapter as long as it is the initial policy, and with a second, frozen adapter once it follows the policy.
What leaves a learner under Hugging Face names is merged: W + alpha/rank · B·A, one matrix at a time, with W as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayalign.errors import ConfigError
from rayalign.learners.network import Network
from rayalign.learners.score import load_network
from rayalign.learners.settings import LearnerSpec
from rayalign.learners.vision import encoder_of

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."  # as peft names them


@dataclass(frozen=True)
class Weight:
    """One weight of a role: its Hugging Face name, the parameters that it is made of, and how.

    `value` may be called while all of `parameters` are whole.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    value: Callable[[], Tensor]


class Part:
    """What a role calls its own in a network: here everything."""

    def __init__(self, network: Network):
        self.network = network

    def active(self) -> AbstractContextManager:
        """While it lasts, the network computes this role's numbers."""
        return nullcontext()

    def own(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that no other role has: what is saved, restored and blended."""
        return self.network.named_weights()

    def weights(self) -> Iterator[Weight]:
        """All weights that make this role's numbers, under their Hugging Face names, tied ones once."""
        for name, parameter in self.network.named_weights():
            yield Weight(name, (parameter,), parameter.detach)


class AdapterPart(Part):
    """A network's frozen weights with one adapter, or with none.

    Args:
        adapter: name of the adapter; None: the weights as they are without.
        head: whether parameters outside the adapters that are trained belong to this role.
    """

    def __init__(self, network: Network, adapter: str | None, *, head: bool):
        super().__init__(network)
        self.adapter, self._head = adapter, head
        self._layers = _layers(network.model)

    @contextmanager
    def active(self) -> Iterator[None]:
        # peft's public switches also turn requires_grad of the adapters off and on, which would pull parameters
        # from under an optimiser that has them. Its layers read these two attributes, and nothing else.
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self._layers.values()]
        try:
            for layer in self._layers.values():
                layer._disable_adapters = self.adapter is None
                layer._active_adapter = [] if self.adapter is None else [self.adapter]
            yield
        finally:
            for layer, (disabled, active) in zip(self._layers.values(), before, strict=True):
                layer._disable_adapters, layer._active_adapter = disabled, active

    def own(self) -> Iterator[tuple[str, nn.Parameter]]:
        ending = f".{self.adapter}.weight"
        for name, parameter in self.network.named_weights():
            if ".lora_" in name:
                if self.adapter is not None and name.endswith(ending):
                    yield f"{name.removesuffix(ending)}.weight", parameter
            elif self._head and in_head(self.network.model, name):
                yield name, parameter

    def weights(self) -> Iterator[Weight]:
        for name, parameter in self.network.named_weights():
            path, _, kind = name.rpartition(".base_layer.")
            if path and kind == "weight" and self.adapter is not None:
                layer = self._layers[path]
                low, high = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
                parts = (parameter, low, high)
                yield Weight(f"{path}.weight", parts, lambda layer=layer, parts=parts: self._merged(layer, *parts))
            elif ".lora_" not in name:
                yield Weight(f"{path}.{kind}" if path else name, (parameter,), parameter.detach)

    @torch.no_grad()
    def _merged(self, layer: Any, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """In float32 at least: a push rounds it once."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        delta = high.to(dtype) @ low.to(dtype)
        return weight.to(dtype) + (delta.T if layer.fan_in_fan_out else delta) * layer.scaling[self.adapter]


def part_of(spec: LearnerSpec, network: Network) -> Part:
    """What the role of `spec` calls its own in its network, or in that of the role that it shares one with."""
    if spec.shares is not None:
        known = {name for layer in _layers(network.model).values() for name in layer.lora_A}
        return AdapterPart(network, spec.role if spec.role in known else None, head=False)
    if spec.lora is not None:
        return AdapterPart(network, spec.role, head=True)
    return Part(network)


def load_adapted(spec: LearnerSpec, dtype: torch.dtype) -> Network:
    """The network that the spec names, in `dtype`, with adapters where it asks for them. Raises ConfigError."""
    network = load_network(spec, dtype)
    if getattr(network.model, "_hf_peft_config_loaded", False):  # transformers does that, under names of its own
        raise ConfigError(
            f"the {spec.role} model is an adapter with the path of its model",
            where=f"{spec.role}.model",
            value=spec.model,
            rule="a whole model",
            remedy="train with model.lora.merge=true, or merge it: peft's merge_and_unload, then save_pretrained",
        )
    if spec.lora is not None:
        attach(network, spec)
    if spec.value_head:
        network.add_value_head()
    return network


def attach(network: Network, spec: LearnerSpec) -> None:
    """Freeze the network's weights and put adapters beside them: one for each of `spec.adapters`, all the same
    function of the seed, and for a score network the head is trained in full.

    Raises:
        ConfigError: a target that matches no linear layer.
    """
    from peft import LoraConfig as PeftConfig
    from peft.tuners.lora import LoraModel

    model, lora = network.model, spec.lora
    chosen, targets, excluded = _targets(model, spec)
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        exclude_modules=excluded or None,
        fan_in_fan_out=not any(isinstance(model.get_submodule(name), nn.Linear) for name in chosen),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed % 2**63)
        tuner = LoraModel(model, config, spec.role)
        for other in spec.adapters:
            tuner.peft_config[other] = config
            tuner.inject_adapter(model, other)
    layers = _layers(model)
    if set(layers) != chosen:
        wrong = sorted(set(layers) ^ chosen)
        raise _unfit("peft adapts other layers than those that are named", spec, ", ".join(wrong[:3]))
    for layer in layers.values():
        for other in spec.adapters:
            for matrices in (layer.lora_A, layer.lora_B):
                matrices[other].load_state_dict(matrices[spec.role].state_dict())
        layer._active_adapter, layer._disable_adapters = [spec.role], False
    for name, parameter in model.named_parameters():
        own = f".{spec.role}.weight" in name if ".lora_" in name else in_head(model, name)
        parameter.requires_grad_(spec.trainable and own)
        if ".lora_" in name:
            parameter.data = parameter.data.to(model.dtype)
    network.register_state_dict_post_hook(_without_frozen)


def _without_frozen(network: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Checkpoints hold no frozen weights. DeepSpeed leaves them out itself, but for the other names of tied ones."""
    for name, parameter in network.named_parameters(prefix=prefix.rstrip("."), remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(name, None)


def in_head(model: Any, name: str) -> bool:
    """Whether a parameter or module belongs to the scalar head of a score network, an encoder's pooler included.
    A language model's head is none: it stays as it is."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return False
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def _layers(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _targets(model: Any, spec: LearnerSpec) -> tuple[set[str], list[str], list[str]]:
    """(full names of the layers to adapt, targets and exclusions as peft is told them)."""
    from transformers.pytorch_utils import Conv1D

    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    output = model.get_output_embeddings()
    heads = {name for name in linear if in_head(model, f"{name}.") or model.get_submodule(name) is output}
    seeing = encoder_of(model)
    if seeing is not None and not spec.settings.train_vision:
        inside = set(seeing.modules())
        heads |= {name for name in linear if model.get_submodule(name) in inside}
    usual = linear - heads
    leaves = sorted({name.rpartition(".")[2] for name in usual})
    targets = leaves if spec.lora.targets == "all-linear" else list(spec.lora.targets)

    def meant(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    for target in targets:
        if not any(meant(name, target) for name in usual):
            raise _unfit("no linear layer of the model has this name", spec, target, ", ".join(leaves))
    chosen = {name for name in usual if any(meant(name, target) for target in targets)}
    return chosen, targets, sorted(name for name in heads if any(meant(name, target) for target in targets))


def _unfit(what: str, spec: LearnerSpec, value: str, known: str = "") -> ConfigError:
    return ConfigError(
        what,
        where="key model.lora.targets",
        value=value,
        rule=f"linear layers below the head: {known}" if known else "linear layers below the head",
        remedy=f"set model.lora.targets=all-linear, or names that {spec.model} has",
    )


def settings_of(spec: LearnerSpec) -> dict[str, Any] | None:
    """What a checkpoint has to share with the config that resumes from it."""
    return None if spec.lora is None else spec.lora.model_dump(mode="json", exclude={"merge"})


def export_adapter(path: Path, network: Network, spec: LearnerSpec, tensors: Mapping[str, Tensor]) -> None:
    """Into the folder adapter/; and where nothing is merged, into `path` itself. A config.json beside it would make
    transformers look for a whole model there."""
    save_adapter(path / "adapter", network, spec, tensors)
    if not spec.lora.merge:
        save_adapter(path, network, spec, tensors)


def save_adapter(path: Path, network: Network, spec: LearnerSpec, tensors: Mapping[str, Tensor]) -> None:
    """A folder that peft loads: `tensors` are those of `Part.own`, whole."""
    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    heads = sorted({name.rpartition(".")[0] for name in tensors if ".lora_" not in name})
    config = copy.copy(network.model.peft_config[spec.role])
    config.base_model_name_or_path = spec.model
    config.task_type = "SEQ_CLS" if spec.network == "score" else "CAUSAL_LM"
    config.modules_to_save, config.inference_mode = heads or None, True
    config.save_pretrained(str(path))
    found = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(found, path / WEIGHTS, metadata={"format": "pt"})

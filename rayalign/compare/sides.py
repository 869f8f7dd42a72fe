"""The two sides of a comparison: which weights they are, and on which prompts both are asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign.build import examples_for, load_tokenizer, prompts_for
from rayalign.checkpoint import Checkpoints
from rayalign.config import load_config
from rayalign.errors import ConfigError
from rayalign.schema import Config
from rayalign.types import Prompt


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        given: what the user called it.
        model: folder of its weights, or a hub id.
        config: of the run that made them; None for a checkpoint that lies alone.
    """

    given: str
    model: str
    config: Path | None

    def record(self) -> dict[str, Any]:
        return {"given": self.given, "model": self.model}


def find_side(given: str, where: str) -> Side:
    """The newest checkpoint of a run, or a checkpoint itself.

    Args:
        where: what an error calls it: RUN_A.

    Raises:
        ConfigError: there is no such folder, or no model in it.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        if given.startswith((".", "/", "~")) or given.count("/") > 1 or (folder.parent.is_dir() and "/" in given):
            raise ConfigError(
                "there is no such folder",
                where=where,
                value=given,
                rule="the folder of a run, of one of its checkpoints, or of a model; or a hub id",
                remedy="look at the runs that there are: ls runs",
            )
        return Side(given, given, None)
    if (folder / "config.json").is_file():
        _refuse_score_model(folder, where)
        config = folder.resolve().parent.parent / "config.yaml"
        of_run = folder.resolve().parent.name == "checkpoints" and config.is_file()
        return Side(given, str(folder.resolve()), config if of_run else None)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            "this is neither a run nor a checkpoint",
            where=where,
            value=given,
            rule="a folder with the config.yaml of a run, or with the config.json of a model",
            remedy=_nearest_run(folder),
        )
    newest = Checkpoints(folder / "checkpoints", keep=1).newest()
    if newest is None or not (newest / "config.json").is_file():
        raise ConfigError(
            "this run has no checkpoint" if newest is None else "this run's newest checkpoint holds no model",
            where=where,
            value=given if newest is None else str(newest),
            rule="checkpoints/step-N with config.json and weights in the run's folder",
            remedy=_nearest_run(folder / "stages", "let it reach one: rayalign train … resume=true"),
        )
    _refuse_score_model(newest, where)
    return Side(given, str(newest.resolve()), (folder / "config.yaml").resolve())


def _refuse_score_model(folder: Path, where: str) -> None:
    """Raises ConfigError for a model with a scalar head, as reward models are."""
    try:
        names = json.loads((folder / "config.json").read_text()).get("architectures") or ()
    except (ValueError, AttributeError):
        return  # what is wrong with it says whoever loads it
    if any("SequenceClassification" in name for name in names):
        raise ConfigError(
            "this model gives scores and writes no answers",
            where=where,
            value=f"{folder}, {', '.join(names)}",
            rule="a language model",
            remedy="compare policies; a reward model can be the scorer: scorer={name: reward_model, model: …}",
        )


def _nearest_run(folder: Path, otherwise: str = "give the folder of a run, as runs/demo") -> str:
    """A run right below, as the folder of a run in stages has some."""
    below = sorted(each.parent for each in folder.glob("*/config.yaml"))
    return f"did you mean {below[-1]}?" if below else otherwise


def refuse_same(a: Side, b: Side) -> None:
    """Raises ConfigError when both are the same weights."""
    if a.model == b.model:
        raise ConfigError(
            "this is the same model twice",
            where="RUN_B",
            value=f"{a.given} and {b.given}, both {a.model}",
            rule="two models",
            remedy="give another run, another checkpoint of it (runs/a/checkpoints/step-10), or the model that it "
            "began with",
        )


@dataclass(frozen=True)
class Contest:
    """What both sides are asked.

    Attributes:
        config: whose engine, sampling, scorer and seed are used.
        prompts: of each side, the same ones, as tokens of its own tokenizer.
        tokenizers: of each side.
    """

    config: Config
    prompts: tuple[tuple[Prompt, ...], tuple[Prompt, ...]]
    tokenizers: tuple[Any, Any]


def contest_of(a: Side, b: Side, config: str | Path | None, overrides: list[str]) -> Contest:
    """The held-out prompts of a config: of the one that is given, else of the run that side A, or else B, comes from.

    Raises:
        ConfigError: there is no config, no scorer, nothing held out, or the runs hold out different prompts.
    """
    path = config or a.config or b.config
    if path is None:
        raise ConfigError(
            "nothing says what the two are asked",
            where="RUN_A, RUN_B",
            value=f"{a.given}, {b.given}: checkpoints that lie alone",
            rule="a run's folder, whose config.yaml names prompts, scorer and sampling; or a config",
            remedy="add --config my.yaml",
        )
    said = load_config(path, overrides)
    if said.scorer is None:
        raise ConfigError(
            "nothing says which answer is better",
            where="key scorer",
            value="nothing",
            rule="a judge, or any other scorer",
            remedy="add 'scorer={name: rules, rule: vader}', say, or scorer.name=… and its keys",
        )
    tokenizers = load_tokenizer(said, a.model), load_tokenizer(said, b.model)
    prompts = held_out(said, tokenizers[0]), held_out(said, tokenizers[1])
    if config is None and a.config is not None and b.config is not None:
        of_b = load_config(b.config, _of_data(overrides))
        of_b = of_b.model_copy(update={"evaluation": of_b.evaluation.model_copy(update={"prompts": None})})  # all
        _refuse_learned(a, b, prompts[0], held_out(of_b, tokenizers[1]))
    common = {prompt.index for prompt in prompts[0]} & {prompt.index for prompt in prompts[1]}
    first, second = (tuple(prompt for prompt in some if prompt.index in common) for some in prompts)
    if any(prompt.images for prompt in first):
        raise ConfigError(
            "engines here see no images",
            where="key data",
            value="held-out prompts with images",
            rule="prompts of texts",
            remedy="add --config with prompts without images",
        )
    if not common:
        raise ConfigError(
            "nothing is held out",
            where="key data.held_out",
            value=said.data.held_out,
            rule="above 0, and evaluation.prompts above 0, so that there are prompts that neither has learned from",
            remedy="add data.held_out=0.2 evaluation.prompts=40, or --config with prompts of another file",
        )
    return Contest(said, (first, second), tokenizers)


def held_out(config: Config, tokenizer: Any) -> tuple[Prompt, ...]:
    """evaluation.prompts of the held-out prompts, or where a run knows rows only, of the prompts of held-out rows."""
    if config.data.prompts is not None:
        return prompts_for(config, tokenizer).held_out[: config.evaluation.prompts]
    examples = examples_for(config, tokenizer)
    room = config.engine.max_context - config.sampling.max_tokens
    found = {row.prompt.token_ids: row.prompt for row in (examples.held_out if examples else ())}
    return tuple(prompt for ids, prompt in found.items() if len(ids) <= room)[: config.evaluation.prompts]


def _of_data(overrides: list[str]) -> list[str]:
    """Those that say which prompts are held out: they hold for both runs."""
    return [each for each in overrides if each.startswith(("data.", "evaluation.", "engine.", "sampling.", "model."))]


def _refuse_learned(a: Side, b: Side, first: tuple[Prompt, ...], second: tuple[Prompt, ...]) -> None:
    """Raises ConfigError when B does not hold out what both are asked: it may have learned from it."""
    texts = [{(prompt.index, prompt.text) for prompt in some} for some in (first, second)]
    if texts[0] <= texts[1]:
        return
    raise ConfigError(
        "the two runs hold out different prompts",
        where="RUN_B",
        value=f"{len(texts[0] & texts[1])} in common, of {len(texts[0])} of {a.given} and {len(texts[1])} of {b.given}",
        rule="the same held-out prompts: else one may have learned from what both are asked",
        remedy="add --config CONFIG with prompts that neither has learned from",
    )

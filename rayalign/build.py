"""The composition root: a checked config → the objects of a run. Nothing else knows what is behind a protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from rayalign.console import Console
from rayalign.cpu import slow_bfloat16
from rayalign.data.examples import ExampleSet, load_examples
from rayalign.data.prompts import PromptSet, load_prompts
from rayalign.data.tokens import Turns
from rayalign.data.votes import Classes
from rayalign.errors import ConfigError
from rayalign.learners.base import LearnerSpec
from rayalign.learners.models import most_positions
from rayalign.memory import peak_gib
from rayalign.protocols import Engine, Roles, Scorer, needs_reference
from rayalign.reference_cache import cached_reference, fingerprint
from rayalign.rollouts import Collector
from rayalign.schema import Config
from rayalign.scorers.base import LocalScorer
from rayalign.selfplay.contest import Unscored

MODEL, CRITIC = "model.path", "algorithm.critic.model"  # keys that name a checkpoint


@dataclass(frozen=True)
class Parts:
    """What is started for a run: learners, and engine and scorer where something is sampled; wherever they live."""

    engine: Engine | None
    scorer: Scorer | None
    roles: Roles
    turns: bool
    memory: Callable[[], float]


def load_tokenizer(config: Config, path: str | None = None, key: str = MODEL) -> Any:
    """The tokenizer of the model, or of another checkpoint that a key names. Raises ConfigError when it has none."""
    from transformers import AutoTokenizer

    where = model_path(path or config.model.path, key)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError and KeyError for the same thing
        raise _not_loaded("tokenizer", where, error, key) from error


def load_processor(config: Config) -> Any:
    """What turns the images of rows into tokens. Raises ConfigError when the model, or the algorithm, sees none."""
    from transformers import AutoProcessor

    where = model_path(config.model.path)
    if config.algorithm.network != "causal":
        raise ConfigError(
            "a model with a scalar head sees no images",
            where="key data.examples",
            value=f"rows with images, for {config.algorithm.name}",
            rule="rows of texts for a network with a scalar head",
            remedy="take the column of images out of the data, or use another algorithm",
        )
    try:
        found = AutoProcessor.from_pretrained(where, trust_remote_code=config.model.trust_remote_code)
    except ImportError as error:
        raise ConfigError(
            "the model's processor needs a library that is not here",
            where="key model.path",
            value=" ".join(str(error).split())[:200],
            rule="what the processor imports is installed",
            remedy="pip install it (torchvision, say, in the version that goes with torch)",
        ) from error
    except Exception as error:
        raise _not_loaded("processor", where, error) from error
    if not hasattr(found, "image_processor"):
        raise ConfigError(
            "this model sees no images, and the data has some",
            where="key model.path",
            value=where,
            rule="a vision-language model with its processor, as LLaVA or Qwen2-VL",
            remedy="use such a model, or take the column of images out of the data",
        )
    return found


def empty_score_model(config: Config, path: str, key: str) -> Any:
    """What a checkpoint's config.json makes as a score network, without storage. Raises ConfigError when there is
    none where the key says."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    where, trusted = model_path(path, key), {"trust_remote_code": config.model.trust_remote_code}
    try:
        known = AutoConfig.from_pretrained(where, **trusted)
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(known, **trusted)
    except Exception as error:  # transformers raises OSError, ValueError and KeyError for the same thing
        raise _not_loaded("score model", where, error, key) from error


def _not_loaded(what: str, where: str, error: Exception, key: str = MODEL) -> ConfigError:
    found, remedy = where, "check the id and the network, or download the model and give its folder"
    if Path(where).is_dir():
        found += f"; transformers says: {' '.join(str(error).split())}"
        remedy = "save it again: model and tokenizer .save_pretrained(folder)"
    return ConfigError(
        f"no {what} could be loaded from there",
        where=f"key {key}",
        value=found,
        rule=f"a folder with a Hugging Face {what} that transformers can read, or a hub id that can be reached",
        remedy=remedy,
    )


def model_path(path: str, key: str = MODEL) -> str:
    """With ~ expanded. What looks like a folder has to be one. Raises ConfigError."""
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        if not (expanded / "config.json").is_file():
            raise ConfigError(
                "this folder holds no model",
                where=f"key {key}",
                value=path,
                rule="config.json, tokenizer and weights in it",
                remedy=_nearest_model(expanded),
            )
        return str(expanded.resolve())
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(
            "there is no such folder",
            where=f"key {key}",
            value=path,
            rule="a folder with a Hugging Face checkpoint",
            remedy="launch/demo.sh makes the demo's model; else give the path of yours"
            if key == MODEL
            else f"correct {key}, or take it out",
        )
    return path


def _nearest_model(folder: Path) -> str:
    """A checkpoint right below, as in a run's folder, or in the cache of a hub."""
    below = sorted(each.parent for each in folder.glob("*/config.json")) or sorted(
        each.parent for each in folder.glob("*/*/config.json")
    )
    return f"did you mean {below[-1]}?" if below else "give the folder that holds config.json"


def longest_context(config: Config) -> int | None:
    """Tokens that the model has positions for; None where its config does not say. Raises ConfigError."""
    return most_positions(_text_config(config))


def vocabulary_size(config: Config) -> int:
    """Raises ConfigError."""
    return _text_config(config).vocab_size


def _text_config(config: Config) -> Any:
    from transformers import AutoConfig

    where = model_path(config.model.path)
    try:
        known = AutoConfig.from_pretrained(where, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:
        raise _not_loaded("model", where, error) from error
    return known.get_text_config()


def prompts_for(config: Config, tokenizer: Any) -> PromptSet:
    """Prompts that leave room for a completion; all of them held out where the algorithm learns from a data set,
    and none where nothing is sampled at all. Raises DataError."""
    if config.data.prompts is None:
        return PromptSet((), (), 0)
    room = config.engine.max_context - config.sampling.max_tokens
    gold = getattr(config.algorithm, "takes_gold", False)
    longest = _longest_row(config) if gold else None
    found = load_prompts(config.data, tokenizer, max_prompt_tokens=room, gold=gold, max_tokens=longest)
    whole = tuple(sorted((*found.training, *found.held_out), key=lambda prompt: prompt.index))
    if getattr(config.algorithm, "unscored", False):  # they are all completed, and nothing is evaluated
        return replace(found, training=whole, held_out=())
    if config.algorithm.request(config.sampling.sampling()):
        return found
    return replace(found, training=(), held_out=whole)


def _longest_row(config: Config) -> int:
    """Tokens of prompt and answer that the learner takes. Raises ConfigError."""
    return min(config.data.max_tokens, longest_context(config) or config.data.max_tokens)


def examples_for(config: Config, tokenizer: Any) -> ExampleSet | None:
    """The rows that an offline algorithm learns from; None for one that learns from its samples. Raises DataError."""
    if config.algorithm.request(config.sampling.sampling()):
        return None
    return load_examples(
        config.data,
        tokenizer,
        kinds=config.algorithm.rows,
        max_tokens=_longest_row(config),
        seed=config.seed,
        processor=lambda: load_processor(config),
        images=getattr(config.algorithm, "images", False),
        ties=getattr(config.algorithm, "takes_ties", False),
        gold=getattr(config.algorithm, "takes_gold", False),
        classes=Classes(getattr(config.algorithm, "classes", ()), getattr(config.algorithm, "ratings", None)),
        segments=config.algorithm.network == "score",
    )


def decoder(tokenizer: Any) -> Callable[[Any], str]:
    """Token ids → the text that a scorer sees: without special tokens."""
    return lambda token_ids: tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()


def collector_for(config: Config, parts: Parts, tokenizer: Any) -> Collector | None:
    if parts.engine is None or (parts.scorer is None and not config.self_play):
        return None
    return Collector(parts.engine, parts.scorer or Unscored(), decoder(tokenizer))


@contextmanager
def start_parts(
    config: Config, tokenizer: Any, run_dir: Path, console: Console, *, policy: str | None = None, train: bool = True
) -> Iterator[Parts]:
    """Engine, scorer and learners, here or as Ray actors; all ended when left, however it is left.

    Args:
        policy: a checkpoint other than config.model to start the policy from.
        train: whether the policy gets an optimiser.
    """
    specs = learner_specs(config, tokenizer, policy=policy, train=train) if config.learns else []
    engine = config.engine.model_copy(update={"dtype": config.engine.dtype or config.model.dtype})
    arguments = {
        "model": model_path(policy or config.model.path),
        "seed": config.seed,
        "trust_remote_code": config.model.trust_remote_code,
    }
    with ExitStack() as stack:
        if config.placement.name == "local":
            parts = _start_here(config, engine, arguments, specs, stack)
        else:
            from rayalign.runtime.start import start_actors

            parts = Parts(*start_actors(config, engine, arguments, specs, run_dir / "log", console.say, stack))
        if not _on_gpus(config) and slow_bfloat16() and "bfloat16" in config.dtypes:
            console.say("this CPU computes bfloat16 in software, many times slower: set model.dtype=float32")
        yield _with_lent_engine(config, parts, tokenizer)


def _on_gpus(config: Config) -> bool:
    """Whether there are any where engines and learners were started."""
    if config.placement.name == "local":
        return torch.cuda.is_available()
    from rayalign.runtime import cluster

    return any(node.gpus for node in cluster.nodes())


def _with_lent_engine(config: Config, parts: Parts, tokenizer: Any) -> Parts:
    """With the scorer that asks the policy's engine, where it is one."""
    if not config.lends_engine:
        return parts
    from rayalign.scorers.lent import CountedEngine, LentScorer

    engine: Any = CountedEngine(parts.engine)
    longest, gap = config.engine.max_context, default_max_gap(config)
    scorer = LentScorer(config.scorer, engine, parts.roles, tokenizer, max_context=longest, max_gap=gap)
    return replace(parts, engine=engine, scorer=scorer)


def _start_here(
    config: Config, engine: Any, arguments: dict[str, Any], specs: list[LearnerSpec], stack: ExitStack
) -> Parts:
    learners = config.learner.build(specs, rank=0, world_size=1, address=("127.0.0.1", 0)) if specs else {}
    for learner in learners.values():
        stack.callback(learner.close)
    roles = Roles(**{role: learners.get(role) for role in ("policy", "reference", "critic")})
    started = scorer = None
    if config.samples:
        started = engine.build(name="engine-0", cores=None, **arguments)
        stack.callback(started.close)
    if config.scorer_actors:
        scorer = LocalScorer(config.scorer)
        stack.callback(scorer.close)
    return Parts(started, scorer, roles, False, peak_gib)


def learner_specs(config: Config, tokenizer: Any, *, policy: str | None, train: bool) -> list[LearnerSpec]:
    """One for each role that the algorithm needs, the policy first, each with its own settings.

    Args:
        tokenizer: None for a plan, which builds nothing: padding and segments of an encoder are then not known.
    """
    shared = {
        "settings": config.learner,
        "temperature": learner_temperature(config),
        "total_steps": config.train.steps,
        "pad_id": _pad_id(tokenizer),
        "trust_remote_code": config.model.trust_remote_code,
        "seed": config.seed,
    }
    dtype = config.learner.dtype or config.model.dtype
    initial = model_path(config.model.path)
    start = model_path(policy) if policy else initial
    # What is cached are rows to learn from; an evaluation of another checkpoint asks the reference itself.
    reference = needs_reference(config.algorithm) and not (train and has_cached_reference(config))
    reference = reference or (config.samples and (config.evaluation.reference or not train))  # for the KL to it
    lora = config.model.lora if train else None  # a checkpoint that is evaluated has it merged
    # With adapters, the initial policy is in the policy's model already.
    beside = not config.learner.is_apart("reference")
    shares = "policy" if lora and reference and beside and start == initial else None
    follows = shares and any(config.algorithm.refresh(step) is not None for step in range(1, config.train.steps + 1))
    critic = getattr(config.algorithm, "critic", None)
    specs = [
        LearnerSpec(
            "policy",
            start,
            dtype=dtype,
            trainable=train,
            optimizer=config.optimizer if train else None,
            network=config.algorithm.network,
            classes=tuple(getattr(config.algorithm, "classes", ())),
            class_weights=tuple(getattr(config.algorithm, "class_weights", ())),
            segments=config.algorithm.network == "score"
            and tokenizer is not None
            and Turns(tokenizer, chat_template=config.data.chat_template, segments=True).segments,
            lora=lora,
            value_head=bool(train and critic is not None and critic.shared),
            adapters=("reference",) if follows else (),
            **shared,
        )
    ]
    if reference:
        specs.append(LearnerSpec("reference", initial, dtype=dtype, trainable=False, shares=shares, **shared))
    if critic is not None and not critic.shared and train:
        from_model, optimizer = model_path(critic.model, CRITIC) if critic.model else initial, config.critic_optimizer()
        specs.append(LearnerSpec("critic", from_model, dtype=dtype, optimizer=optimizer, network="score", **shared))
    return [replace(spec, settings=config.learner.of_role(spec.role)) for spec in specs]


def _pad_id(tokenizer: Any) -> int:
    """Of the tokenizer, or any other token."""
    if tokenizer is None:
        return 0
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def learner_temperature(config: Config) -> float:
    """At which log-probs are taken: the rollouts' where the algorithm learns from its samples, 1 for a data set, and
    for one that says so."""
    if getattr(config.algorithm, "untempered", False):
        return 1.0
    sampling = config.sampling.sampling()
    return sampling.temperature or 1.0 if config.algorithm.request(sampling) else 1.0  # greedy samples have some too


def has_cached_reference(config: Config) -> bool:
    """Whether log-probs of the reference are computed once, so that no reference stands beside the policy."""
    return getattr(getattr(config.algorithm, "reference", None), "cached", False)


def with_cached_reference(config: Config, roles: Roles, examples: ExampleSet, say: Callable[[str], None]) -> Roles:
    """The log-probs of all rows that this run annotates, from the policy before its first step, as its reference."""
    algorithm, steps, count = config.algorithm, config.train.steps, config.rollout.prompts
    # Rows that mean the same in every pass are looked at once, not once a pass.
    once = getattr(algorithm, "by_row", False) and examples.rows is not None and examples.rows < steps * count
    taken = examples.once(count) if once else (examples.step(step, count) for step in range(steps))
    parts = (algorithm.examples(groups)[0] for groups in taken)
    held_out = algorithm.examples(examples.held_out[: config.evaluation.rows])[0]
    known = fingerprint(
        examples.fingerprint,
        model_path(config.model.path),
        dtype=config.learner.dtype or config.model.dtype,
        learner=config.learner.name,
        temperature=learner_temperature(config),
    )
    file = Path("~/.cache/rayalign/reference").expanduser() / f"{known}.npz"
    return replace(roles, reference=cached_reference(chain(parts, [held_out]), roles.policy, file, say))


def default_max_gap(config: Config) -> float:
    """Nats, mean over the probe: float32 engines and learners agree closely, 16-bit kernels round apart."""
    if config.sync.max_gap is not None:
        return config.sync.max_gap
    return 1e-3 if config.dtypes == {"float32"} and not torch.cuda.is_available() else 0.15

"""Whether the parts of a config fit together, and whether the data are enough: all that one key alone cannot tell."""

from __future__ import annotations

import os

from rayalign.build import (
    CRITIC,
    empty_score_model,
    learner_specs,
    load_tokenizer,
    longest_context,
    model_path,
    vocabulary_size,
)
from rayalign.config.rounds import STAGE
from rayalign.data.examples import ExampleSet
from rayalign.data.prompts import PromptSet
from rayalign.decoding.diverse_beam import check_search
from rayalign.engines.common import end_token_ids
from rayalign.errors import ConfigError
from rayalign.learners.models import most_positions
from rayalign.learners.score_model import values_tokens
from rayalign.learners.settings import LearnerSettings
from rayalign.schema import Config
from rayalign.scorers.connection import Connection, key_of_server
from rayalign.scorers.mix import parts_of
from rayalign.types import Column


def check_training(config: Config) -> None:
    """What one key alone cannot tell: whether the parts of a training fit together. Raises ConfigError."""
    check_parts(config)
    if config.scored and hasattr(config.scorer, "check_files"):
        config.scorer.check_files()
    _check_split(config, "learner.ranks", config.learner.ranks)
    _check_split(config, "train.minibatches", config.train.minibatches)
    check_roles(config)
    if config.train.stop is not None and not config.evaluation.every:
        raise ConfigError(
            "evaluations before and after say nothing of when to stop",
            where="key train.stop",
            value="evaluation.every=0",
            rule="evaluations in the course of the run, which train.stop compares",
            remedy="set evaluation.every=10, say, or take train.stop out",
        )
    if config.scored and config.evaluation.prompts and config.evaluation.samples < 2 and _relative(config):
        raise ConfigError(
            "evaluations would measure nothing",
            where="key evaluation.samples",
            value=config.evaluation.samples,
            rule="at least 2 with a judge that compares answers to the same prompt, or a rule beside it",
            remedy="set evaluation.samples=2, and scorer.report_agreement to see whether the policy gets better",
        )
    least = getattr(config.algorithm, "min_candidates", 0)
    if config.scored and config.evaluation.prompts and config.evaluation.samples < least:
        raise ConfigError(
            "evaluations would measure no ranking",
            where="key evaluation.samples",
            value=config.evaluation.samples,
            rule=f"at least algorithm.min_candidates={least}, as of a prompt with fewer nothing is ranked",
            remedy=f"set evaluation.samples={least}, or lower min_candidates",
        )
    _check_probabilities(config)
    if config.sampling.temperature == 0 and config.algorithm.request(config.sampling.sampling()):
        raise ConfigError(
            "greedy samples of one prompt are all the same",
            where="key sampling.temperature",
            value=0,
            rule="above 0 when an algorithm learns from its own samples",
            remedy="set sampling.temperature=1.0",
        )


def _check_probabilities(config: Config) -> None:
    """A loss of probabilities alone, beside a model that could give them: that it is not asked to is an oversight,
    unless the config says what they are then. Raises ConfigError."""
    algorithm = config.algorithm
    if not getattr(algorithm, "takes_ties", False) or "unrated" in algorithm.model_fields_set:
        return
    asked = [(key, scorer) for key, scorer in parts_of(config.scorer) if hasattr(scorer, "preferences")]
    samples = bool(algorithm.request(config.sampling.sampling()))
    if not (config.scored and samples and asked) or any(scorer.preferences for _, scorer in asked):
        return
    raise ConfigError(
        "the loss learns from probabilities, and the scorer is not asked for them",
        where=f"key {asked[0][0]}.preferences",
        value=False,
        rule="true, so that soft labels are those of the annotators' classes, or algorithm.unrated, which says what "
        "they are without: bradley_terry, by the difference of scores",
        remedy="set scorer.preferences=true",
    )


def _check_split(config: Config, key: str, parts: int) -> None:
    """Whether the examples of a step are as many as the ranks or minibatches that a key says. Raises ConfigError."""
    prompts, algorithm = config.rollout.prompts, config.algorithm
    each = algorithm.samples if getattr(algorithm, "each_answer", False) else 1
    if parts > prompts * each:
        most = f"rollout.prompts={prompts}" if each == 1 else f"rollout.prompts × algorithm.samples = {prompts * each}"
        raise ConfigError(
            "the batch cannot be split so far",
            where=f"key {key}",
            value=parts,
            rule=f"at most {most}, so that each part has an example",
            remedy=f"set rollout.prompts={-(-parts // each)}, or lower {key}",
        )


def check_critic(config: Config) -> None:
    """Whether a critic of another checkpoint reads the policy's tokens, all of them, and values each: a run's check, as
    a plan needs no tokenizer. Raises ConfigError."""
    path = getattr(getattr(config.algorithm, "critic", None), "model", None)
    if path is None or path.startswith(STAGE):  # what a stage will train is trained from the policy's own tokens
        return
    own, other = load_tokenizer(config).get_vocab(), load_tokenizer(config, path, CRITIC).get_vocab()
    if foreign := sorted(token for token, number in own.items() if other.get(token) != number):
        raise ConfigError(
            "the critic reads other tokens than the policy writes",
            where=f"key {CRITIC}",
            value=f"{path}: {len(foreign):,} of the policy's {len(own):,} tokens are none of its own, or have another "
            f"number, as {foreign[0]!r}",
            rule="a model with the policy's tokenizer; it may have further tokens",
            remedy="start it as the policy (take algorithm.critic.model out), or as a reward model trained from it",
        )
    model = empty_score_model(config, path, CRITIC)
    if not values_tokens(model):
        raise ConfigError(
            "the critic gives no value to each token",
            where=f"key {CRITIC}",
            value=f"{path}: {type(model).__name__}",
            rule="a decoder, whose head scores what it has read so far; an encoder scores an answer as a whole",
            remedy="start it as the policy (take algorithm.critic.model out), or as a reward model that is a decoder",
        )
    longest, context = most_positions(model.config), config.engine.max_context
    if longest and longest < context:
        raise ConfigError(
            "the critic has no room for the policy's context",
            where=f"key {CRITIC}",
            value=f"{path}: {longest} positions, as its config says",
            rule=f"at least engine.max_context={context}: it values each token that the policy reads or writes",
            remedy=f"set engine.max_context={longest}, or start the critic as a model with more positions",
        )


def check_roles(config: Config) -> None:
    """Whether roles that have settings of their own are there, and can have them. Raises ConfigError."""
    learner, roles = config.learner, getattr(config.learner, "roles", {})
    specs = {spec.role: spec for spec in learner_specs(config, None, policy=None, train=True)} if roles else {}
    for role, own in roles.items():
        key, spec = f"learner.roles.{role}", specs.get(role)
        if spec is None:
            raise ConfigError(
                f"this run has no {role}",
                where=f"key {key}",
                value=f"settings for a {role}",
                rule=f"roles that {config.algorithm.name} needs as it is set here, the policy apart: "
                + (", ".join(sorted(set(specs) - {"policy"})) or "none"),
                remedy=f"take {key} out",
            )
        for name in ("gradient_checkpointing", "offload") if not spec.trainable else ():
            if getattr(own, name, None) not in (None, False, "none"):
                raise ConfigError(
                    f"the {role} is not trained: it has no gradients and no optimiser",
                    where=f"key {key}.{name}",
                    value=getattr(own, name),
                    rule=f"zero_stage, micro_batch_tokens, logprob_chunk, ranks and apart for the {role}",
                    remedy=f"take it out; zero_stage=3 shares the {role} out over the ranks",
                )
        if learner.is_apart(role):
            _check_apart(config, role, spec.settings)


def _check_apart(config: Config, role: str, settings: LearnerSettings) -> None:
    """A role in actors of its own: there are actors, it has work for all of them, and nothing needs it beside the
    policy."""
    if config.placement.name == "local":
        raise ConfigError(
            "all roles live in this process",
            where=f"key learner.roles.{role}",
            value="apart, or with ranks of its own",
            rule="beside the policy with placement: local",
            remedy=f"set placement=ray, or take apart and ranks out of learner.roles.{role}",
        )
    _check_split(config, f"learner.roles.{role}.ranks", getattr(settings, "ranks", 1))
    if role == "reference" and Column.REFERENCE_KL in config.algorithm.columns:
        raise ConfigError(
            "the loss has the exact KL to the reference in it, over the whole vocabulary",
            where="key learner.roles.reference",
            value="a reference in actors of its own",
            rule="a reference beside the policy, which has its logits at each position",
            remedy="take apart and ranks out of learner.roles.reference, or the KL out of the loss",
        )


def _relative(config: Config) -> bool:
    return getattr(config.scorer, "relative", False)


def _check_stop(config: Config, prompts: PromptSet, examples: ExampleSet | None) -> None:
    """Whether anything is evaluated that could end the run early. Raises ConfigError."""
    evaluation, rows = config.evaluation, examples.held_out if examples is not None else ()
    answered = prompts.held_out or (rows if config.self_play else ())
    if config.train.stop is None or (answered and evaluation.prompts) or (rows and evaluation.rows):
        return
    remedy = "data.held_out=0.1"
    if rows or prompts.held_out:
        remedy = "evaluation.rows=200" if rows else "evaluation.prompts=40"
    raise ConfigError(
        "nothing is evaluated that could say when to stop",
        where="key train.stop",
        value=f"data.held_out={config.data.held_out:g}, evaluation.prompts={evaluation.prompts}, "
        f"evaluation.rows={evaluation.rows}: no prompt and no row",
        rule="prompts or rows that are held out, whose evaluations train.stop compares",
        remedy=f"set {remedy}, say, or take train.stop out",
    )


def check_rollouts(config: Config, prompts: PromptSet, examples: ExampleSet | None) -> None:
    """Whether the prompts, or the rows, are enough for one step, and have what the algorithm wants of them; and whether
    any are held out where the end of the run hangs on them.

    Raises:
        ConfigError: there are too few.
        DataError: a row of the first step lacks something.
    """
    _check_stop(config, prompts, examples)
    if examples is not None:
        if examples.known_rows is not None and examples.known_rows < config.rollout.prompts:
            raise ConfigError(
                "there are fewer rows than one step takes",
                where="key rollout.prompts",
                value=config.rollout.prompts,
                rule=f"at most {examples.known_rows}, the training rows of data.examples",
                remedy="lower rollout.prompts, lower data.held_out, or use more rows",
            )
        if examples.rows is not None:  # the loss may want a column that they do not have
            config.algorithm.examples(examples.step(0, config.rollout.prompts))
        return
    if len(prompts.training) < config.rollout.prompts:
        raise ConfigError(
            "there are not enough training prompts for one rollout",
            where="key rollout.prompts",
            value=config.rollout.prompts,
            rule=f"at most {len(prompts.training)}, the training prompts of {config.data.prompts}",
            remedy="lower rollout.prompts, lower data.held_out, or use more prompts",
        )


def check_parts(config: Config) -> None:
    """Whether engine and learner fit the placement and the model. Raises ConfigError."""
    here = config.placement.name == "local"
    for key, value in (("learner.ranks", config.learner.ranks), ("engine.count", config.engine.count)):
        if here and value > 1:
            raise ConfigError(
                "one process holds one of each",
                where=f"key {key}",
                value=value,
                rule="1 with placement: local",
                remedy=f"set placement=ray, or {key}=1",
            )
    if config.samples:
        _check_context(config)
        _check_search(config)


def check_labelling(config: Config) -> None:
    """Whether the parts of a labelling, or a generation, fit together: nothing is trained in it. Raises ConfigError."""
    if getattr(config.algorithm, "unscored", False):
        check_parts(config)
        return
    if config.scorer is None:
        raise ConfigError(
            "nothing says which answers are better",
            where="key scorer",
            value="nothing",
            rule="a scorer, whose word the data set is to have",
            remedy="set scorer: {name: rules, rule: vader}, say",
        )
    if config.sampling.temperature == 0 and config.algorithm.samples > 1:
        raise ConfigError(
            "greedy samples of one prompt are all the same",
            where="key sampling.temperature",
            value=0,
            rule="above 0 with several samples a prompt",
            remedy="set sampling.temperature=1.0",
        )
    if config.lends_engine and not config.samples:
        raise ConfigError(
            "no policy's engine is there to be asked",
            where="key scorer.ask",
            value="the policy, where answers of data.examples are labelled",
            rule="an engine of the judge's own, or a server, with algorithm.samples=0",
            remedy="set scorer.ask={name: engine, model: …}",
        )
    if stream := next((source for source in config.data.examples if source.stream), None):
        raise ConfigError(
            "a stream cannot be labelled",
            where="key data.examples",
            value=f"{stream.path} with stream: true",
            rule="data whose rows are known, so that each is labelled once",
            remedy="take stream out, or write the stream's first rows to a file",
        )
    check_parts(config)


def check_scorer(config: Config) -> None:
    """Whether the scorer finds what it needs, keys included where it runs here, before anything is started.

    Raises ConfigError.
    """
    if not (getattr(config.placement, "address", None) or os.environ.get("RAY_ADDRESS")):
        for place, scorer in parts_of(config.scorer) if config.scored else ():
            for where, asked in ((place, scorer), (f"{place}.ask", getattr(scorer, "ask", None))):
                if isinstance(asked, Connection):
                    key_of_server(asked, where)
    if config.scored and hasattr(config.scorer, "check"):
        config.scorer.check(model_path(config.model.path), trust_remote_code=config.model.trust_remote_code)


def _check_search(config: Config) -> None:
    """Whether the model's vocabulary has as many continuations as a search wants."""
    sampling = config.sampling.sampling()
    if sampling.search is not None:
        where, trusted = model_path(config.model.path), config.model.trust_remote_code
        check_search(
            sampling,
            vocabulary=vocabulary_size(config),
            end_ids=end_token_ids(where, trust_remote_code=trusted),
            where="key sampling.beams",
            error=ConfigError,
        )


def _check_context(config: Config) -> None:
    longest = longest_context(config)
    context = config.engine.max_context
    if longest and context > longest:
        raise ConfigError(
            "the model has no room for such a context",
            where="key engine.max_context",
            value=context,
            rule=f"at most {longest}, as the model's config says",
            remedy=f"set engine.max_context={longest}",
        )
    if config.sampling.max_tokens >= context:
        raise ConfigError(
            "completions would fill the context",
            where="key sampling.max_tokens",
            value=config.sampling.max_tokens,
            rule=f"below engine.max_context={context}, so that a prompt fits before it",
            remedy="raise engine.max_context, or lower sampling.max_tokens",
        )

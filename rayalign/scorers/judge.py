"""A language model as the judge: it compares two answers in both orders, or rates one, by the probabilities of the
tokens that it may answer with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from rayalign.data.files import content
from rayalign.record import Unfit
from rayalign.scorers.asking import AnyAsker, Asker
from rayalign.scorers.base import AT_ONCE, ScorerConfig
from rayalign.scorers.judging import JudgeRules, Judging
from rayalign.scorers.templates import Template, is_elsewhere, load_template

WAVES = 8  # of requests in one call: with 45 s for each, as a server may take, well within deadline_s
TOGETHER = 16  # requests of a wave of an engine, which takes as many at once as a server is asked
USUAL = {"pairwise": "helpful", "direct": "helpful_score"}


class Judge(JudgeRules, ScorerConfig):
    """An AI judge: pairwise, two answers compared in both orders; direct, the expected rating of one answer.

    Pairwise gives soft preferences P(i ≻ j), and as scores the mean probability of being better than another answer
    to the same prompt: their mean is ½ whatever the policy is, in evaluations too. What tells whether a policy gets
    better is `report_agreement`, whose rule's score is recorded beside, or `rayalign compare`. Direct gives ratings.

    Metrics, means over prompts: judge/order_dependent, the share of comparisons whose verdict is another one in the
    other order; judge/ties; judge/refused; judge/mass, the probability that is on the answers together;
    judge/agreement with the rule; scores/RULE.
    """

    paper: ClassVar = "Lee et al. 2023, arXiv:2309.00267"
    name: Literal["judge"] = "judge"
    template: str | None = Field(
        None,
        description="a file, or one that is shipped: helpful, helpful_score, positive, positive_score",
        examples=["my_template.yaml"],
    )
    ask: AnyAsker = Field(description="who answers", examples=[{"name": "engine", "model": "/models/my-judge"}])
    deadline_s: float = Field(
        600.0, gt=0, description="seconds without the scores of any group after which one is lost"
    )

    # Read where the config is, so that no actor needs the file; none as long as it is not there: a job brings it along.
    _template: Template | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _template_fits(self) -> Judge:
        name = self.template or USUAL[self.mode]
        if not is_elsewhere(name):
            self._template = self._loaded(name)
        return self

    def _loaded(self, name: str) -> Template:
        template = load_template(name)
        if template.mode != self.mode:
            raise Unfit(
                f"this template is for a judge that is {template.mode}",
                key="template",
                rule=f"a {self.mode} template with mode: {self.mode}",
                remedy=f"set mode: {template.mode}, or use another template",
            )
        if self.reasoning:
            template.check_reasoning("key scorer.template")
        return template

    @model_validator(mode="after")
    def _fits(self) -> Judge:
        if (self.schedule == "swiss") != (self.comparisons is not None):
            raise Unfit(
                "swiss rounds need a budget" if self.comparisons is None else "this schedule knows no budget",
                key="comparisons",
                rule="a number of comparisons with schedule: swiss, and only there",
                remedy="set comparisons: 6, say" if self.comparisons is None else "take comparisons out",
            )
        if self.mode == "direct" and self.schedule != "all":
            raise Unfit(
                "a judge that rates each answer compares none",
                key="schedule",
                rule="not set with mode: direct",
                remedy="take schedule out",
            )
        if self.borrows_engine and self.count > 1:
            raise Unfit(
                "the policy's engines are one pool",
                key="count",
                rule="1 with ask: policy",
                remedy="take count out; engine.count are asked",
            )
        pool = ("deadline_s", "max_replacements")
        unused = [key for key in pool if getattr(self, key) != type(self).model_fields[key].default]
        if self.borrows_engine and unused:
            raise Unfit(
                "a judge that asks the policy is no actor, so that none is lost or replaced",
                key=unused[0],
                rule="not set with ask: policy",
                remedy=f"take it out; set engine.{unused[0]}",
            )
        return self

    def at_once(self, answers: int) -> int:
        asked = self.questions(answers) * (2 if self.reasoning else 1)
        together = getattr(self.ask, "concurrency", TOGETHER)
        return max(1, min(AT_ONCE, WAVES * together // max(1, asked)))

    @property
    def compares(self) -> bool:
        return self.mode == "pairwise"

    @property
    def gives_preferences(self) -> bool:
        return self.mode == "pairwise"

    @property
    def relative(self) -> bool:
        return self.compares and self.report_agreement is None

    @property
    def gpus(self) -> int:
        return int(getattr(self.ask, "gpus", 0))

    @property
    def borrows_engine(self) -> bool:
        return getattr(self.ask, "name", None) == "policy"

    def contents(self) -> dict[str, str]:
        template = hashlib.sha256(self._known_template().model_dump_json().encode()).hexdigest()[:24]
        own = content(Path(self.ask.model).expanduser()) if getattr(self.ask, "name", None) == "engine" else ""
        return {"template": template, **({"ask.model": own} if own else {})}

    def check_files(self) -> None:
        self._known_template()

    def check(self, model: str, *, trust_remote_code: bool = False) -> None:
        answers = tuple(self._known_template().answers)
        if hasattr(self.ask, "check"):
            self.ask.check(answers, model=model, trust_remote_code=trust_remote_code)

    def _known_template(self) -> Template:
        """Raises ConfigError when there is none."""
        return self._template or self._loaded(self.template or USUAL[self.mode])

    def start(self) -> Judging:
        return self.start_with(self.ask.start())  # type: ignore[attr-defined]

    def start_with(self, asker: Asker) -> Judging:
        """The judge, by an asker that is there already."""
        if self.borrows_engine and self.ask.chat_template_kwargs:  # type: ignore[attr-defined]
            asker = asker.lent(self.ask.chat_template_kwargs)  # type: ignore[attr-defined]
        return Judging(self, self._known_template(), asker)

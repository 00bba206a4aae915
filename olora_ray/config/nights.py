"""The config's sections for a scheduled retraining: gate, retrain, notify."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from olora_ray.config.section import (
    METRICS,
    Command,
    PositiveFloat,
    Reference,
    Section,
    Share,
    Source,
)


class Condition(Section):
    """A limit that a new version must meet, independent of the champion."""

    metric: str
    """eval/loss, eval/perplexity, eval/NAME for a score NAME that evaluation.scorer returns, or, of held-out preference
    pairs, eval/pairs/loss, preferred, margin, chosen or rejected."""
    at_least: float | None = None
    """Smallest value that passes; null: no lower limit."""
    at_most: float | None = None
    """Largest value that passes; null: no upper limit."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Condition":
        if self.at_least is None and self.at_most is None:
            raise ValueError("set at_least or at_most")
        return self


class Gate(Section):
    """Conditions under which a retrained version becomes the champion."""

    metric: str = "auto"
    """Metric on which challenger and champion are compared: eval/loss, eval/perplexity or eval/pairs/loss (lower is
    better), or eval/NAME for a score NAME (higher is better). auto: eval/pairs/loss if held-out rows are preference
    pairs, otherwise eval/loss."""
    must_improve_by: float = 0.0
    """Improvement over the champion that a challenger must exceed (see confident). A negative value accepts a
    challenger that is worse by up to this much; needs `anchor`, because over many nights the losses add up."""
    conditions: Annotated[tuple[Condition, ...], Field(alias="and")] = ()
    """Further conditions on the new version itself: {metric: ..., at_least: ...} or {metric: ..., at_most: ...}."""
    group: str | None = None
    """Column (or field) with the same value in all rows of one document or customer. @file: all rows of a file are one
    group; null: rows are independent."""
    min_rows: Annotated[int, Field(ge=2)] = 20
    """Smallest number of held-out rows (with `group`: of groups) on which the gate may replace a champion."""
    confident: bool = True
    """true: the lower end of the interval of the improvement must exceed must_improve_by. false: the mean must; needs
    `anchor`."""
    anchor: Annotated[float, Field(ge=0.0)] | None = None
    """A challenger may be worse than the best champion so far by at most this much, with confidence; null: no limit."""
    guard: Literal["text"] | tuple[str | Source, ...] | None = "text"
    """Rows of other tasks, on which a challenger must not lose: sources as in data.eval, or names of lm-eval's tasks.
    text: 800 short rows of English and code that come with the package; null: no guard."""
    guard_margin: PositiveFloat = 0.03
    """Loss per token on the guard rows (for tasks: share of wrong answers) by which a challenger may be worse than the
    champion that is best there, with confidence."""

    chosen_margin: PositiveFloat = 0.05
    """Only with held-out preference pairs: loss per token on the chosen answers by which a challenger may be worse than
    the champion, with confidence; also the limit for the loss of the other rows if `metric` is of pairs, and for
    eval/pairs/loss if it is not."""

    shrink: bool = True
    """true: if a challenger is better by `metric`, but fails guard, anchor or chosen_margin, try 0.75, 0.5 and 0.25 of
    its change, with stricter intervals, and promote the first that passes. false: refuse it."""

    @field_validator(
        "guard",
        mode="before",
        json_schema_input_type=Literal["text"] | tuple[str | Source, ...] | None,
    )
    @classmethod
    def _paths_and_tasks(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            return value
        # The name of a task has neither a slash nor a dot.
        return [
            {"path": each} if isinstance(each, str) and set("/.") & set(each) else each
            for each in value
        ]

    @model_validator(mode="after")
    def _has_limits(self) -> "Gate":
        if self.anchor is None and (self.must_improve_by < 0 or not self.confident):
            raise ValueError(
                "must_improve_by below 0 and confident=false let the champion become worse night after night; set"
                " anchor, the most by which a version may be worse than the best champion so far"
            )
        if (
            isinstance(self.guard, tuple)
            and len({isinstance(each, str) for each in self.guard}) != 1
        ):
            raise ValueError("guard: name sources or lm-eval's tasks, not both; null: no guard")
        return self


class Retrain(Section):
    """Retraining with pipelines/retrain.py."""

    origin: Annotated[Literal["base", "champion"], Field(alias="from")] = "base"
    """base: train a new adapter on all data. champion: train the champion's, on new files and some old rows."""
    replay: Share = 0.2
    """Only for `from: champion`: share of the rows of known files to use beside all new ones; drawn again each time."""
    may_shrink: Share = 0.5
    """Stop if data.train has lost more than this share of the rows that the champion was trained on; 1: never stop."""
    ping: Reference | None = None
    """env:NAME or file:/PATH with the address of a dead man's switch in the form of healthchecks.io: deploy/night.py
    calls ADDRESS/start, then ADDRESS or ADDRESS/fail; null: none."""
    metrics: Annotated[str, Field(pattern=METRICS)] | None = None
    """/PATH.prom for node exporter's textfile collector, or the address of a Pushgateway (http://HOST:9091, env:NAME or
    file:/PATH); null: none."""


class Notify(Section):
    """Notifications about the outcome of a retraining: promoted, refused, failed, moved, changed or not finished."""

    url: Reference | None = None
    """env:NAME or file:/PATH that holds the address of a webhook, which gets a POST of JSON; null: none."""
    command: Command | None = None
    """Shell command that gets the same JSON on its standard input; null: no command. Everybody on the machine sees it:
    a secret belongs into an environment variable, written as $NAME, or into a file."""

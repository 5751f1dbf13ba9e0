"""config/routes.yaml: which images go to which model, and what comes back."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from dicom_xai.config.types import (
    Bool,
    Keyword,
    Name,
    Seconds,
    Section,
)
from dicom_xai.errors import RouteConfigError
from dicom_xai.study import ObjectKind, Per, Priority


class Operator(StrEnum):
    """What a clause may ask of an attribute."""

    EQUALS = "equals"
    IN = "in"
    CONTAINS = "contains"
    MIN = "min"
    MAX = "max"
    EXISTS = "exists"
    NOT = "not"


class Clause(Section):
    """One test of one attribute; several operators in one clause must all hold.

    Text is compared without regard to case and surrounding spaces; of several values one must
    match. `not` holds a clause that must be false.
    """

    equals: str | None = Field(None, description="The value is this text.")
    one_of: tuple[str, ...] | None = Field(
        None, alias="in", min_length=1, description="The value is one of these."
    )
    contains: str | None = Field(None, description="The value contains this text.")
    min: float | None = Field(None, description="The value is a number of at least this.")
    max: float | None = Field(None, description="The value is a number of at most this.")
    exists: Bool | None = Field(None, description="The attribute has a value, or has none.")
    negated: Clause | None = Field(None, alias="not", description="This clause must be false.")

    @model_validator(mode="after")
    def _asks_something(self) -> Clause:
        asked = {name for name in type(self).model_fields if getattr(self, name) is not None}
        if not asked or asked != self.model_fields_set:
            # a clause that asks nothing would match every image
            raise ValueError(f"an empty clause or value; give one of {', '.join(Operator)}")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: nothing can match")
        return self


class TriggerKind(StrEnum):
    """When a unit counts as complete."""

    INSTANCE = "instance"
    ASSOCIATION_RELEASE = "association_release"
    QUIET = "quiet"


class SegmentationKind(StrEnum):
    """How a seg tells which pixels belong to a finding (PS3.3 C.8.20.2)."""

    BINARY = "binary"  #: one bit: at or above the threshold; regions may overlap
    FRACTIONAL = "fractional"  #: the model's probability, 255 = 1; never a heat map
    LABELMAP = "labelmap"  #: one number: the finding that is strongest there


class Layout(StrEnum):
    """What the pictures of a series become."""

    SINGLE = "single"  #: an object for each of the k best slices
    STACK = "stack"  #: one multi-frame object of all slices


class SendRule(Section):
    """Which object goes where."""

    object: Literal[ObjectKind.SC, ObjectKind.SEG] = Field(description="sc | seg")
    to: tuple[Name, ...] = Field(min_length=1, description="Names of destinations.")
    slices: int | None = Field(None, ge=1, le=64, description="On an sc of a series: the k best.")
    layout: Layout | None = Field(
        None, description="On an sc of a series: single (default) | stack, all slices in one."
    )
    kind: SegmentationKind | None = Field(
        None, description="On a seg: binary (default) | fractional | labelmap."
    )

    @model_validator(mode="after")
    def _options_fit_the_object(self) -> SendRule:
        for option, wanted in (
            ("slices", ObjectKind.SC),
            ("layout", ObjectKind.SC),
            ("kind", ObjectKind.SEG),
        ):
            if getattr(self, option) is not None and self.object is not wanted:
                raise ValueError(f"{option} stands on object: {wanted}, found on: {self.object}")
        if self.layout is Layout.STACK and self.slices is not None:
            raise ValueError("layout: stack sends all slices; leave slices out")
        return self


class Route(Section):
    """One route: which units, which model, which results, where to."""

    name: Name
    description: str = Field("", description="For people.")
    enabled: Bool = Field(True, description="false: the route matches nothing.")
    when: dict[Keyword, Clause] = Field(description="All clauses must hold; {} matches everything.")
    per: Per | None = Field(None, description="instance | series | study; default by the model.")
    trigger: TriggerKind = Field(description="instance | association_release | quiet")
    quiet_s: Seconds = Field(0.75, gt=0, le=3600, description="Silence after which it is complete.")
    max_wait_s: Seconds = Field(60.0, gt=0, le=86400, description="The longest wait.")
    when_incomplete: Literal["partial", "hold"] = Field("partial", description="At max_wait_s.")
    model: Name
    explain: tuple[Name, ...] = Field(min_length=1, description="In order of preference.")
    findings: int = Field(3, ge=1, le=16, description="At most so many classes get a map.")
    send: tuple[SendRule, ...] = Field(min_length=1)
    on_failure: Literal["note", "silent"] = Field("note", description="note: a text SC with why.")
    priority: Priority = Field(Priority.ROUTINE, description="stat | routine")
    budget_s: Seconds = Field(2.0, gt=0, le=86400, description="From ready to triaged.")

    @model_validator(mode="after")
    def _trigger_fits_the_unit(self) -> Route:
        if self.trigger is TriggerKind.INSTANCE and self.per not in (None, Per.INSTANCE):
            raise ValueError(f"trigger instance needs per: instance, found per: {self.per}")
        return self


def read_route(text: str) -> Route:
    """A route as the ledger has it: as it was when a unit came.

    Parameters
    ----------
    text : str
        JSON, of `Route.model_dump_json`.

    Raises
    ------
    RouteConfigError
        Another version of this program wrote it, in a form that this one does not know.
    """
    try:
        return Route.model_validate_json(text)
    except ValidationError as error:
        keys = {".".join(map(str, problem["loc"])) or "all" for problem in error.errors()}
        raise RouteConfigError(
            "the route of a unit is in the form of another version of this program (keys "
            f"{', '.join(sorted(keys))}): that version can finish the unit, this one cannot"
        ) from error


class RouteTest(Section):
    """An example that the admin wants to stay true."""

    name: str
    attributes: dict[Keyword, str] = Field(description="Keyword or sender fact: value.")
    expect: tuple[Name, ...] = Field(description="Names of the routes that must match; [] = none.")


class RoutesConfig(Section):
    """config/routes.yaml"""

    match: Literal["all", "first"] = Field("all", description="all routes, or the first that fits.")
    routes: tuple[Route, ...] = Field(min_length=1)
    tests: tuple[RouteTest, ...] = ()

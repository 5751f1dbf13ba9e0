"""One job, start to finish, on one page: decode -> infer + explain -> encode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dicom_xai import identity
from dicom_xai.config import Destination, Layout, Route, SegmentationKind, read_route
from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.geometry import attach, stack
from dicom_xai.decode.normalize import model_inputs
from dicom_xai.decode.window import display
from dicom_xai.encode.note import encode_note
from dicom_xai.encode.objects import Encoded, Planned
from dicom_xai.encode.results import encode_results
from dicom_xai.encode.source import Described
from dicom_xai.errors import StudyError
from dicom_xai.explain.choose import Choice, choose
from dicom_xai.explain.heatmap import explain
from dicom_xai.explain.mapping import to_source
from dicom_xai.explain.served import ServedModel
from dicom_xai.prepare import Prepared
from dicom_xai.stages import Deadline, Stage
from dicom_xai.study import (
    Explanation,
    Finding,
    Frame,
    Inputs,
    Instance,
    Job,
    ObjectKind,
    Prediction,
    Purpose,
    Volume,
)

if TYPE_CHECKING:
    import torch

#: Stored in the job when the deadline left time for the prediction alone.
PREDICTION_ONLY = "none"


@dataclass(frozen=True, slots=True)
class Tools:
    """What a job needs from outside.

    Attributes
    ----------
    identity_of : callable
        The identity block of an instance, as stored; raises StudyError.
    prepared : callable
        What `prepare` makes of each of the job's instances, perhaps made before; raises StudyError.
    give_way : callable
        Called between parts of the work; what is more urgent may run in it.
    destinations : mapping
        By name; they say how objects are compressed.
    stage : callable
        A context in which a stage runs: it is timed, and a watcher knows where the job is.
    fix_explainer : callable
        Writes the chosen explainer into the job's row before it runs.
    rest_s : float
        Expected seconds from inference to triage, from earlier jobs of this model.
    """

    identity_of: Callable[[Instance], identity.Block]
    prepared: Callable[[], Sequence[Prepared]]
    give_way: Callable[[], None]
    destinations: Mapping[str, Destination]
    stage: Callable[[Stage], AbstractContextManager[None]]
    fix_explainer: Callable[[str], None]
    rest_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a job came to.

    Attributes
    ----------
    objects : tuple of Encoded
        To be put into the spool.
    explanation : Explanation
    skipped : tuple of (ObjectKind, str)
        Planned kinds that were not made, and why.
    problems : tuple of str
        What was odd about the images.
    reformatted : tuple of str
        Of those, what the images say of their patient in different forms: keywords.
    degraded : str
        What was left out to hold the budget; empty when nothing was.
    owes_map : bool
        The map is to follow as an amendment.
    """

    objects: tuple[Encoded, ...]
    explanation: Explanation
    skipped: tuple[tuple[ObjectKind, str], ...]
    problems: tuple[str, ...]
    reformatted: tuple[str, ...]
    degraded: str
    owes_map: bool


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A job up to the model: what `infer` takes and `finish` goes on with."""

    job: Job
    route: Route
    model: ServedModel
    tools: Tools
    volume: Volume
    described: Mapping[str, Described]
    reformatted: tuple[str, ...]
    inputs: Inputs
    choice: Choice


def run(job: Job, model: ServedModel, deadline: Deadline, tools: Tools) -> Outcome:
    """Make all results of one job.

    Parameters
    ----------
    job : Job
        Claimed.
    model : ServedModel
        The one that the job names.
    deadline : Deadline
        Decides how far down the route's list of explainers to go; passing it raises nothing here.
    tools : Tools

    Raises
    ------
    StudyError
        The unit cannot be done; it is not retried.
    RouteConfigError
        Nor can this one: another version of this program wrote its route.
    TransientError
        Device or ledger are busy; the job is retried.
    """
    begun = begin(job, model, deadline, tools)
    [prediction] = infer([begun])
    return finish(begun, prediction)


def begin(job: Job, model: ServedModel, deadline: Deadline, tools: Tools) -> Begun:
    """Decode, and choose what to run; parameters and errors as `run`."""
    route = read_route(job.route_json)
    with tools.stage(Stage.DECODE):
        prepared = tools.prepared()
        tools.give_way()
        # of all, not of those that the model sees: who sent one patient's images among another's
        # may have mixed up any of them
        reformatted = identity.check_agreement(made.described.block for made in prepared)
        planes = [plane for made in prepared for plane in made.planes]
        volume = attach(stack(planes, model.card.stack_rule), _frames(job, prepared, model))
        inputs = model_inputs(volume, model.card.inputs[0], tools.give_way)
        described = {
            instance.sop_instance_uid: made.described
            for instance, made in zip(job.instances, prepared, strict=True)
        }
    choice = _choose(job, route, model, deadline, tools, inputs.images.shape[0])
    return Begun(job, route, model, tools, volume, described, reformatted, inputs, choice)


def infer(units: Sequence[Begun]) -> list[Prediction]:
    """The model's answers about jobs of one model and one explainer, in shared runs.

    Gives way between runs on the device. Errors as `run`.
    """
    first = units[0]
    batches = first.model.batches([unit.inputs for unit in units], first.choice.explainer)
    with ExitStack() as stages:
        for unit in units:
            stages.enter_context(unit.tools.stage(Stage.INFER))
        while True:
            try:
                next(batches)
            except StopIteration as end:
                predictions: list[Prediction] = end.value
                return predictions
            first.tools.give_way()


def finish(begun: Begun, prediction: Prediction) -> Outcome:
    """Explain and encode. Errors as `run`."""
    model, route, choice, tools = begun.model, begun.route, begun.choice, begun.tools
    with tools.stage(Stage.EXPLAIN):
        graph = model.graph(choice.explainer) if choice.explainer else None
        explanation = explain(
            prediction,
            model.card,
            route.findings,
            graph.method if graph else "",
            graph.layer if graph else "",
            choice.degraded,
        )
    with tools.stage(Stage.ENCODE):
        made = encode_results(
            begun.job,
            model.card,
            begun.volume,
            explanation,
            plan_objects(route, tools.destinations),
            begun.described,
            heat_of=_heat_of,
            probability_of=_probability_of,
            display_of=_display_of(begun.volume, tools.give_way),
        )
    return Outcome(
        objects=made.objects,
        explanation=explanation,
        skipped=made.skipped,
        problems=(*begun.volume.geometry.problems, *_patient_problems(begun.reformatted)),
        reformatted=begun.reformatted,
        degraded=choice.degraded,
        owes_map=not choice.explainer,
    )


def fail(job: Job, reason: str, tools: Tools) -> tuple[Encoded, ...]:
    """The note that tells a radiologist why there is no result, if the route wants one.

    Raises
    ------
    StudyError
        Not even a note can be made: the source's identity cannot be read.
    RouteConfigError
        Nor can the route: another version wrote it.
    """
    route = read_route(job.route_json)
    if route.on_failure == "silent":
        return ()
    plan = plan_objects(route, tools.destinations)
    source = job.instances[0]
    return tuple(encode_note(job, reason, source, tools.identity_of(source), plan))


def plan_objects(route: Route, destinations: Mapping[str, Destination]) -> list[Planned]:
    """What to make: each kind once for each compression that one of its destinations wants.

    Raises
    ------
    StudyError
        No destination of the route is in the config any more.
    """
    wanted: dict[Planned, list[str]] = {}
    for rule in route.send:
        for name in (name for name in rule.to if name in destinations):
            planned = Planned(
                ObjectKind(rule.object),
                destinations[name].compress,
                (),
                rule.slices or 1,
                rule.layout or Layout.SINGLE,
                rule.kind or SegmentationKind.BINARY,
            )
            wanted.setdefault(planned, []).append(name)
    if not wanted:
        raise StudyError(f"no destination of route {route.name!r} is configured any more")
    return [
        replace(planned, destinations=tuple(dict.fromkeys(names)))
        for planned, names in wanted.items()
    ]


def _patient_problems(reformatted: Sequence[str]) -> list[str]:
    listed = ", ".join(reformatted)
    return [f"images differ in the formatting of {listed}"] if listed else []


def _frames(job: Job, prepared: Sequence[Prepared], model: ServedModel) -> Iterator[Frame]:
    for instance, made in zip(job.instances, prepared, strict=True):
        yield from to_frames(instance, made.decoded, model.device.torch)


def _choose(
    job: Job, route: Route, model: ServedModel, deadline: Deadline, tools: Tools, images: int
) -> Choice:
    """The explainer that an earlier try fixed, else the one that fits, fixed before it runs."""
    if job.explainer:
        name = "" if job.explainer == PREDICTION_ONLY else job.explainer
        return Choice(name, "" if name else "prediction first, map to follow")
    if job.purpose is not Purpose.TRIAGE:
        # it owes what the first answer left out; to leave it out again would never end
        tools.fix_explainer(route.explain[0])
        return Choice(route.explain[0])
    choice = choose(
        route.explain,
        {name: model.costs.seconds(name, images) for name in route.explain},
        model.costs.seconds("", images),
        tools.rest_s,
        deadline.remaining_s,
    )
    tools.fix_explainer(choice.explainer or PREDICTION_ONLY)
    return choice


def _heat_of(finding: Finding, frames: Sequence[int]) -> torch.Tensor:
    if finding.attribution is None:
        raise StudyError(f"finding {finding.name} has no map")
    return to_source(finding.attribution.heat, finding.attribution.placements, frames)


def _probability_of(finding: Finding, frames: Sequence[int]) -> torch.Tensor:
    if finding.region is None:
        raise StudyError(f"finding {finding.name} has no region")
    return to_source(finding.region.probability, finding.region.placements, frames)


def _display_of(
    volume: Volume, give_way: Callable[[], None]
) -> Callable[[Sequence[int]], torch.Tensor]:
    def shown(frames: Sequence[int]) -> torch.Tensor:
        give_way()  # the encoders ask for one batch of pictures after the other
        return display([volume.frames[frame] for frame in frames])

    return shown

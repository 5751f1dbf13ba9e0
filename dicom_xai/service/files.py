"""The pipeline on files, without network, ledger or spool: what a study's results would be."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydicom import Dataset, dcmread

from dicom_xai import identity, pipeline
from dicom_xai.config import (
    Destination,
    InputKind,
    ModelCard,
    Route,
    SendRule,
    TriggerKind,
)
from dicom_xai.decode.pixels import read_header
from dicom_xai.encode.objects import Encoded
from dicom_xai.errors import DecodeError, StudyError
from dicom_xai.explain import EXPLAINERS
from dicom_xai.explain.served import ServedModel
from dicom_xai.infer.session import Device
from dicom_xai.prepare import prepare
from dicom_xai.route.plan import unit_of
from dicom_xai.stages import Deadline, Stage
from dicom_xai.study import Instance, Job, ObjectKind, Per, Priority, Purpose, Sender, Unit

_FOLDER = "folder"
_BUDGET_S = 3600.0


@dataclass(frozen=True, slots=True, eq=False)
class Explained:
    """What came of one unit: results and findings, or the reason why not."""

    unit: Unit
    outcome: pipeline.Outcome | None
    reason: str
    stage_s: dict[Stage, float]


def explain_files(
    files: Sequence[Path], card: ModelCard, device: Device, explainer: str, slices: int = 3
) -> list[Explained]:
    """Group files into units as a route would, and run each through the pipeline.

    Parameters
    ----------
    files : sequence of Path
        DICOM Part 10 files.
    card : ModelCard
    device : Device
    explainer : str
        A key of `EXPLAINERS`.
    slices : int
        On a series: how many slices get a picture.

    Raises
    ------
    StudyError
        A file is no DICOM file.
    ConfigError
        The model does not load.
    """
    model = ServedModel(card, device, [EXPLAINERS[explainer]], len(card.classes))
    route = route_for(card, explainer, slices)
    created_at = datetime.now().astimezone().strftime("%Y%m%d%H%M%S.%f%z")
    units: dict[Unit, list[tuple[Instance, bytes]]] = {}
    for path in files:
        data = path.read_bytes()
        instance = _instance(path, data)
        uids = (
            instance.study_instance_uid,
            instance.series_instance_uid,
            instance.sop_instance_uid,
        )
        unit = unit_of(route, {card.name: card.default_per}, uids)
        units.setdefault(unit, []).append((instance, data))
    explained = []
    for unit, members in units.items():
        stage_s: dict[Stage, float] = {}
        try:
            outcome = run_unit(unit, members, model, route, created_at, stage_s)
            explained.append(Explained(unit, outcome, "", stage_s))
        except StudyError as error:
            explained.append(Explained(unit, None, str(error), stage_s))
    return explained


def run_unit(
    unit: Unit,
    members: Sequence[tuple[Instance, bytes]],
    model: ServedModel,
    route: Route,
    created_at: str,
    stage_s: dict[Stage, float],
) -> pipeline.Outcome:
    """One unit through the pipeline; the seconds of each stage go into `stage_s`.

    Raises
    ------
    StudyError
        It cannot be done; the message says why.
    """
    data = dict(members)

    @contextmanager
    def stage(which: Stage) -> Iterator[None]:
        started = time.perf_counter()
        yield
        stage_s[which] = time.perf_counter() - started

    job = Job(
        job_id=0,
        token=0,
        unit=unit,
        route=route.name,
        route_json=route.model_dump_json(by_alias=True, exclude_none=True),
        model=model.card.name,
        model_digest=model.card.digest,
        purpose=Purpose.TRIAGE,
        generation=0,
        priority=Priority.ROUTINE,
        ready_at=0.0,
        deadline_at=_BUDGET_S,
        created_at=created_at,
        explainer=route.explain[0],
        attempts=1,
        instances=tuple(instance for instance, _ in members),
    )
    tools = pipeline.Tools(
        identity_of=lambda instance: identity.read_block(data[instance]),
        prepared=lambda: [prepare(instance, file) for instance, file in members],
        give_way=lambda: None,
        destinations={_FOLDER: _destination()},
        stage=stage,
        fix_explainer=lambda _: None,
        rest_s=0.0,
    )
    deadline = Deadline(time.monotonic() + _BUDGET_S, time.monotonic)
    return pipeline.run(job, model, deadline, tools)


def route_for(card: ModelCard, explainer: str, slices: int) -> Route:
    """A route that sends everything a card can give to one place, which nobody connects to."""
    is_series = card.inputs[0].kind is not InputKind.IMAGE2D
    return Route(
        name="files",
        when={},
        per=Per.SERIES if is_series else Per.INSTANCE,
        trigger=TriggerKind.ASSOCIATION_RELEASE if is_series else TriggerKind.INSTANCE,
        model=card.name,
        explain=(explainer,),
        findings=min(16, len(card.classes)),
        send=(
            SendRule(object=ObjectKind.SC, to=(_FOLDER,), slices=slices if is_series else None),
            SendRule(object=ObjectKind.SEG, to=(_FOLDER,)),
        ),
        budget_s=_BUDGET_S,
    )


def write_results(explained: Explained, folder: Path) -> list[Path]:
    """Write a unit's objects as DICOM files, and its pictures as PNG beside them.

    Returns
    -------
    list of Path
        What was written. Names hold the source's SOP Instance UID and no patient data.
    """
    written: list[Path] = []
    objects: tuple[Encoded, ...] = () if explained.outcome is None else explained.outcome.objects
    for item in objects:
        path = folder / f"{item.kind}-{item.source.sop_instance_uid}-{item.ordinal}.dcm"
        path.write_bytes(item.file)
        written.append(path)
        if item.kind is not ObjectKind.SEG:
            written.append(write_png(item.file, path.with_suffix(".png")))
    return written


def write_png(file: bytes, path: Path) -> Path:
    """A Secondary Capture's picture as PNG."""
    from PIL import Image

    ds: Dataset = dcmread(io.BytesIO(file))
    Image.fromarray(ds.pixel_array).save(path)
    return path


def _instance(path: Path, data: bytes) -> Instance:
    try:
        header = read_header(data)
        return Instance(
            sop_instance_uid=str(header.SOPInstanceUID),
            sop_class_uid=str(header.SOPClassUID),
            series_instance_uid=str(header.SeriesInstanceUID),
            study_instance_uid=str(header.StudyInstanceUID),
            transfer_syntax_uid=str(header.file_meta.TransferSyntaxUID),
            spool_key="",
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            sender=Sender("", "", ""),
        )
    except (DecodeError, AttributeError) as error:
        raise StudyError(
            f"{path.name} is no DICOM image file with study, series and SOP UIDs"
        ) from error


def _destination() -> Destination:
    return Destination(type="dimse", ae_title="NOWHERE", host="127.0.0.1", port=1)

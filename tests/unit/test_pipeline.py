"""What a route makes, and for whom; and that a unit of two patients makes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

from dicom_xai import identity
from dicom_xai.config import (
    Compression,
    Destination,
    Layout,
    ModelCard,
    Route,
    SegmentationKind,
    parse,
)
from dicom_xai.encode.objects import Planned
from dicom_xai.errors import StudyError
from dicom_xai.infer.session import Device
from dicom_xai.pipeline import begin, plan_objects
from dicom_xai.prepare import prepare
from dicom_xai.service.files import Explained, explain_files
from dicom_xai.stages import Deadline
from dicom_xai.study import ObjectKind
from tests.make.ledger import an_instance
from tests.make.results import patched
from tests.make.studies import a_head, changed, header_of


def route(*send: dict) -> Route:
    return Route.model_validate(
        {
            "name": "test",
            "when": {},
            "trigger": "association_release",
            "model": "model",
            "explain": ["grad-cam"],
            "send": list(send),
        }
    )


def destination(compress: str = "none") -> Destination:
    return Destination(type="dimse", ae_title="AE", host="127.0.0.1", port=1, compress=compress)


def test_a_stack_on_its_way_to_the_model_gives_way_to_what_is_more_urgent(cxr_card):
    instances = [an_instance(number) for number in range(20)]
    given = []
    tools = SimpleNamespace(
        prepared=lambda: list(map(prepare, instances, a_head(20).files)),
        give_way=lambda: given.append(1),
        stage=lambda which: nullcontext(),
    )
    written = route({"object": "sc", "to": ["a"]}).model_dump_json(by_alias=True, exclude_none=True)
    job = SimpleNamespace(instances=instances, explainer="grad-cam", route_json=written)
    model = SimpleNamespace(card=cxr_card, device=Device("cpu"))
    begun = begin(job, model, Deadline(0.0, lambda: 0.0), tools)
    assert begun.inputs.images.shape[0] == 20
    assert len(given) == 1 + 3  # once decoded, and after 8, 8 and 4 slices


def test_one_object_serves_all_destinations_that_want_the_same_compression():
    wanted = route({"object": "sc", "to": ["a", "b"]}, {"object": "sc", "to": ["c"]})
    places = {"a": destination(), "b": destination("jpeg"), "c": destination()}
    assert plan_objects(wanted, places) == [
        Planned(ObjectKind.SC, Compression.NONE, ("a", "c")),
        Planned(ObjectKind.SC, Compression.JPEG, ("b",)),
    ]


def test_each_way_to_write_an_object_is_planned_on_its_own():
    wanted = route(
        {"object": "sc", "to": ["a"]},
        {"object": "sc", "to": ["a", "b"], "layout": "stack"},
        {"object": "seg", "to": ["a"], "kind": "labelmap"},
        {"object": "seg", "to": ["b"]},
    )
    assert plan_objects(wanted, {"a": destination(), "b": destination()}) == [
        Planned(ObjectKind.SC, Compression.NONE, ("a",)),
        Planned(ObjectKind.SC, Compression.NONE, ("a", "b"), layout=Layout.STACK),
        Planned(ObjectKind.SEG, Compression.NONE, ("a",), region=SegmentationKind.LABELMAP),
        Planned(ObjectKind.SEG, Compression.NONE, ("b",)),
    ]


def test_a_destination_that_left_the_config_gets_nothing_and_the_others_do():
    wanted = route({"object": "sc", "to": ["gone", "a"]})
    assert plan_objects(wanted, {"a": destination()})[0].destinations == ("a",)


def test_without_any_destination_the_study_fails_with_the_routes_name():
    with pytest.raises(StudyError, match="'test'"):
        plan_objects(route({"object": "sc", "to": ["gone"]}), {})


@pytest.fixture(scope="module")
def head_card() -> ModelCard:
    """The bundled one."""
    folder = Path(str(resources.files("dicom_xai"))) / "bundled/models"
    card, _ = parse(folder / "phantom-ct-head.yaml", ModelCard)
    return card.model_copy(update={"file": folder / card.file})


def explained(files: Sequence[bytes], card: ModelCard, folder: Path) -> Explained:
    """What the pipeline makes of these files, which are one unit."""
    paths = [folder / f"{number}.dcm" for number in range(len(files))]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file)
    [unit] = explain_files(paths, card, Device("cpu"), "grad-cam")
    return unit


@pytest.mark.promise("C2")
def test_another_patient_in_a_stack_that_is_left_out_stops_the_unit_before_the_model_runs(
    head_card: ModelCard, tmp_path: Path
) -> None:
    files = a_head(6).files
    sagittal = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    same = [*files[:4], *(changed(file, **sagittal) for file in files[4:])]
    unit = explained(same, head_card, tmp_path)
    assert unit.outcome is not None
    assert "2 images of 2 other stack(s) left out" in unit.outcome.problems[0]

    mixed = [*files[:4], *(changed(file, **sagittal, PatientID="OTHER") for file in files[4:])]
    unit = explained(mixed, head_card, tmp_path)
    assert unit.outcome is None
    assert unit.reason == "6 instances of one unit differ in PatientID"
    assert "infer" not in unit.stage_s


@pytest.mark.promise("C2")
@pytest.mark.parametrize(
    "other",
    [
        {"PatientID": "OTHER"},
        {"IssuerOfPatientID": "Ward 8"},
        {"IssuerOfPatientID": None},
        {"PatientName": "Somebody^Else"},
    ],
    ids=["another number", "another issuer", "no issuer", "another name"],
)
def test_a_unit_of_two_patients_makes_nothing(
    other: dict[str, object], head_card: ModelCard, tmp_path: Path
) -> None:
    files = [changed(file, IssuerOfPatientID="Ward 9") for file in a_head(4).files]
    unit = explained([*files[:3], changed(files[3], **other)], head_card, tmp_path)
    assert unit.outcome is None
    assert unit.reason == f"4 instances of one unit differ in {next(iter(other))}"


@pytest.mark.promise("C2")
def test_where_only_formatting_differs_each_result_carries_its_own_source(
    head_card: ModelCard, tmp_path: Path
) -> None:
    files = [
        patched(file, PatientName=name, PatientBirthDate=date, PatientSex=sex)
        for file, name, date, sex in zip(
            a_head(4).files,
            (b"Doe^Jane", b"DOE^JANE", b"Doe^Jane^^", b"doe^jane"),
            (b"19330707", b"1933.07.07", b"19330707", b"1933-07-07"),
            (b"F ", b"f ", b"F ", b"f "),
            strict=True,
        )
    ]
    unit = explained(files, head_card, tmp_path)
    assert unit.outcome is not None
    assert unit.outcome.reformatted == ("PatientName", "PatientBirthDate", "PatientSex")
    assert unit.outcome.problems == (
        "images differ in the formatting of PatientName, PatientBirthDate, PatientSex",
    )
    pictures = [made for made in unit.outcome.objects if made.kind is ObjectKind.SC]
    sources = {str(header_of(file).SOPInstanceUID): file for file in files}
    assert len({made.source.sop_instance_uid for made in pictures}) == 3
    for made in unit.outcome.objects:
        source = sources[made.source.sop_instance_uid]
        identity.compare(identity.read_block(source), identity.read_block(made.file))


@pytest.mark.promise("C2")
def test_patients_without_a_number_are_allowed(head_card: ModelCard, tmp_path: Path) -> None:
    files = [changed(file, PatientID="", PatientName="") for file in a_head(4).files]
    unit = explained(files, head_card, tmp_path)
    assert unit.reason == ""
    assert unit.outcome is not None
    assert unit.outcome.reformatted == ()

"""Which routes want an instance, in which order, as part of which unit."""

from __future__ import annotations

import json

import pytest
from pydicom import Dataset

from dicom_xai.config import Route, RoutesConfig
from dicom_xai.route.plan import plan, plan_instance, unit_of
from dicom_xai.study import Per, Sender, Unit

SENDER = Sender("EMERGENCY", "DICOM_XAI", "10.1.2.3", 0, "DICOM_XAI")


def routes(match: str, *whens: tuple[str, dict[str, object]]) -> RoutesConfig:
    base = {
        "trigger": "quiet",
        "model": "m",
        "explain": ["grad-cam"],
        "send": [{"object": "sc", "to": ["pacs"]}],
    }
    items = [{**base, "name": name, "when": when} for name, when in whens]
    return RoutesConfig.model_validate({"match": match, "routes": items})


CT: tuple[str, dict[str, object]] = ("ct", {"Modality": {"equals": "CT"}})
MR: tuple[str, dict[str, object]] = ("mr", {"Modality": {"equals": "MR"}})
ANY: tuple[str, dict[str, object]] = ("any", {})
FACTS = {"Modality": ("CT",)}


def names(found: tuple[Route, ...]) -> list[str]:
    return [route.name for route in found]


def test_all_matching_routes_run_in_the_order_of_the_file() -> None:
    found = plan(FACTS, routes("all", ANY, MR, CT))
    assert names(found.routes) == ["any", "ct"]


def test_match_first_stops_at_the_first_that_fits() -> None:
    found = plan(FACTS, routes("first", MR, CT, ANY))
    assert names(found.routes) == ["ct"]


@pytest.mark.parametrize("match", ["all", "first"])
def test_every_route_has_its_reason_in_the_trace(match: str) -> None:
    trace = json.loads(plan(FACTS, routes(match, MR, CT, ANY)).trace)
    assert trace == {
        "mr": "no: Modality equals: MR, found CT",
        "ct": "yes: 1 clauses hold",
        "any": "yes: 0 clauses hold" if match == "all" else "no: ct came first",
    }


def test_no_route_is_an_answer_with_reasons_too() -> None:
    found = plan({}, routes("all", MR, CT))
    assert found.routes == ()
    assert json.loads(found.trace)["mr"] == "no: Modality equals: MR, found nothing"


def test_a_trace_holds_nothing_of_the_patient() -> None:
    ds = Dataset()
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Doe^Jane", "ID-4711", "19551224"
    asked = {
        "PatientName": {"equals": "x"},
        "PatientID": {"in": ["y"]},
        "PatientBirthDate": {"min": "1"},
    }
    config = routes("all", *[(f"r{i}", {key: asked[key]}) for i, key in enumerate(asked)])
    trace = plan_instance(ds, SENDER, config).trace
    for value in ("Doe", "Jane", "4711", "19551224"):
        assert value not in trace


def test_header_and_sender_are_asked_together() -> None:
    ds = Dataset()
    ds.Modality = "CT"
    config = routes(
        "all",
        (
            "stat",
            {"Modality": {"equals": "CT"}, "calling_ae_title": {"equals": "EMERGENCY"}},
        ),
        ("other", {"calling_ae_title": {"equals": "WARD"}}),
    )
    assert names(plan_instance(ds, SENDER, config).routes) == ["stat"]


UIDS = ("1.2", "1.2.3", "1.2.3.4")


@pytest.mark.parametrize(
    ("per", "expected"),
    [
        ("instance", Unit(Per.INSTANCE, "1.2", "1.2.3", "1.2.3.4")),
        ("series", Unit(Per.SERIES, "1.2", "1.2.3")),
        ("study", Unit(Per.STUDY, "1.2")),
    ],
)
def test_a_unit_names_the_uids_down_to_its_level(per: str, expected: Unit) -> None:
    (route,) = routes("all", ANY).routes
    asked = route.model_copy(update={"per": Per(per)})
    assert unit_of(asked, {}, UIDS) == expected
    assert unit_of(route, {"m": Per(per)}, UIDS) == expected  # as the model's input suggests
    assert expected.key.startswith(f"{per}:1.2:")


def test_units_of_other_levels_and_studies_have_other_keys() -> None:
    keys = {
        Unit(Per.SERIES, "1.2", "1.2.3").key,
        Unit(Per.SERIES, "1.9", "1.2.3").key,  # two studies with colliding series UIDs
        Unit(Per.STUDY, "1.2").key,
        Unit(Per.INSTANCE, "1.2", "1.2.3", "1.2.3.4").key,
    }
    assert len(keys) == 4

"""What a route makes, and for whom."""

from __future__ import annotations

import pytest

from dicom_xai.config import Compression, Destination, Layout, Route, SegmentationKind
from dicom_xai.encode.objects import Planned
from dicom_xai.errors import StudyError
from dicom_xai.pipeline import plan_objects
from dicom_xai.study import ObjectKind


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

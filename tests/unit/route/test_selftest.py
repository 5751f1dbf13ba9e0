"""The tests in the routes file: silence when they hold, what to know to mend them when not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_xai.config import RoutesConfig, parse
from dicom_xai.route.selftest import failures

REPO = Path(__file__).parents[3]


def config(match: str = "all", **test: object) -> RoutesConfig:
    base = {
        "trigger": "quiet",
        "model": "m",
        "explain": ["grad-cam"],
        "send": [{"object": "sc", "to": ["pacs"]}],
    }
    ct = {**base, "name": "ct", "when": {"Modality": {"equals": "CT"}}}
    axial = {**base, "name": "axial", "when": {"ImageType": {"equals": "AXIAL"}}}
    return RoutesConfig.model_validate(
        {"match": match, "routes": [ct, axial], "tests": [{"name": "t", **test}]}
    )


def test_the_tests_in_the_repository_hold() -> None:
    found, _ = parse(REPO / "config/routes.yaml", RoutesConfig)
    assert len(found.tests) >= 4
    assert list(failures(found)) == []


@pytest.mark.parametrize(
    ("attributes", "expect"),
    [
        ({"Modality": "CT"}, ["ct"]),
        ({"Modality": "MR"}, []),
        ({"Modality": "CT", "ImageType": "ORIGINAL\\AXIAL"}, ["ct", "axial"]),
        ({"Modality": "CT", "ImageType": "ORIGINAL\\AXIAL"}, ["axial", "ct"]),
        ({"Modality": ""}, []),
    ],
)
def test_an_example_that_holds_is_silent(attributes: dict[str, str], expect: list[str]) -> None:
    assert list(failures(config(attributes=attributes, expect=expect))) == []


@pytest.mark.parametrize(
    ("attributes", "expect", "message"),
    [
        (
            {"Modality": "MR"},
            ["ct"],
            "test 't': expected ct, found none (ct: Modality equals: CT, found MR)",
        ),
        ({"Modality": "CT"}, [], "test 't': expected no route, found ct (ct: 1 clauses hold)"),
        (
            {"Modality": "CT", "ImageType": "AXIAL"},
            ["axial"],
            "test 't': expected axial, found ct, axial (ct: 1 clauses hold)",
        ),
    ],
)
def test_an_example_that_fails_says_what_was_found_and_why(
    attributes: dict[str, str], expect: list[str], message: str
) -> None:
    assert list(failures(config(attributes=attributes, expect=expect))) == [(0, message)]


def test_match_first_is_obeyed() -> None:
    both = {"Modality": "CT", "ImageType": "AXIAL"}
    assert list(failures(config("first", attributes=both, expect=["ct"]))) == []
    ((_, message),) = failures(config("first", attributes=both, expect=["ct", "axial"]))
    assert "axial: ct came first" in message

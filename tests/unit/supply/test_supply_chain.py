"""What we stand on: licences, hashes, and a bill of materials that names all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from tests.make.distributions import (
    ALLOWED,
    COPYLEFT_INSIDE,
    ROOT,
    licence_of,
    licences_in,
    runtime,
)
from tests.make.sbom import hashes, reduced

REPOSITORY = Path(__file__).parents[3]
LOCKS = {name: REPOSITORY / f"requirements-{name}.lock" for name in ("cpu", "gpu")}


def test_every_licence_of_what_runs_is_allowed() -> None:
    licences = {name: licence_of(dist) for name, dist in runtime("cpu").items()}
    refused = {
        name: licence
        for name, licence in licences.items()
        if not any(choice <= ALLOWED for choice in licences_in(licence))
    }
    assert refused == {}


@pytest.mark.parametrize(
    ("expression", "is_allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("(MIT OR GPL-2.0-only) AND BSD-3-Clause", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("LGPL-3.0-or-later", False),
        ("unknown", False),
    ],
)
def test_an_expression_is_allowed_when_one_of_its_choices_is(
    expression: str, is_allowed: bool
) -> None:
    assert any(choice <= ALLOWED for choice in licences_in(expression)) == is_allowed


def test_copyleft_libraries_inside_wheels_are_stated_and_dynamic() -> None:
    """Compilers' run-time libraries come along as files of their own, which a user may replace."""
    suspicious = re.compile(
        r"lib(gomp|gfortran|quadmath|fribidi|heif|x26[45]|de265|gmp|avcodec|readline|iconv)\b"
    )
    found: set[str] = set()
    for dist in runtime("cpu").values():
        for file in dist.files or ():
            match = suspicious.match(file.name)
            if match and ".so" in file.name:
                found.add(match[0])
    assert found <= COPYLEFT_INSIDE.keys()


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_pins_what_the_constraints_pin_each_file_by_its_hash(kind: str) -> None:
    constraints = {
        (canonicalize_name(name), version)
        for name, _, version in (
            line.partition("==")
            for line in (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
            if "==" in line
        )
    }
    locked = hashes(LOCKS[kind])
    assert locked.keys() <= constraints, "constraints.txt changed: make lock"
    assert all(locked.values())
    lines = LOCKS[kind].read_text("utf-8").splitlines()
    assert sum(line[:1].isalnum() for line in lines) == len(locked)


def test_the_lock_holds_all_that_runs_but_torch_and_ourselves() -> None:
    locked = {name for name, _ in hashes(LOCKS["cpu"])}
    assert runtime("cpu").keys() - locked == {"torch", ROOT}
    other = {name for name, _ in hashes(LOCKS["gpu"])}
    assert locked ^ other == {"onnxruntime", "onnxruntime-gpu"}


def a_bill() -> dict[str, Any]:
    """As cyclonedx-py lists an environment, with one tool in it."""
    names = {name: dist.version for name, dist in runtime("cpu").items() if name != ROOT}
    components = [
        {"bom-ref": f"{name}=={version}", "type": "library", "name": name, "version": version}
        for name, version in {**names, "pytest": "1"}.items()
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "metadata": {
            "component": {"bom-ref": "root", "type": "application", "name": ROOT, "version": "1"}
        },
        "components": components,
        "dependencies": [{"ref": "root", "dependsOn": ["pytest==1", components[0]["bom-ref"]]}],
    }


def test_the_bill_of_materials_is_cyclonedx_1_6_of_what_runs_with_hashes() -> None:
    bill = reduced(a_bill(), hashes(LOCKS["cpu"]))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None
    names = {item["name"] for item in bill["components"]}
    assert names == runtime("cpu").keys() - {ROOT}
    assert bill["dependencies"][0]["dependsOn"] == [bill["components"][0]["bom-ref"]]
    without = {
        item["name"]
        for item in bill["components"]
        if not any("hashes" in each for each in item["externalReferences"])
    }
    assert without == {"torch"}

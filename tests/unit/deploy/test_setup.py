"""Set-up and tiers: pins, make's messages, and a peers tier that cannot pass by being absent."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    lines = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in found}


def test_every_requirement_is_pinned_to_a_version_that_fits(pins: dict[str, Version]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [item for extra in project["optional-dependencies"].values() for item in extra]
    for requirement in map(Requirement, project["dependencies"] + extras):
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"


def test_pins_name_no_build_of_one_machine(pins: dict[str, Version]) -> None:
    """A local version (`+cpu`) exists in one index only."""
    assert [name for name, version in pins.items() if version.local] == []


def test_make_says_which_python_is_missing(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    command = ["make", "demo", "PYTHON=/bin/false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no Python 3.11 or newer among: /bin/false" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_installs_again_only_when_what_is_installed_changed(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    for name, age_s in (("pyproject.toml", 20), ("constraints.txt", 20)):
        _touch(tmp_path / name, age_s)
    for name in (".installed-for-running", ".installed-for-testing"):
        _touch(tmp_path / ".venv" / name, 10)
    assert "pip install" not in _plan(tmp_path, "demo") + _plan(tmp_path, "test")
    _touch(tmp_path / "constraints.txt", 0)
    assert "'.[cpu]'" in _plan(tmp_path, "demo")
    assert "'.[cpu,dev]'" in _plan(tmp_path, "test")


def test_judges_of_maps_are_pinned_and_no_extra_brings_them(
    pins: dict[str, Version], tmp_path: Path
) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    plan = _plan(tmp_path, "test")
    assert "-c constraints.txt --no-deps zennit grad-cam" in plan
    assert {"zennit", "grad-cam"} <= pins.keys()
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    assert "zennit" not in str(extras)
    assert "grad-cam" not in str(extras)


def _touch(path: Path, age_s: float) -> None:
    path.touch()
    moment_s = path.stat().st_mtime - age_s
    os.utime(path, (moment_s, moment_s))


def _plan(folder: Path, goal: str) -> str:
    command = ["make", "--dry-run", goal]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("required", "outcome"), [("1", "1 error"), ("0", "1 skipped")])
def test_a_missing_peer_fails_where_peers_are_required(
    tmp_path: Path, required: str, outcome: str
) -> None:
    shutil.copy(REPOSITORY / "tests/conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    peers: x\n    gpu: x\n")
    (tmp_path / "test_one.py").write_text(
        "import pytest\n\n@pytest.mark.peers('no-such-program')\ndef test_one():\n    pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "DICOM_XAI_REQUIRE_PEERS": required},
        capture_output=True,
        text=True,
    )
    assert re.search(rf"=+ {outcome} in ", done.stdout), done.stdout
    assert "no-such-program" in done.stdout

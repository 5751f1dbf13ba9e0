"""Judges of DICOM objects that we did not write."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

DCIODVFY = Path(sys.executable).with_name("dciodvfy")
DCENTVFY = DCIODVFY.with_name("dcentvfy")

_PATIENT_OR_STUDY = re.compile(r"IE=<(Patient|Study)>").search


def dciodvfy_errors(file: Path) -> list[str]:
    """The `Error` lines of dciodvfy for one file; it writes all its findings to stderr."""
    done = subprocess.run(
        [DCIODVFY, "-new", file], capture_output=True, text=True, check=False, timeout=60
    )
    lines = done.stderr.splitlines()
    assert lines, f"{DCIODVFY} said nothing"
    return [line for line in lines if line.startswith("Error")]


def dcentvfy_findings(sources: Sequence[Path], results: Sequence[Path]) -> list[str]:
    """What dcentvfy finds wrong between results and their sources.

    Its `Error` lines, and the warnings that say that an attribute of patient or study stands in one
    object only: an identity copied in part. What sources say of each other, and what they refer to
    and was not sent, is not about us.
    """
    done = subprocess.run(
        [DCENTVFY, *sources, *results], capture_output=True, text=True, check=False, timeout=60
    )
    ours = [f"<{path}>" for path in results]
    return [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if line.startswith("Error") or ("present in one" in line and _PATIENT_OR_STUDY(line))
        if any(path in line for path in ours) or "<" not in line
    ]

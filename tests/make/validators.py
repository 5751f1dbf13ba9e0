"""Judges of DICOM objects that we did not write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DCIODVFY = Path(sys.executable).with_name("dciodvfy")


def dciodvfy_errors(file: Path) -> list[str]:
    """The `Error` lines of dciodvfy for one file; it writes all its findings to stderr."""
    done = subprocess.run(
        [DCIODVFY, "-new", file], capture_output=True, text=True, check=False, timeout=60
    )
    lines = done.stderr.splitlines()
    assert lines, f"{DCIODVFY} said nothing"
    return [line for line in lines if line.startswith("Error")]

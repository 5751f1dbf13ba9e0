"""How much more memory something takes while it runs: resident, so that torch's counts too."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_SELF = Path("/proc/self")  # Linux
Made = TypeVar("Made")


def peak_bytes(run: Callable[[], Made]) -> tuple[int, Made]:
    """The highest resident size during a run, less what was resident before, and its result."""
    gc.collect()
    (_SELF / "clear_refs").write_text("5")  # the peak is counted from here on
    before = _resident("VmRSS")
    made = run()
    return max(_resident("VmHWM") - before, 0), made


def _resident(name: str) -> int:
    lines = (_SELF / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

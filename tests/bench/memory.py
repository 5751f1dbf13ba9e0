"""How much memory something takes: resident, so that torch's counts too."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

_PROC = Path("/proc")  # Linux
Made = TypeVar("Made")


def peak_bytes(run: Callable[[], Made]) -> tuple[int, Made]:
    """The highest resident size during a run, less what was resident before, and its result."""
    gc.collect()
    own = os.getpid()
    forget_peaks(own)
    before = _resident(own, "VmRSS")
    made = run()
    return max(_resident(own, "VmHWM") - before, 0), made


def forget_peaks(pid: int) -> None:
    """Count the peaks of a process and of all below it from here on."""
    for each in _family(pid):
        (_PROC / str(each) / "clear_refs").write_text("5")


def peak_mb(pid: int) -> float:
    """Sum, over a process and those below it that run still, of the most that each has held."""
    return sum(_resident(each, "VmHWM") for each in _family(pid)) / 1e6


def _family(pid: int) -> list[int]:
    root = psutil.Process(pid)
    return [each.pid for each in (root, *root.children(recursive=True))]


def _resident(pid: int, name: str) -> int:
    lines = (_PROC / str(pid) / "status").read_text().splitlines()
    sizes = (1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return next(sizes, 0)  # one that has ended holds nothing

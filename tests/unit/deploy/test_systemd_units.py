"""deploy/systemd: what the units promise, read as systemd reads them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "deploy/systemd"
ROLES = ("receiver", "worker", "sender")

Unit = dict[str, list[str]]


def read(name: str) -> Unit:
    """Section.Key: all its values, in order (a key may stand more than once)."""
    unit: Unit = {}
    section = ""
    for line in (FOLDER / name).read_text("utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            unit.setdefault(f"{section}.{key}", []).append(value)
    return unit


@pytest.fixture(params=ROLES)
def role(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_target_wants_every_role() -> None:
    (wants,) = read("dicom-xai.target")["Unit.Wants"]
    assert wants.split() == [f"dicom-xai-{role}.service" for role in ROLES]


def test_unit_runs_its_own_role_and_reports_by_notify(role: str) -> None:
    unit = read(f"dicom-xai-{role}.service")
    (command,) = unit["Service.ExecStart"]
    assert command.endswith(f"run --config /etc/dicom-xai/dicom-xai.yaml --role {role}")
    assert unit["Service.Type"] == ["notify"]
    assert int(unit["Service.WatchdogSec"][0]) > 0
    assert unit["Service.ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert unit["Unit.PartOf"] == unit["Install.WantedBy"] == ["dicom-xai.target"]


def test_a_role_is_started_again_for_ever(role: str) -> None:
    unit = read(f"dicom-xai-{role}.service")
    assert unit["Service.Restart"] == ["always"]
    assert unit["Unit.StartLimitIntervalSec"] == ["0"]


def test_roles_share_one_state_folder_and_nobody_else_reads_it() -> None:
    shared = ("User", "Group", "StateDirectory", "StateDirectoryMode", "UMask")
    units = [read(f"dicom-xai-{role}.service") for role in ROLES]
    for key in shared:
        values = {tuple(unit[f"Service.{key}"]) for unit in units}
        assert len(values) == 1, f"{key} differs between roles: {values}"
    assert units[0]["Service.StateDirectoryMode"] == ["0700"]


def test_unit_is_hardened(role: str) -> None:
    unit = read(f"dicom-xai-{role}.service")
    wanted = {
        "NoNewPrivileges": "true",
        "ProtectSystem": "strict",
        "ProtectHome": "true",
        "PrivateTmp": "true",
        "CapabilityBoundingSet": "",
        "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
        "DevicePolicy": "closed",
    }
    assert {key: unit[f"Service.{key}"] for key in wanted} == {k: [v] for k, v in wanted.items()}
    assert "@system-service" in unit["Service.SystemCallFilter"]


def test_only_the_worker_reaches_a_gpu() -> None:
    """CUDA needs device nodes and memory that is writable and executable; nobody else does."""
    for role in ROLES:
        unit = read(f"dicom-xai-{role}.service")
        closed = {"Service.PrivateDevices", "Service.MemoryDenyWriteExecute"} & set(unit)
        assert bool(closed) is (role != "worker")
        assert ("Service.DeviceAllow" in unit) is (role == "worker")


def test_boot_id_stays_readable(role: str) -> None:
    """Spool and ledger tell a reboot by /proc/sys/kernel/random/boot_id."""
    assert read(f"dicom-xai-{role}.service").get("Service.ProcSubset", ["all"]) == ["all"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
def test_exposure_stays_low(role: str) -> None:
    """Offline score of systemd 252: 1.2 to 1.5 when written; a plain unit has 9.6."""
    path = FOLDER / f"dicom-xai-{role}.service"
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) < 2.5

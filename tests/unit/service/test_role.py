"""How a role's process says what ended it."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys

import pytest

from dicom_xai.errors import ConfigError
from dicom_xai.service.role import ended_as_event
from dicom_xai.telemetry import Log
from tests.make.config_files import Folder


def run_receiver(*arguments: str) -> tuple[int, list[dict[str, object]]]:
    """Exit status and events of a receiver that cannot start."""
    command = [sys.executable, "-m", "dicom_xai.cli", "run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ""
    return done.returncode, [json.loads(line) for line in done.stderr.splitlines()]


def test_a_role_that_cannot_listen_says_so_as_an_event(files: Folder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        files.spoil("dicom-xai.yaml", "port: 11112", f"port: {port}")
        files.spoil("dicom-xai.yaml", "port: 9464", "port: 0")
        status, events = run_receiver("--role", "receiver", "--config", str(files.write()))
    assert status == 2
    assert [event["event"] for event in events][-2:] == ["role-stopped", "config-refused"]
    assert f"127.0.0.1:{port} cannot be listened on" in str(events[-1]["reason"])
    assert events[-1]["role"] == "receiver"


@pytest.mark.parametrize("role", [("--role", "receiver"), ()])
def test_a_config_that_is_wrong_at_start_is_told_as_an_event(
    files: Folder, role: tuple[str, ...]
) -> None:
    files.spoil("dicom-xai.yaml", "max_associations", "max_associationz")
    status, [event] = run_receiver(*role, "--config", str(files.write()))
    assert (status, event["event"], event["level"]) == (2, "config-refused", "error")
    assert "max_associationz" in str(event["reason"])


def test_what_ends_a_role_is_told_without_a_librarys_words() -> None:
    stream = io.StringIO()

    def fail() -> int:
        raise ValueError("DOE^JANE")

    assert ended_as_event(Log(stream), fail) == 2
    event = json.loads(stream.getvalue())
    assert event["event"] == "role-crashed"
    assert "ValueError" in event["error"]
    assert "DOE" not in stream.getvalue()


def test_a_role_that_was_told_to_stop_ends_without_a_word() -> None:
    stream = io.StringIO()
    assert ended_as_event(Log(stream), lambda: 0) == 0
    assert stream.getvalue() == ""


def test_a_config_that_a_role_cannot_use_is_named() -> None:
    stream = io.StringIO()

    def refuse() -> int:
        raise ConfigError("devices: no such device; change it there")

    assert ended_as_event(Log(stream), refuse) == 2
    assert json.loads(stream.getvalue())["reason"] == "devices: no such device; change it there"


def test_a_reload_that_is_asked_for_before_a_role_listens_waits_for_it() -> None:
    early = (
        "import os, signal\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "from dicom_xai.service.role import _Asked\n"
        "asked = _Asked()\n"
        "print(asked.to_stop(10.0), asked.to_reload(), asked.to_reload())"
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # as the supervisor starts a role
    try:
        done = subprocess.run(
            [sys.executable, "-c", early], capture_output=True, text=True, timeout=60, check=True
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    assert done.stdout.split() == ["False", "True", "False"]

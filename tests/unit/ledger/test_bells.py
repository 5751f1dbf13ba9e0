"""Bells: a hint that wakes, never a message; nobody listening is no error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dicom_xai.ledger import Ledger
from dicom_xai.ledger.engine import Bells
from tests.make.ledger import url_in

#: Longer than any busy machine needs; a bell that rings returns at once.
PATIENCE_S = 10.0


def test_a_ring_wakes_and_is_used_up(tmp_path: Path) -> None:
    bells = Bells(tmp_path / "bells")
    bell = bells.listen("worker")
    assert not bell.wait(0)
    for _ in range(3):
        bells.ring("worker")
    assert bell.wait(PATIENCE_S)
    assert not bell.wait(0)
    bell.close()


def test_only_those_who_bear_the_name_are_woken(tmp_path: Path) -> None:
    bells = Bells(tmp_path / "bells")
    worker, second, sender = (bells.listen(name) for name in ("worker", "worker", "sender"))
    bells.ring("worker")
    assert worker.wait(PATIENCE_S)
    assert second.wait(PATIENCE_S)
    assert not sender.wait(0)
    for bell in (worker, second, sender):
        bell.close()


def test_nobody_listening_is_no_error(tmp_path: Path) -> None:
    bells = Bells(tmp_path / "bells")
    bells.ring("worker")
    bells.listen("worker").close()
    bells.ring("worker")
    assert list((tmp_path / "bells").iterdir()) == []


def test_a_full_pipe_has_rung_already(tmp_path: Path) -> None:
    bells = Bells(tmp_path / "bells")
    bell = bells.listen("worker")
    for _ in range(70_000):  # a pipe holds 65536 bytes (pipe(7))
        bells.ring("worker")
        if bell.wait(0) and not bell.wait(0):
            break
    assert not bell.wait(0)
    bell.close()


RINGER = """
import sys
from dicom_xai.ledger import Ledger
ledger = Ledger(sys.argv[1])
ledger.ring("worker")
ledger.close()
"""

LISTENER = """
import os, sys
from dicom_xai.ledger import Ledger
Ledger(sys.argv[1]).listen("worker")
os.kill(os.getpid(), 9)
"""


def test_another_process_can_ring(tmp_path: Path) -> None:
    ledger = Ledger(url_in(tmp_path))
    bell = ledger.listen("worker")
    subprocess.run([sys.executable, "-c", RINGER, url_in(tmp_path)], check=True)
    assert bell.wait(PATIENCE_S)
    bell.close()
    ledger.close()


def test_the_pipe_of_a_killed_listener_is_removed_by_the_next_ring(tmp_path: Path) -> None:
    ledger = Ledger(url_in(tmp_path))
    killed = subprocess.run([sys.executable, "-c", LISTENER, url_in(tmp_path)])
    assert killed.returncode == -9
    folder = tmp_path / "ledger.db-bells"
    assert len(list(folder.iterdir())) == 1
    bell = ledger.listen("worker")
    ledger.ring("worker")
    assert bell.wait(PATIENCE_S)
    assert len(list(folder.iterdir())) == 1
    bell.close()
    ledger.close()


@pytest.mark.peers("strace")
def test_a_ringer_without_file_descriptors_does_not_silence_the_bell(tmp_path: Path) -> None:
    ledger = Ledger(url_in(tmp_path))
    bell = ledger.listen("worker")
    (pipe,) = (tmp_path / "ledger.db-bells").iterdir()
    log = tmp_path / "trace"
    command = ["strace", "-f", "-o", str(log), "-P", str(pipe), "-e", "trace=openat"]
    fault = ["-e", "inject=openat:error=EMFILE", sys.executable, "-c", RINGER, url_in(tmp_path)]
    subprocess.run([*command, *fault], check=True)
    assert "EMFILE" in log.read_text()
    assert pipe.exists()
    assert not bell.wait(0)
    ledger.ring("worker")
    assert bell.wait(PATIENCE_S)
    bell.close()
    ledger.close()

"""What a role is given: real ledger, spool and trail in a folder of the test's own, and no wire."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicom_xai.config import load
from dicom_xai.service.role import Context, open_context
from dicom_xai.telemetry import Log, Registry
from tests.make.config_files import Folder


@pytest.fixture
def files(tmp_path: Path) -> Folder:
    """The config, to be spoilt; ledger, spool and trail are right in the test's folder."""
    folder = Folder(tmp_path / "config")
    folder.spoil("dicom-xai.yaml", "../var/ledger.db", "../ledger.db")
    folder.spoil("dicom-xai.yaml", "../var/spool", "../spool")
    folder.spoil("dicom-xai.yaml", "min_free_bytes: 2000000000", "min_free_bytes: 0")
    return folder


@pytest.fixture
def log() -> io.StringIO:
    """What is logged, a line an event."""
    return io.StringIO()


@pytest.fixture
def context(files: Folder, log: io.StringIO) -> Iterator[Context]:
    config, _ = load(files.write())
    opened = open_context(config, "tested", Registry(), Log(log))
    yield opened
    opened.ledger.close()

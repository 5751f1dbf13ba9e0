"""One empty ledger file, copied for each test: making the tables costs more than most tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicom_xai.ledger import Ledger
from tests.make.ledger import url_in


@pytest.fixture(scope="session")
def empty_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty-ledger")
    Ledger(url_in(folder)).close()
    return folder / "ledger.db"


@pytest.fixture
def ledger(tmp_path: Path, empty_ledger: Path) -> Iterator[Ledger]:
    shutil.copyfile(empty_ledger, tmp_path / "ledger.db")
    opened = Ledger(url_in(tmp_path))
    yield opened
    opened.close()

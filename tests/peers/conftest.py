"""What the tests with peers share: models, which take longest to make."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.make.models import write_models


@pytest.fixture(scope="session")
def seeing_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model cards that find everything, and `blind-cxr`; do not change them."""
    return write_models(tmp_path_factory.mktemp("models"))

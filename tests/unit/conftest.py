"""The untrained models of `tests.make.models`, exported once for the whole tier."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_xai.config import ModelCard, parse
from tests.make.models import write_models


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def cxr_card(model_folder: Path) -> ModelCard:
    card, _ = parse(model_folder / "phantom-cxr.yaml", ModelCard)
    return card.model_copy(update={"file": model_folder / card.file})

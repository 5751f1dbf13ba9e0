"""A model's file that changed under a running service is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_xai.config import ModelCard, load
from dicom_xai.service.modelfiles import ModelFiles

BUNDLED = Path(__file__).parents[3] / "config" / "dicom-xai.yaml"


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    bundled = load(BUNDLED)[0].cards["phantom-cxr"]
    file = tmp_path / "model.onnx"
    file.write_bytes(bundled.file.read_bytes())
    return bundled.model_copy(update={"file": file})


@pytest.mark.promise("G2")
def test_a_swapped_a_cut_and_a_flipped_file_are_seen_and_the_right_one_again(
    card: ModelCard,
) -> None:
    files = ModelFiles()
    whole = card.file.read_bytes()
    assert files.changed([card]) == {card.name: False}
    for other in (
        b"another model",
        whole[:-1],
        whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
    ):
        card.file.write_bytes(other)
        assert files.changed([card]) == {card.name: True}
    card.file.write_bytes(whole)
    assert files.changed([card]) == {card.name: False}


@pytest.mark.promise("G2")
def test_a_file_that_is_gone_counts_as_changed(card: ModelCard) -> None:
    card.file.unlink()
    assert ModelFiles().changed([card]) == {card.name: True}

"""The committed JSON Schemas are those of the models, and the committed files name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_xai.config.schema import FILES, text_of

CONFIG = Path(__file__).parents[2] / "config"


@pytest.mark.parametrize("name", FILES)
def test_a_schema_is_what_the_model_says(name):
    assert (CONFIG / "schema" / name).read_text() == text_of(FILES[name])


@pytest.mark.parametrize("stem", ["dicom-xai", "routes"])
def test_a_file_names_its_schema_for_editors(stem):
    first = (CONFIG / f"{stem}.yaml").read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema=schema/{stem}.schema.json"

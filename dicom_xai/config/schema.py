"""JSON Schema of the three files, for editors that complete and check YAML while one types.

``python -m dicom_xai.config.schema config/schema`` writes them; a test keeps the committed ones
equal to the models. The check that counts is ours (`loading`): a schema cannot know destinations.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from dicom_xai.config.cards import ModelCard
from dicom_xai.config.routes import RoutesConfig
from dicom_xai.config.service import ServiceConfig
from dicom_xai.config.types import Section

FILES: Mapping[str, type[Section]] = {
    "dicom-xai.schema.json": ServiceConfig,
    "routes.schema.json": RoutesConfig,
    "model-card.schema.json": ModelCard,
}


def text_of(model: type[Section]) -> str:
    """The schema of one file (JSON Schema draft 2020-12), as it is committed."""
    return json.dumps(model.model_json_schema(by_alias=True), indent=2) + "\n"


def main(folder: Path) -> None:
    """Write all schemas into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in FILES.items():
        (folder / name).write_text(text_of(model))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

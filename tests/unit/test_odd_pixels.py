"""Images with nothing on them: the pipeline ends in numbers that are numbers, or in a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import resources
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from pydicom import DataElement, dcmread

from dicom_xai.config import ModelCard, parse
from dicom_xai.demo.phantom import Phantom
from dicom_xai.infer.session import Device
from dicom_xai.service.files import explain_files
from tests.make.studies import a_head, a_radiograph, changed

MODELS = Path(str(resources.files("dicom_xai"))) / "bundled/models"


def bundled(name: str) -> ModelCard:
    card, _ = parse(MODELS / f"{name}.yaml", ModelCard)
    return card.model_copy(update={"file": MODELS / card.file})


#: Nothing, a value in the middle, and all white.
VALUES = (0, 1000, 4095)


@pytest.mark.promise("C6")
@pytest.mark.parametrize("window", [{}, {"WindowCenter": None, "WindowWidth": None}])
@pytest.mark.parametrize(
    ("model", "make"),
    [("phantom-cxr", a_radiograph), ("phantom-ct-head", lambda: a_head(4))],
    ids=["radiograph", "head"],
)
def test_images_of_one_value_end_in_finite_numbers(
    model: str, make: Callable[[], Phantom], window: dict[str, object], tmp_path: Path
) -> None:
    paths = []
    for value in VALUES:
        for file in make().files:
            pixels = np.full_like(dcmread(BytesIO(file)).pixel_array, value)
            paths.append(tmp_path / f"{len(paths)}.dcm")
            paths[-1].write_bytes(changed(file, PixelData=pixels.tobytes(), **window))
    units = explain_files(paths, bundled(model), Device("cpu"), "grad-cam")
    assert [unit.reason for unit in units] == [""] * len(VALUES)
    for outcome in (unit.outcome for unit in units):
        assert outcome is not None
        assert outcome.explanation.findings
        for finding in outcome.explanation.findings:
            assert 0 <= finding.score <= 1
            assert all(map(math.isfinite, (*finding.frame_scores, *finding.frame_weights)))
            if finding.attribution is not None:
                assert bool(torch.isfinite(finding.attribution.heat).all())
        assert "sc" in [made.kind for made in outcome.objects]
        for made in outcome.objects:
            ds = dcmread(BytesIO(made.file))
            numbers = [each for each in ds.iterall() if each.VR in ("DS", "FD", "FL")]
            assert all(math.isfinite(n) for each in numbers for n in values_of(each))


def values_of(element: DataElement) -> list[float]:
    found = element.value if element.VM > 1 else [element.value] if element.VM else []
    return [float(value) for value in found]

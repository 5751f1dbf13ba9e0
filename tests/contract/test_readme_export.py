"""What the README shows of the compiler, done as it says."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from dicom_xai.cli import app

README = Path(__file__).parents[2] / "README.md"


def shown(kind: str, holding: str) -> str:
    """The README's only block of code of a kind that holds some words."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    [block] = [text for told, text in blocks if told == kind and holding in text]
    return str(block)


@pytest.mark.slow
def test_the_models_five_lines_and_the_command_give_an_explained_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter and MONAI use deprecated parts
        exec(shown("python", "torch.onnx.export"), {})
    command = shown("", "explain-model model.onnx").removeprefix("$ dicom-xai ").split()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    session = onnxruntime.InferenceSession("explained.onnx", providers=["CPUExecutionProvider"])
    image, target = session.get_inputs()
    assert (target.name, target.type) == ("target", "tensor(int64)")
    pixels = np.random.default_rng(7).random((2, 1, 224, 224), np.float32)
    scores, attribution = session.run(
        [session.get_outputs()[0].name, "attribution"],
        {image.name: pixels, "target": np.array([0, -1])},
    )
    assert scores.shape == (2, 3)
    assert attribution.shape == (2, 1, 7, 7)
    assert attribution.min() >= 0 < attribution.max()

"""What a model card may say about inputs, outputs and stacks, and what is refused at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from dicom_xai.config import (
    Grid,
    InputKind,
    MinimumRegion,
    ModelCard,
    ModelInput,
    ModelOutput,
    Preference,
    StackRule,
)

WINDOW = {"source": "fixed", "center": 40, "width": 80}
CODE = {"value": "1", "scheme": "99TEST", "meaning": "test"}
CLASS = {"name": "bleed", "label": "Bleed", "threshold": 0.5, "category": CODE, "type": CODE}
GRID = {"spacing_mm": [5, 2, 2], "orientation": "SPL"}


def an_input(**changes: object) -> ModelInput:
    given = {"name": "image", "kind": "slices", "size": [64, 64], "windowing": WINDOW}
    return ModelInput.model_validate({**given, **changes})


def a_volume_input(**changes: object) -> ModelInput:
    return an_input(**{"kind": "volume3d", "size": [32, 64, 64], "grid": GRID, **changes})


def an_output(**changes: object) -> ModelOutput:
    given = {"name": "out", "kind": "segmentation", "activation": "softmax", "classes": [CLASS]}
    return ModelOutput.model_validate({**given, **changes})


def a_card(**changes: object) -> ModelCard:
    given: dict[str, object] = {
        "name": "test",
        "version": "1",
        "file": "test.onnx",
        "sha256": "0" * 64,
        "intended_use": "Tests.",
        "manufacturer": "tests",
        "calibrated": "false",
        "inputs": [an_input()],
        "outputs": [an_output()],
        "heatmap": {"full_scale": 1, "threshold": 0.5},
    }
    return ModelCard.model_validate({**given, **changes})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: an_input(kind="volume3d"), "a volume3d input needs one"),
        (lambda: an_input(grid=GRID), "any other has none"),
        (lambda: an_input(size=[8, 64, 64]), "slices has 2 numbers"),
        (lambda: a_volume_input(size=[64, 64]), "volume3d has 3 numbers"),
        (lambda: an_input(kind="image2d", neighbours=1), "only of a slices input"),
        (lambda: a_volume_input(windowing={"source": "source"}), "share one window"),
        (lambda: an_input(size=[0, 64]), "greater than 0"),
        (lambda: Grid(spacing_mm=(1, 1, 1), orientation="SPS"), "one of R L, one of A P"),
        (lambda: Grid(spacing_mm=(1, 1, 1), orientation="axial"), "one of R L, one of A P"),
        (lambda: Grid(spacing_mm=(1, 0, 1), orientation="RAS"), "greater than 0"),
        (lambda: MinimumRegion(ml=1, cells=3), "either ml or cells"),
        (lambda: MinimumRegion(ml=None, cells=None), "either ml or cells"),
        (lambda: an_output(background="true", activation="sigmoid"), "segmentation with softmax"),
        (lambda: an_output(background="true", kind="classification"), "segmentation with softmax"),
        (lambda: Preference(attribute="EchoTime"), "either equals or choose"),
        (
            lambda: Preference(attribute="EchoTime", equals="1", choose="lowest"),
            "either equals or choose",
        ),
        (lambda: Preference(attribute="ImageType", choose="lowest"), "is no number"),
        (lambda: Preference(attribute="PatientName", equals="x"), "Input should be"),
        (lambda: StackRule(minimum_slices=0), "greater than or equal to 1"),
        (
            lambda: a_card(inputs=[an_input(kind="image2d")], stack={"minimum_slices": 3}),
            "an image2d model takes every image",
        ),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        make()


def test_channels_follow_neighbours_and_background() -> None:
    assert (an_input().channels, an_input(neighbours=2).channels) == (1, 5)
    assert (an_output().channels, an_output(background="true").channels) == (1, 2)


def test_a_model_of_slices_gets_the_largest_stack_unless_the_card_says_otherwise() -> None:
    assert a_card().stack_rule == StackRule()
    assert a_card(stack={"minimum_slices": 9}).stack_rule == StackRule(minimum_slices=9)
    assert a_card(inputs=[an_input(kind=InputKind.IMAGE2D)]).stack_rule is None

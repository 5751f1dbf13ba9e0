"""What each bundled model learns, and from how much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dicom_xai.config import Grid, InputKind, ModelInput, Windowing, WindowSource
from dicom_xai.demo.networks import SmallResNet
from dicom_xai.demo.phantom import HAEMORRHAGE


@dataclass(frozen=True, slots=True)
class CodedClass:
    """One class as the card describes it."""

    name: str
    label: str
    code: str  #: SNOMED CT
    meaning: str


@dataclass(frozen=True, slots=True)
class Task:
    """What one model learns, and from how much."""

    name: str
    spec: ModelInput
    classes: tuple[CodedClass, ...]
    train: int  #: phantoms
    held_out: int
    epochs: int
    batch: int = 16
    network: Callable[[int], SmallResNet] = SmallResNet


TASKS = {
    "cxr": Task(
        name="phantom-cxr",
        spec=ModelInput(
            name="image",
            kind=InputKind.IMAGE2D,
            size=(256, 256),
            windowing=Windowing(
                source=WindowSource.PERCENTILE, low_percentile=1.0, high_percentile=99.0
            ),
            scaling=(-1.0, 1.0),
        ),
        classes=(
            CodedClass("nodule", "Nodule", "427359005", "Solitary nodule of lung"),
            CodedClass("consolidation", "Consolidation", "95436008", "Lung consolidation"),
            CodedClass("pneumothorax", "Pneumothorax", "36118008", "Pneumothorax"),
        ),
        train=2400,
        held_out=240,
        epochs=7,
    ),
    "ct-head": Task(
        name="phantom-ct-head",
        spec=ModelInput(
            name="image",
            kind=InputKind.SLICES,
            size=(256, 256),
            windowing=Windowing(source=WindowSource.FIXED, center=45.0, width=110.0),
            scaling=(-1.0, 1.0),
        ),
        classes=(CodedClass(HAEMORRHAGE, "Haemorrhage", "1386000", "Intracranial hemorrhage"),),
        train=200,
        held_out=60,
        epochs=6,
    ),
    "ct-3d": Task(
        name="phantom-ct-3d",
        spec=ModelInput(
            name="image",
            kind=InputKind.VOLUME3D,
            size=(32, 96, 96),
            grid=Grid(spacing_mm=(4.5, 2.25, 2.25), orientation="SPL"),
            windowing=Windowing(source=WindowSource.FIXED, center=45.0, width=110.0),
            scaling=(-1.0, 1.0),
        ),
        classes=(CodedClass(HAEMORRHAGE, "Haemorrhage", "1386000", "Intracranial hemorrhage"),),
        train=200,
        held_out=60,
        epochs=6,
        batch=4,
        network=partial(
            SmallResNet,
            channels=(6, 8, 12),
            dilations=(1,),
            strides=((2, 2, 2), (1, 2, 2), (1, 1, 1)),
            gain=576.0,
        ),
    ),
}

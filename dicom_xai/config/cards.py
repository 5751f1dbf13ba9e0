"""config/models/NAME.yaml: what a model is, takes and gives."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dicom_xai.config.types import (
    Bool,
    Name,
    Section,
)
from dicom_xai.study import Per


class InputKind(StrEnum):
    """What a model takes."""

    IMAGE2D = "image2d"
    SLICES = "slices"
    VOLUME3D = "volume3d"


class ResizeRule(StrEnum):
    """How a frame meets the model's grid."""

    LETTERBOX = "letterbox"  #: aspect kept, rest filled with the lowest value
    STRETCH = "stretch"  #: both axes on their own


class WindowSource(StrEnum):
    """Where the window of the model's input comes from."""

    FIXED = "fixed"  #: center and width of the card, in modality units
    SOURCE = "source"  #: the image's own VOI, else the percentiles
    PERCENTILE = "percentile"  #: low and high percentile of the valid pixels


class Windowing(Section):
    """How modality units become 0..1."""

    source: WindowSource
    center: float | None = Field(None, description="fixed: in modality units.")
    width: float | None = Field(None, gt=0, description="fixed: in modality units.")
    low_percentile: float = Field(0.5, ge=0, le=100)
    high_percentile: float = Field(99.5, ge=0, le=100)

    @model_validator(mode="after")
    def _fixed_is_given(self) -> Windowing:
        if self.source is WindowSource.FIXED and (self.center is None or self.width is None):
            raise ValueError("windowing source fixed needs center and width")
        if self.low_percentile >= self.high_percentile:
            raise ValueError("low_percentile must be below high_percentile")
        return self


class Align(StrEnum):
    """Where a volume lies on an axis of the grid; what sticks out is cropped."""

    START = "start"  #: first cell on the volume's first end
    CENTER = "center"  #: middle on middle
    END = "end"  #: last cell on the volume's last end


class Grid(Section):
    """The grid in the patient that a volume3d model wants; axes in the order of `size`."""

    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    orientation: str = Field(
        description="Where the index of each axis grows to, three of R L A P S I: SPL is slices "
        "upwards, rows to the back, columns to the left; or source: as the slices lie."
    )
    align: tuple[Align, Align, Align] = (Align.CENTER, Align.CENTER, Align.CENTER)

    @model_validator(mode="after")
    def _axes_are_three(self) -> Grid:
        pairs = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
        axes = [pairs.get(letter) for letter in self.orientation]
        if self.orientation != "source" and sorted(axes, key=str) != [0, 1, 2]:
            raise ValueError(
                f"orientation {self.orientation!r}: one of R L, one of A P and one of S I, in the "
                "order of size, or source"
            )
        return self


class ModelInput(Section):
    """One input tensor."""

    name: str = Field(description="The ONNX input's name.")
    kind: InputKind
    size: tuple[PositiveInt, ...] = Field(
        min_length=2, max_length=3, description="rows, columns; volume3d: the axes of the grid."
    )
    neighbours: int = Field(
        0,
        ge=0,
        le=16,
        description="slices: so many on each side as further channels, lowest first; beyond the "
        "ends of the stack its end slice again.",
    )
    grid: Grid | None = Field(None, description="volume3d: required; else absent.")
    windowing: Windowing
    scaling: tuple[float, float] = Field(
        (0.0, 1.0), description="What 0 and 1 after windowing become."
    )
    photometric: Literal["MONOCHROME1", "MONOCHROME2"] = Field(
        "MONOCHROME2", description="Which end of the range the model sees as bright."
    )
    resize: ResizeRule = Field(ResizeRule.LETTERBOX, description="image2d, slices.")

    @model_validator(mode="after")
    def _kind_decides(self) -> ModelInput:
        is_volume = self.kind is InputKind.VOLUME3D
        if is_volume != (self.grid is not None):
            raise ValueError("grid: a volume3d input needs one, any other has none")
        if len(self.size) != (3 if is_volume else 2):
            raise ValueError(f"size: {self.kind} has {3 if is_volume else 2} numbers")
        if self.neighbours and self.kind is not InputKind.SLICES:
            raise ValueError("neighbours: only of a slices input")
        if is_volume and self.windowing.source is WindowSource.SOURCE:
            raise ValueError("windowing: slices of a volume share one window: fixed or percentile")
        return self

    @property
    def channels(self) -> int:
        """Of the ONNX input's second axis."""
        return 1 + 2 * self.neighbours


class StackAttribute(StrEnum):
    """What may differ between stacks that lie at the same place: DICOM keywords."""

    IMAGE_TYPE = "ImageType"  #: any of its values, such as ORIGINAL or M
    ECHO_TIME = "EchoTime"  #: ms
    ECHO_NUMBERS = "EchoNumbers"
    INVERSION_TIME = "InversionTime"  #: ms
    B_VALUE = "DiffusionBValue"  #: s/mm2
    TEMPORAL_POSITION = "TemporalPositionIdentifier"  #: time point, from 1
    ACQUISITION_NUMBER = "AcquisitionNumber"
    TRIGGER_TIME = "TriggerTime"  #: ms
    SLICE_THICKNESS = "SliceThickness"  #: mm
    SERIES_NUMBER = "SeriesNumber"
    MODALITY = "Modality"
    CONVOLUTION_KERNEL = "ConvolutionKernel"

    @property
    def is_number(self) -> bool:
        """Whether lower and higher mean something."""
        return self not in (
            StackAttribute.IMAGE_TYPE,
            StackAttribute.MODALITY,
            StackAttribute.CONVOLUTION_KERNEL,
        )


class Preference(Section):
    """One wish about the stack; `equals` or `choose`."""

    attribute: StackAttribute
    equals: str | None = Field(None, min_length=1, description="One of the attribute's values.")
    choose: Literal["lowest", "highest"] | None = Field(
        None, description="Of a number; a stack without it comes last."
    )

    @model_validator(mode="after")
    def _is_one_wish(self) -> Preference:
        if (self.equals is None) == (self.choose is None):
            raise ValueError("a preference has either equals or choose")
        if self.choose is not None and not self.attribute.is_number:
            raise ValueError(f"{self.attribute} is no number: use equals instead of choose")
        return self

    def __str__(self) -> str:
        wish = self.choose if self.equals is None else f"equals {self.equals}"
        return f"{self.attribute} {wish}"


class StackOrientation(StrEnum):
    """How slices lie: the patient axis nearest to their normal."""

    ANY = "any"
    AXIAL = "axial"
    CORONAL = "coronal"
    SAGITTAL = "sagittal"


class StackRule(Section):
    """Which of several stacks in a unit the model gets."""

    prefer: tuple[Preference, ...] = Field(
        (), description="In order of weight; then the stack with the most slices."
    )
    minimum_slices: int = Field(1, ge=1, description="Fewer positions are no stack for this model.")
    orientation: StackOrientation = Field(
        StackOrientation.ANY, description="Stacks that lie otherwise are not used."
    )


class Code(Section):
    """A coded concept (PS3.3 Table 8.8-1)."""

    value: str = Field(min_length=1, max_length=16)
    scheme: str = Field(min_length=1, max_length=16)
    meaning: str = Field(min_length=1, max_length=64)


class ModelClass(Section):
    """One class of a model."""

    name: Name
    label: str = Field(min_length=1, max_length=48, description="As the legend shows it; ASCII.")
    threshold: float = Field(gt=0, lt=1, description="Positive at or above it.")
    category: Code = Field(description="Segmented Property Category.")
    type: Code = Field(description="Segmented Property Type.")


class MinimumRegion(Section):
    """The smallest region that counts as a finding of a segmentation; `ml` or `cells`."""

    ml: float | None = Field(None, gt=0, description="In the patient; needs spacings.")
    cells: int | None = Field(None, ge=1, description="Of the model's grid.")

    @model_validator(mode="after")
    def _is_one_size(self) -> MinimumRegion:
        if (self.ml is None) == (self.cells is None):
            raise ValueError("minimum_region has either ml or cells")
        return self


class ModelOutput(Section):
    """One output tensor."""

    name: str = Field(description="The ONNX output's name.")
    kind: Literal["classification", "segmentation"]
    activation: Literal["sigmoid", "softmax", "none"] = Field(
        description="What makes scores of the output; none = the output holds scores already."
    )
    background: Bool = Field(
        False,
        description="segmentation with softmax: channel 0 is background, and no class of its own.",
    )
    minimum_region: MinimumRegion = Field(
        MinimumRegion(ml=None, cells=1),
        description="segmentation: a class scores the highest value that a region of this size "
        "reaches, so that it is positive when so much lies at or above its threshold.",
    )
    classes: tuple[ModelClass, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _background_is_of_softmax(self) -> ModelOutput:
        if self.background and (self.kind, self.activation) != ("segmentation", "softmax"):
            raise ValueError("background: only of a segmentation with softmax")
        return self

    @property
    def channels(self) -> int:
        """Of the ONNX output's second axis."""
        return len(self.classes) + self.background


class HeatmapScale(Section):
    """The absolute scale of the maps, in the map's own unit."""

    full_scale: float = Field(gt=0, description="Drawn in the strongest colour.")
    threshold: float = Field(gt=0, description="Below it nothing is drawn and nothing segmented.")
    layer: str = Field("auto", description="Tensor to explain; auto = last before pooling.")
    measured: str = Field("", description="How and on what the two numbers were measured.")


class ModelCard(Section):
    """config/models/NAME.yaml: what a model is, takes and gives."""

    name: Name
    version: str = Field(min_length=1, max_length=32)
    file: Path
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    intended_use: str = Field(min_length=1)
    manufacturer: str = Field(min_length=1, max_length=64)
    calibrated: Bool = Field(description="true: scores are calibrated probabilities.")
    inputs: tuple[ModelInput, ...] = Field(min_length=1)
    stack: StackRule | None = Field(
        None, description="slices, volume3d: which stack; by default the one with most slices."
    )
    outputs: tuple[ModelOutput, ...] = Field(min_length=1)
    heatmap: HeatmapScale
    performance: dict[str, str] = Field(default_factory=dict, description="Figures, for people.")

    @model_validator(mode="after")
    def _stack_is_of_slices(self) -> ModelCard:
        if self.stack is not None and self.inputs[0].kind is InputKind.IMAGE2D:
            raise ValueError("stack: an image2d model takes every image; leave the section out")
        return self

    @property
    def stack_rule(self) -> StackRule | None:
        """Which stack the model gets; None for a model that takes every image on its own."""
        if self.inputs[0].kind is InputKind.IMAGE2D:
            return None
        return self.stack or StackRule()

    @property
    def classes(self) -> tuple[ModelClass, ...]:
        """The classes of the first output."""
        return self.outputs[0].classes

    @property
    def segments(self) -> bool:
        """Whether the model says of each pixel how probable each class is."""
        return self.outputs[0].kind == "segmentation"

    @property
    def digest(self) -> str:
        """SHA-256 over all that decides a result: the card's values, the file's hash among them."""
        return hashlib.sha256(self.model_dump_json(exclude={"file"}).encode()).hexdigest()

    @property
    def default_per(self) -> Per:
        """The unit a route works on when it does not say."""
        return Per.INSTANCE if self.inputs[0].kind is InputKind.IMAGE2D else Per.SERIES

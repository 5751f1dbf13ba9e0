"""The values that flow, in the order in which they flow.

::

    Instance -> Unit -> Candidate -> Job -> PlaneRecord -> Stack -> Frame -> Volume
             -> Prediction -> Attribution -> Explanation -> Result -> Receipt

All are frozen: a stage takes some and gives new ones. Arrays are torch tensors on the worker's
device; this module never imports torch, so that receiver and sender do not either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from pydicom import Dataset


class Per(StrEnum):
    """What one unit of work is."""

    INSTANCE = "instance"
    SERIES = "series"
    STUDY = "study"


class Purpose(StrEnum):
    """Why a job exists."""

    TRIAGE = "triage"  #: the first answer about a unit
    AMENDMENT = "amendment"  #: a later answer that references the one before it
    AUDIT = "audit"  #: a slow explanation after triage


class ObjectKind(StrEnum):
    """Which kind of DICOM object a result is."""

    SC = "sc"  #: Secondary Capture: the picture
    SEG = "seg"  #: Segmentation: the thresholded region
    NOTE = "note"  #: Secondary Capture with text only: why there is no result


class Priority(StrEnum):
    """Which jobs go first; the order of the members is the order of service."""

    STAT = "stat"
    ROUTINE = "routine"

    @property
    def rank(self) -> int:
        """0 goes first."""
        return list(Priority).index(self)


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sent an instance, and by which door it came in.

    `priority` is the C-STORE request's (PS3.7 9.3.1.1): 0 medium, 1 high, 2 low.
    """

    calling_ae_title: str
    called_ae_title: str
    source_address: str
    priority: int = 0
    listener: str = ""


@dataclass(frozen=True, slots=True)
class Instance:
    """A stored SOP Instance: where its bytes are and what they hash to, never a path."""

    sop_instance_uid: str
    sop_class_uid: str
    series_instance_uid: str
    study_instance_uid: str
    transfer_syntax_uid: str
    spool_key: str
    sha256: str  #: of the data set's bytes as received, without preamble and file meta
    size_bytes: int  #: of the file as stored
    sender: Sender


@dataclass(frozen=True, slots=True)
class Unit:
    """What a route works on: one instance, one series or one study.

    The UIDs below its level are empty.
    """

    per: Per
    study_instance_uid: str
    series_instance_uid: str = ""
    sop_instance_uid: str = ""

    @property
    def key(self) -> str:
        """The unit's name in the ledger: its level and the UID of that level."""
        uid = {
            Per.INSTANCE: self.sop_instance_uid,
            Per.SERIES: self.series_instance_uid,
            Per.STUDY: self.study_instance_uid,
        }[self.per]
        return f"{self.per}:{self.study_instance_uid}:{uid}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A unit that a route wants and that may not be complete yet.

    Times are seconds of the ledger's clock. A transfer is an association that brought at least one
    of the unit's instances.
    """

    candidate_id: int
    unit: Unit
    route: str
    route_json: str
    generation: int
    first_at: float  #: first instance durable
    last_at: float  #: last instance durable
    open_transfers: int
    last_end_at: float | None  #: when the last transfer ended, normally or not
    has_abnormal_end: bool  #: a transfer was aborted, or its receiver died


@dataclass(frozen=True, slots=True)
class Job:
    """One unit, one route, one model: everything that decides what the results will be.

    `route_json` is the route as it was when the unit became ready, so that a reload changes no
    study under way. `created_at` (DICOM DT, with offset) and `explainer` are written to the ledger
    when first chosen: a retry makes the same bytes.
    """

    job_id: int
    token: int  #: fencing token of the claim; a stale one cannot finish the job
    unit: Unit
    route: str
    route_json: str
    model: str
    model_digest: str
    purpose: Purpose
    generation: int  #: 0 for triage, n for the n-th amendment
    priority: Priority
    ready_at: float  #: seconds of the ledger's clock
    deadline_at: float  #: seconds of the ledger's clock
    created_at: str
    explainer: str
    attempts: int  #: with this one; not those given back for what passes by itself
    instances: tuple[Instance, ...]
    predecessors: tuple[Reference, ...] = ()
    earlier_files: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Spool keys of what an earlier try of this job made, by SOP Instance UID."""
    note: str = ""  #: how the last try ended, where it gave no result


@dataclass(frozen=True, slots=True)
class Reference:
    """A pointer to a SOP Instance (PS3.3 Table 10-11)."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class PlaneRecord:
    """Where one frame lies, as its header says: all that ordering needs, and no pixels.

    Small, and fit to be sent between processes.

    Attributes
    ----------
    sop_instance_uid, series_instance_uid : str
    number : int
        1-based frame number within the instance.
    instance_number : int
        0 when absent: it only decides between equals.
    rows, columns : int
    modality, frame_of_reference_uid : str
        Empty when absent.
    pixel_spacing_mm : tuple of float or None
        Between rows, between columns; None where the header has no two positive numbers.
    position_mm : tuple of float or None
        ImagePositionPatient: x, y, z of the first pixel's centre.
    orientation : tuple of float or None
        ImageOrientationPatient: direction of a row, direction of a column.
    facts : tuple of (str, tuple of str)
        What tells stacks apart besides their place: echo time, b-value, image type, by keyword.
    defect : str
        Why a place that the header gives cannot be used; empty when it can.
    """

    sop_instance_uid: str
    series_instance_uid: str
    number: int
    instance_number: int
    rows: int
    columns: int
    modality: str = ""
    frame_of_reference_uid: str = ""
    pixel_spacing_mm: tuple[float, float] | None = None
    position_mm: tuple[float, float, float] | None = None
    orientation: tuple[float, float, float, float, float, float] | None = None
    facts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    defect: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Which frame of which instance this is."""
        return self.sop_instance_uid, self.number


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One image plane, whose values are made on the device each time that they are asked for.

    So a unit of any length takes little memory on the device: what is kept is what was decoded.
    """

    instance: Instance
    header: Dataset  #: the source data set without its pixel data
    number: int  #: 1-based frame number within the instance
    size: tuple[int, int]  #: rows, columns
    make_values: Callable[[], torch.Tensor]
    make_valid: Callable[[], torch.Tensor | None]

    @property
    def values(self) -> torch.Tensor:
        """``(rows, columns)`` float32, modality units: after the Modality LUT (PS3.3 C.11.1)."""
        return self.make_values()

    @property
    def valid(self) -> torch.Tensor | None:
        """``(rows, columns)`` bool, False on pixel padding (PS3.3 C.7.5.1.1.2); None without."""
        return self.make_valid()


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the frames of a volume lie in the patient, in mm (PS3.3 C.7.6.2).

    `orientation` is ImageOrientationPatient, `positions_mm` one distance along the normal for each
    frame, ascending, `origins_mm` the place of each frame's first pixel: with gantry tilt it moves
    in the plane too. All are empty for projections. `problems` names what was odd: duplicated
    positions, gaps, other stacks and why this one was kept.
    """

    pixel_spacing_mm: tuple[float, float] | None = None  #: between rows, between columns
    orientation: tuple[float, ...] = ()
    positions_mm: tuple[float, ...] = ()
    origins_mm: tuple[tuple[float, float, float], ...] = ()
    slice_spacing_mm: float | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stack:
    """Which frames of a unit are used, in what order, and how they lie: known without pixels."""

    planes: tuple[PlaneRecord, ...]
    geometry: Geometry


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """The frames of a unit in the order in which the model and the results see them."""

    frames: tuple[Frame, ...]
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the model's input grid lies on one source frame.

    The source's pixel ``(row, column)`` is at ``(row * scale[0] + offset[0],
    column * scale[1] + offset[1])`` of the input grid, in input pixels, pixel centres at integers
    plus one half (so that a whole-image stretch has offset 0).
    """

    source_size: tuple[int, int]  #: rows, columns
    input_size: tuple[int, int]  #: rows, columns
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def pixels_per_cell(self, map_grid: tuple[int, ...]) -> tuple[float, float]:
        """How many source rows and columns one cell of a map over the input grid covers."""
        rows, columns = (
            size / cells / scale
            for size, cells, scale in zip(self.input_size, map_grid, self.scale, strict=True)
        )
        return rows, columns


@dataclass(frozen=True, slots=True)
class VolumePlacement:
    """Where one source frame lies on the three-dimensional grid of a model.

    The centre of the source's pixel ``(row, column)`` is at ``origin + row * per_row + column *
    per_column`` of the grid, in cells along each of its axes, cell centres at integers plus one
    half.
    """

    source_size: tuple[int, int]  #: rows, columns
    input_size: tuple[int, int, int]
    origin: tuple[float, float, float]
    per_row: tuple[float, float, float]
    per_column: tuple[float, float, float]

    def pixels_per_cell(self, map_grid: tuple[int, ...]) -> tuple[float, float]:
        """How many source rows and columns lead from one cell of a map to the next."""
        rows, columns = (
            1 / max(abs(s) * c / n for s, c, n in zip(step, map_grid, self.input_size, strict=True))
            for step in (self.per_row, self.per_column)
        )
        return rows, columns


Placements = tuple[Placement, ...] | tuple[VolumePlacement, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a model is given of one unit.

    Attributes
    ----------
    images : Tensor, (images, channels, rows, columns) or (1, 1, *grid) float32
        One image for each frame, or one volume.
    placements : tuple of Placement or of VolumePlacement
        One for each source frame.
    inside : Tensor, (images, *grid) bool
        Where the source is; elsewhere there are margins.
    cell_ml : float or None
        What one cell of the grid stands for in the patient, a slice as thick as the slice spacing;
        None where spacings are unknown.
    """

    images: torch.Tensor
    placements: Placements
    inside: torch.Tensor
    cell_ml: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What the model says about each image, and the raw maps of the same run.

    Attributes
    ----------
    scores : ndarray, (images, classes) float32
        After the card's activation, 0..1. A volume is one image.
    unit_scores : ndarray, (classes,) float32
        Of all images together.
    target_classes : ndarray, (images, targets) int64
        Which class each raw map explains; empty when no explanation was asked for.
    raw_maps : Tensor, (images, targets, *map grid) float32, or None
        In the explainer's own unit, at the resolution of the explained layer.
    placements : tuple of Placement or of VolumePlacement
        One for each source frame.
    probabilities : Tensor, (images, classes, *grid) float32, or None
        Of a segmentation, after the card's activation, zero outside the source.
    cell_ml : float or None
        See `Inputs`.
    """

    scores: NDArray[np.float32]
    unit_scores: NDArray[np.float32]
    target_classes: NDArray[np.int64]
    raw_maps: torch.Tensor | None
    placements: Placements
    probabilities: torch.Tensor | None = None
    cell_ml: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """The map of one class over a unit, on the card's absolute scale.

    Attributes
    ----------
    heat : Tensor, (frames, map rows, map columns) or (*map grid) float32
        1.0 = the card's `full_scale`; negative values are kept. Three axes of one grid where
        `placements` are of a volume. Frames that hold no map of this class are zero.
    threshold : float
        On the same scale.
    placements : tuple of Placement or of VolumePlacement
        One for each source frame.
    frame_peaks : tuple of float
        What the heat of each source frame does not exceed.
    """

    heat: torch.Tensor
    threshold: float
    placements: Placements
    frame_peaks: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """What a segmentation model says about each cell, for one class.

    Attributes
    ----------
    probability : Tensor, (frames, rows, columns) or (*grid) float32
        On the model's grid, 0..1.
    threshold : float
        The class's, on the same scale: at or above it lies the region.
    placements : tuple of Placement or of VolumePlacement
        One for each source frame.
    frame_peaks : tuple of float
        What the probability of each source frame does not exceed.
    volume_ml : float or None
        Of the region, on the model's grid; None where spacings are unknown.
    """

    probability: torch.Tensor
    threshold: float
    placements: Placements
    frame_peaks: tuple[float, ...]
    volume_ml: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """One class of the model, its score for the unit and, where it has them, map and region.

    Attributes
    ----------
    class_index : int
    name : str
    score : float
        The unit's: of a classifier the maximum over its images, of a segmentation what a region of
        the card's minimum size reaches.
    frame_scores : tuple of float
        Of each source frame; of a segmented volume what the probability there does not exceed.
        Empty for a volume classifier, which says nothing about single frames.
    frame_weights : tuple of float
        How much of the finding each frame shows: pictures are made of the highest. Of images
        their scores, of a segmentation its mean probability, of a volume classifier its mean heat.
    is_positive : bool
        Score at or above the class's threshold.
    attribution : Attribution or None
    region : Region or None
        Of a segmentation.
    """

    class_index: int
    name: str
    score: float
    frame_scores: tuple[float, ...]
    frame_weights: tuple[float, ...]
    is_positive: bool
    attribution: Attribution | None = None
    region: Region | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """All that the encoders need to know about the model's answer.

    `findings` are ordered by score, positives first. `method` and `layer` say how the maps were
    made; `method` is empty for a prediction without maps, and `note` then says why.
    """

    findings: tuple[Finding, ...]
    method: str
    layer: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """One DICOM object that we made, durable in the spool."""

    kind: ObjectKind
    ordinal: int
    purpose: Purpose
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    transfer_syntax_uid: str
    spool_key: str
    sha256: str
    size_bytes: int
    source: Instance  #: whose identity block the result carries
    references: tuple[Reference, ...] = ()
    destinations: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Receipt:
    """A destination's answer to one object."""

    destination: str
    sop_instance_uid: str
    status: int
    comment: str = ""
    sends: int = 1  #: 2 where the connection was lost before the answer to the first

"""300 slices of 512 x 512 as Segmentation and Secondary Capture: ours beside stock highdicom.

All are given the same values. Ours thresholds, quantises and draws them too; highdicom is given
finished masks and pictures, and its files are not compared with their sources' identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from highdicom.sc import SCImage
from highdicom.seg import Segmentation, SegmentDescription
from pydicom import Dataset, dcmread
from pydicom.sr.coding import Code as Concept
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless, generate_uid
from rich.table import Table

from dicom_xai.config import Code, Compression, InputKind, Layout, SegmentationKind
from dicom_xai.encode.objects import Planned
from dicom_xai.encode.results import encode_results
from dicom_xai.study import Finding, ObjectKind
from tests.bench.memory import peak_bytes
from tests.bench.timing import interleaved
from tests.make.results import Case, as_file, blob, case, header

SLICES, SIDE = 300, 512
#: Slices with a finding, in the middle: 40 %, as in the measurements that set the target.
HOT = range(90, 210)
ROUNDS = 3
Contestants = dict[str, Callable[[], int]]


def run(_: Path) -> Table:
    """Median milliseconds, ratios and peak memory of each kind of object."""
    table = Table(title=f"{SLICES} x {SIDE} x {SIDE} CT on {torch.get_num_threads()} threads")
    for heading in ("object", "contestant"):
        table.add_column(heading)
    for heading in ("ms", "x ours", "peak MB", "file MB"):
        table.add_column(heading, justify="right")
    files = [as_file(header("CT", SIDE, SIDE, n + 1)) for n in range(SLICES)]
    given = case(files, kind=InputKind.SLICES, heat_frames=HOT, segmenting=True)
    sources = [dcmread(BytesIO(file), stop_before_pixels=True) for file in files]
    values = _values()
    for name, contestants in _parts(given, sources, values).items():
        times = interleaved(contestants, ROUNDS, warm_up=1)
        ours = next(iter(times.values()))
        for contestant, seconds in times.items():
            peak, size = peak_bytes(contestants[contestant])
            figures = (f"{seconds * 1e3:.0f}", f"{seconds / ours:.1f}")
            memory = (f"{peak / 1e6:.0f}", f"{size / 1e6:.1f}")
            table.add_row(name, contestant, *figures, *memory)
    return table


def _parts(given: Case, sources: list[Dataset], values: torch.Tensor) -> dict[str, Contestants]:
    """Each kind of object and who makes it, ours first."""
    floats = values.numpy()
    masks = (floats >= 0.5).astype(np.uint8)
    pictures = np.repeat((floats[..., None] * 255).astype(np.uint8), 3, axis=-1)
    segments: dict[str, Contestants] = {
        f"SEG {kind.name} {compression}": {
            "ours": lambda k=kind, c=compression: _ours(given, values, _seg(k, c)),
            "highdicom": lambda k=kind, c=compression: _segmentation(
                given, sources, floats if k is SegmentationKind.FRACTIONAL else masks, k, c
            ),
        }
        for kind in SegmentationKind
        for compression in (Compression.NONE, Compression.RLE)
        if (kind, compression) != (SegmentationKind.BINARY, Compression.RLE)
    }
    captures: dict[str, Contestants] = {
        f"SC {compression}": {
            "ours, one of all slices": lambda c=compression: _ours(
                given, values, Planned(ObjectKind.SC, c, ("pacs",), layout=Layout.STACK)
            ),
            "ours, one of each slice": lambda c=compression: _ours(
                given, values, Planned(ObjectKind.SC, c, ("pacs",), SLICES)
            ),
            "highdicom, one of each slice": lambda c=compression: _captures(sources, pictures, c),
        }
        for compression in (Compression.NONE, Compression.JPEG)
    }
    return {**segments, **captures}


def _values() -> torch.Tensor:
    """``(slices, rows, columns)`` float32: a ball of probability, exactly zero beyond it."""
    middle, reach = (HOT[0] + HOT[-1]) / 2, len(HOT) / 2
    hill = blob(SIDE, SIDE, 0.4, 0.5, 0.15)
    values = torch.zeros(SLICES, SIDE, SIDE)
    for i in HOT:
        values[i] = 0.95 * (1 - ((i - middle) / (reach + 1)) ** 2) * hill
    return torch.where(values < 1 / 255, 0.0, values)


def _seg(kind: SegmentationKind, compression: Compression) -> Planned:
    return Planned(ObjectKind.SEG, compression, ("pacs",), region=kind)


def _ours(given: Case, values: torch.Tensor, planned: Planned) -> int:
    def read(_: Finding, frames: Sequence[int]) -> torch.Tensor:
        return values[frames[0] : frames[-1] + 1] if len(frames) > 1 else values[frames]

    made = encode_results(
        given.job,
        given.card,
        given.volume,
        given.explanation,
        [planned],
        given.described,
        given.display_of,
        read,
        read,
    )
    assert made.objects, made.skipped
    return sum(len(encoded.file) for encoded in made.objects)


def _segmentation(
    given: Case,
    sources: list[Dataset],
    values: np.ndarray,
    kind: SegmentationKind,
    compression: Compression,
) -> int:
    name = given.card.classes[0]
    made = Segmentation(
        source_images=sources,
        pixel_array=values,
        segmentation_type=kind.name,
        segment_descriptions=[
            SegmentDescription(
                segment_number=1,
                segment_label=name.label,
                segmented_property_category=Concept(*_words(name.category)),
                segmented_property_type=Concept(*_words(name.type)),
                algorithm_type="MANUAL",
            )
        ],
        series_instance_uid=generate_uid(),
        series_number=1,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="bench",
        manufacturer_model_name="bench",
        software_versions="1",
        device_serial_number="1",
        max_fractional_value=255,
        transfer_syntax_uid=(
            RLELossless if compression is Compression.RLE else ExplicitVRLittleEndian
        ),
    )
    return _saved(made)


def _captures(sources: list[Dataset], pictures: np.ndarray, compression: Compression) -> int:
    syntax = JPEGBaseline8Bit if compression is Compression.JPEG else ExplicitVRLittleEndian
    total = 0
    for n, (source, picture) in enumerate(zip(sources, pictures, strict=True)):
        made = SCImage.from_ref_dataset(
            ref_dataset=source,
            pixel_array=picture,
            photometric_interpretation="YBR_FULL_422" if compression is Compression.JPEG else "RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            series_instance_uid=generate_uid(),
            series_number=1,
            sop_instance_uid=generate_uid(),
            instance_number=n + 1,
            manufacturer="bench",
            patient_orientation=("L", "P"),
            transfer_syntax_uid=syntax,
        )
        total += _saved(made)
    return total


def _words(code: Code) -> tuple[str, str, str]:
    return code.value, code.scheme, code.meaning


def _saved(made: Dataset) -> int:
    buffer = BytesIO()
    made.save_as(buffer)
    return len(buffer.getvalue())

"""Where a result comes from, written into it: UIDs, times, equipment, references, and the file.

Rules: no clock and no random number. Everything derives from the job and its sources, so that a
retry makes the same bytes under the same UID.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from io import BytesIO

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID
from pydicom.valuerep import DT

from dicom_xai import __version__, identity, uids
from dicom_xai.config import Code, Compression, ModelCard
from dicom_xai.encode import elements
from dicom_xai.encode.pixeldata import PixelData
from dicom_xai.encode.source import Source
from dicom_xai.errors import EncodeError, IdentityError
from dicom_xai.study import Frame, Instance, Job, ObjectKind, Purpose

MANUFACTURER = "dicom_xai"
SOFTWARE = f"dicom_xai {__version__}"
BANNER = "AI - RESEARCH - NOT FOR DIAGNOSTIC USE"

#: One series number per kind, high enough to sort behind a scanner's own.
SERIES_NUMBERS = {ObjectKind.SC: 9001, ObjectKind.SEG: 9002, ObjectKind.NOTE: 9003}

_SOURCE_IMAGE = Code(
    value="121322", scheme="DCM", meaning="Source image for image processing operation"
)
_PROCESSING = Code(value="109102", scheme="DCM", meaning="Processing Equipment")


@dataclass(frozen=True, slots=True)
class Run:
    """What all results of one job share. A note has no card: no model had a part in it."""

    job: Job
    card: ModelCard | None
    method: str  #: of the explanation

    def uid(self, kind: ObjectKind, role: str, ordinal: int, compression: Compression) -> str:
        """A UID that belongs to one thing of this run (`role`: instance, series, tracking...)."""
        job = self.job
        sources = sorted(f"{i.sop_instance_uid}={i.sha256}" for i in job.instances)
        return uids.derive(
            *("result", role, kind, str(ordinal), compression, __version__),
            *(job.route, job.model, job.model_digest, self.card.digest if self.card else ""),
            *(job.purpose, str(job.generation), self.method, *sources),
        )

    @property
    def amended(self) -> str:
        """`AMENDED n` for an amendment, else nothing."""
        is_amendment = self.job.purpose is Purpose.AMENDMENT
        return f"AMENDED {self.job.generation}" if is_amendment else ""

    def created(self, block: identity.Block) -> datetime:
        """The job's creation in the time zone in which the source's times are to be read.

        TimezoneOffsetFromUTC travels with the identity block and applies to every DA and TM of
        the object (PS3.3 C.12.1.1.8).
        """
        moment: datetime | None
        try:
            moment = DT(self.job.created_at)
        except ValueError as error:
            raise EncodeError(
                f"job {self.job.job_id}: created_at is no DICOM date-time with offset"
            ) from error
        if moment is None or moment.tzinfo is None:
            raise EncodeError(f"job {self.job.job_id}: created_at has no offset from UTC")
        zone = _offset(identity.text_of(block, "TimezoneOffsetFromUTC"))
        # pydicom's subclass prints itself as received
        plain = datetime.fromisoformat(moment.isoformat())
        return plain.astimezone(zone) if zone else plain


def _offset(text: str) -> timezone | None:
    if len(text) != 5 or text[0] not in "+-" or not text[1:].isdigit():
        return None
    delta = timedelta(hours=int(text[1:3]), minutes=int(text[3:]))
    return timezone(-delta if text[0] == "-" else delta) if delta < timedelta(hours=15) else None


def describe(
    dataset: Dataset,
    run: Run,
    kind: ObjectKind,
    block: identity.Block,
    title: str,
) -> None:
    """Write series, times, equipment and qualification of a result (PS3.3 C.7.3.1, C.7.5.1, C.12).

    Parameters
    ----------
    dataset : Dataset
        Changed in place.
    title : str
        What the series holds; ASCII.
    """
    created = run.created(block)
    date, time = created.strftime("%Y%m%d"), created.strftime("%H%M%S.%f")
    for event in ("InstanceCreation", "Content", "Series"):
        setattr(dataset, f"{event}Date", date)
        setattr(dataset, f"{event}Time", time)
    parts = ("AI RESEARCH", run.amended, title)
    dataset.SeriesDescription = ascii_text(" ".join(filter(None, parts)), 64)
    dataset.SeriesNumber = SERIES_NUMBERS[kind]
    dataset.Manufacturer = MANUFACTURER
    dataset.ManufacturerModelName = identity.MODEL_NAME
    dataset.DeviceSerialNumber = uids.IMPLEMENTATION_CLASS_UID
    dataset.SoftwareVersions = SOFTWARE
    dataset.ContentQualification = "RESEARCH"
    if run.card is None:
        dataset.pop("ContributingEquipmentSequence", None)
    else:
        dataset.ContributingEquipmentSequence = [_model_equipment(run.card, created)]


def _model_equipment(card: ModelCard, created: datetime) -> Dataset:
    """The model as the device that it is (PS3.3 C.12.1.5; IHE AIR 6.5.3.1)."""
    item = Dataset()
    item.Manufacturer = ascii_text(card.manufacturer, 64)
    item.ManufacturerModelName = ascii_text(card.name, 64)
    item.SoftwareVersions = ascii_text(card.version, 64)
    item.DeviceUID = uids.device_uid(card.sha256)
    item.ContributionDateTime = created.strftime("%Y%m%d%H%M%S.%f%z")
    item.ContributionDescription = "Prediction and attribution map; " + SOFTWARE
    item.PurposeOfReferenceCodeSequence = [code_item(_PROCESSING)]
    return item


def references(
    run: Run, sources: Sequence[tuple[Instance, tuple[int, ...]]], *, derived: bool
) -> bytes:
    """The references to sources and predecessors as elements (PS3.3 C.7.6.1, C.12.4, C.12.2).

    Parameters
    ----------
    sources : sequence of (Instance, frame numbers)
        Each instance once; frame numbers, from 1, are empty for single-frame images.
    derived : bool
        Whether the pixels come from the sources (Source Image) or not (Referenced Image).
    """
    in_series: dict[str, list[bytes]] = {}
    items = []
    for instance, numbers in sources:
        plain = reference(instance.sop_class_uid, instance.sop_instance_uid)
        in_series.setdefault(instance.series_instance_uid, []).append(plain)
        items.append(b"".join([plain, _numbers(numbers), PURPOSE_SOURCE_IMAGE if derived else b""]))
    predecessors = []
    for before in run.job.predecessors:
        plain = reference(before.sop_class_uid, before.sop_instance_uid)
        predecessors.append(plain)
        if before.series_instance_uid:
            in_series.setdefault(before.series_instance_uid, []).append(plain)
    written = [
        elements.sequence(
            "ReferencedSeriesSequence",
            [
                elements.sequence("ReferencedInstanceSequence", instances)
                + elements.text("SeriesInstanceUID", series_instance_uid)
                for series_instance_uid, instances in in_series.items()
            ],
        )
    ]
    if derived:
        written.append(elements.sequence("SourceImageSequence", items))
    referenced = predecessors if derived else [*items, *predecessors]
    if referenced:
        written.append(elements.sequence("ReferencedImageSequence", referenced))
    return b"".join(written)


def reference(sop_class_uid: str, sop_instance_uid: str) -> bytes:
    """What points at an object (PS3.3 Table 10-11), as the first elements of an item."""
    return elements.text("ReferencedSOPClassUID", sop_class_uid) + elements.text(
        "ReferencedSOPInstanceUID", sop_instance_uid
    )


def _numbers(numbers: Sequence[int]) -> bytes:
    return elements.text("ReferencedFrameNumber", *map(str, numbers)) if numbers else b""


def code_item(code: Code) -> Dataset:
    """A coded concept as an item (PS3.3 Table 8.8-1)."""
    item = Dataset()
    item.CodeValue = code.value
    item.CodingSchemeDesignator = code.scheme
    item.CodeMeaning = ascii_text(code.meaning, 64)
    return item


def frames_by_instance(
    frames: Iterable[tuple[Frame, Source]],
) -> list[tuple[Instance, tuple[int, ...]]]:
    """Each instance once, with the numbers of its frames where references can name them."""
    numbers: dict[str, list[int]] = {}
    instances: dict[str, Instance] = {}
    for frame, source in frames:
        uid = frame.instance.sop_instance_uid
        instances[uid] = frame.instance
        numbers.setdefault(uid, []).extend([frame.number] if source.is_multi_frame else [])
    return [(instances[uid], tuple(sorted(found))) for uid, found in numbers.items()]


def ascii_text(text: str, length: int) -> str:
    """Our own text, safe in any character set that the source may declare: printable ASCII."""
    plain = text.encode("ascii", "replace").decode("ascii").replace("\\", "/")
    return "".join(c if " " <= c <= "~" else " " for c in plain)[:length].strip()


#: What a reference to a source is for, as an element.
PURPOSE_SOURCE_IMAGE = elements.sequence(
    "PurposeOfReferenceCodeSequence", [elements.dump(code_item(_SOURCE_IMAGE))]
)


def as_file(dataset: Dataset, more: bytes, pixels: PixelData, block: identity.Block) -> bytes:
    """The finished file, carrying the source's identity byte for byte.

    Parameters
    ----------
    dataset : Dataset
        Without pixel data; its own text is ASCII.
    more : bytes
        Further elements of the top level, in any order; they win over the data set's.
    pixels : PixelData
    block : Block
        Of the source.

    Raises
    ------
    IdentityError
        The source has no study, or what was written reads back as another identity than its.
    """
    if not identity.text_of(block, "StudyInstanceUID"):
        raise IdentityError("the source has no StudyInstanceUID; a result would join no study")
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = pixels.transfer_syntax
    meta.ImplementationClassUID = UID(uids.IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = uids.IMPLEMENTATION_VERSION_NAME
    head = BytesIO()
    head.write(b"\0" * 128 + b"DICM")
    write_file_meta_info(head, meta, enforce_standard=True)
    body = identity.splice(elements.dump(dataset) + more, block)
    is_encapsulated = pixels.transfer_syntax.is_encapsulated
    padding = b"" if is_encapsulated else b"\0" * (pixels.size_bytes % 2)
    length = 0xFFFFFFFF if is_encapsulated else pixels.size_bytes + len(padding)
    # PS3.5 8.1.2, A.4: words for wide native cells, else bytes
    vr = b"OW" if dataset.BitsAllocated > 8 and not is_encapsulated else b"OB"
    element = struct.pack("<HH2sHI", 0x7FE0, 0x0010, vr, 0, length)
    # Sequence Delimitation Item
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0) if is_encapsulated else padding
    file = b"".join([head.getvalue(), body, element, *pixels.pieces, end])
    identity.compare(block, identity.read_block(file))
    return file

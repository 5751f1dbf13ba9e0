"""The first result costs what all later ones share: tables, fonts, highdicom's module maps.

A worker pays that before it says that it is ready, by making one small result of nobody.
"""

from __future__ import annotations

import torch
from pydicom import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicom_xai import identity, uids
from dicom_xai.config import Compression, ModelCard
from dicom_xai.encode import Planned, encode_results, provenance
from dicom_xai.study import (
    Attribution,
    Explanation,
    Finding,
    Frame,
    Geometry,
    Instance,
    Job,
    ObjectKind,
    Per,
    Placement,
    Priority,
    Purpose,
    Sender,
    Unit,
    Volume,
)

_SIDE = 32


def warm_up(card: ModelCard, device: torch.device | str) -> None:
    """Make and drop one SC in each compression and one SEG, on the worker's device.

    Raises
    ------
    EncodeError, IdentityError
        The encoders do not work here: the worker must not become ready.
    """
    uid = uids.derive("warm-up")
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, uid
    header.Modality = "CT"
    header.FrameOfReferenceUID = uid
    header.ImagePositionPatient = ["0", "0", "0"]
    header.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    header.PixelSpacing, header.SliceThickness = ["1", "1"], "1"
    study = identity.Element(
        identity.STUDY_INSTANCE_UID, "UI", uid.encode() + b"\0" * (len(uid) % 2)
    )
    file = provenance.as_file(header, b"", {study.tag: study}, ExplicitVRLittleEndian)
    syntax = str(ExplicitVRLittleEndian)
    sender = Sender("", "", "")
    instance = Instance(uid, str(CTImageStorage), uid, uid, syntax, "", "", len(file), sender)
    image = torch.full((_SIDE, _SIDE), 0.5, device=device)
    volume = Volume((Frame(instance, header, 1, image),), Geometry())
    placement = Placement((_SIDE, _SIDE), (_SIDE, _SIDE))
    attribution = Attribution(image[None], 0.25, (placement,))
    finding = Finding(0, card.classes[0].name, 1.0, (1.0,), True, attribution)
    job = Job(
        job_id=0,
        token=0,
        unit=Unit(Per.STUDY, uid),
        route="warm-up",
        route_json="",
        model=card.name,
        model_digest=card.sha256,
        purpose=Purpose.TRIAGE,
        generation=0,
        priority=Priority.ROUTINE,
        ready_at=0.0,
        deadline_at=0.0,
        created_at="20000101000000.000000+0000",
        explainer="",
        attempts=0,
        instances=(instance,),
    )
    plan = [Planned(ObjectKind.SC, compression, ()) for compression in Compression]
    plan.append(Planned(ObjectKind.SEG, Compression.NONE, ("nobody",)))
    explanation = Explanation((finding,), "warm-up", "")
    encode_results(
        job,
        card,
        volume,
        explanation,
        plan,
        read_source=lambda _: file,
        display_of=lambda _: image,
        heat_of=lambda _finding, _frame: image,
    )

"""UIDs of ours: the implementation's, and those that derive from what a result was made of.

A derived UID is ``2.25.`` and a UUID's integer (PS3.5 B.2), the UUID being the first 128 bits of a
SHA-256 over the inputs. The same inputs give the same UID, so that a retry makes the same object.
"""

from __future__ import annotations

import hashlib
import re
import uuid

from dicom_xai import __version__

#: UUID-derived root of this implementation (PS3.5 B.2); chosen once.
IMPLEMENTATION_CLASS_UID = "2.25.321949168989331322481129668855793251619"
#: At most 16 characters (PS3.7 D.3.3.2.3).
IMPLEMENTATION_VERSION_NAME = f"DICOM_XAI_{__version__}"[:16]

#: Label Map Segmentation Storage (PS3.4 B.5), which pydicom 3.0 does not know by name.
LABEL_MAP_SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"

_COMPONENT = r"(?:0|[1-9][0-9]*)"
_UID = re.compile(rf"{_COMPONENT}(?:\.{_COMPONENT})+")


def derive(*inputs: str) -> str:
    """The UID that belongs to these inputs, in this order.

    Parameters
    ----------
    *inputs : str
        Everything that makes the object what it is. They are length-prefixed before hashing:
        ``("a", "bc")`` and ``("ab", "c")`` differ.
    """
    digest = hashlib.sha256()
    for text in inputs:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    # version and variant bits as PS3.5 B.2 wants a real UUID
    number = uuid.UUID(bytes=digest.digest()[:16], version=5).int
    return f"2.25.{number}"


def device_uid(model_sha256: str) -> str:
    """The Device UID of a model: a changed file is another device (IHE AIR 6.5.3.1)."""
    return derive("device", model_sha256)


def is_valid(uid: str) -> bool:
    """Whether a UID is well formed (PS3.5 9.1): digits and dots, no leading zero, 64 at most."""
    return len(uid) <= 64 and _UID.fullmatch(uid) is not None

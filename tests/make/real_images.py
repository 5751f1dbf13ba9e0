"""The real images of the pydicom wheel and of pydicom-data, 160 files; never fetched."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import data_store
import pydicom.data
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

_FOLDERS = (
    Path(pydicom.data.__file__).parent / "test_files",
    Path(data_store.__file__).parent / "data",
)


@dataclass(frozen=True, slots=True)
class RealImage:
    """One file as it lies in a wheel."""

    name: str  #: its path inside the wheel's folder
    path: Path
    syntax: UID
    uid: str  #: SOP Instance UID; some files share one
    sop_class: UID


def real_images() -> list[RealImage]:
    """All of them, by name; the pydicom wheel's first."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # many are broken on purpose
        for folder in _FOLDERS:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                header = _header(path)
                if header is not None and "Rows" in header:
                    name = path.relative_to(folder).as_posix()
                    syntax = UID(header.file_meta.get("TransferSyntaxUID", ""))
                    uids = str(header.get("SOPInstanceUID", "")), UID(header.get("SOPClassUID", ""))
                    found.append(RealImage(name, path, syntax, *uids))
    return found


def _header(path: Path) -> Dataset | None:
    try:
        return dcmread(path, stop_before_pixels=True)
    except InvalidDicomError:
        return None

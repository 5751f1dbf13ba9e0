"""What a CT slice costs to decode in each transfer syntax: why `dimse.TRANSFER_SYNTAXES` are so."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

from pydicom import dcmread
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit
from rich.table import Table

from dicom_xai.decode.codecs import CODINGS
from dicom_xai.decode.pixels import decode
from dicom_xai.demo.phantom import to_bytes
from dicom_xai.dimse import TRANSFER_SYNTAXES
from tests.bench.timing import interleaved
from tests.make.compressed import LOSSY_ERROR, an_image_object, encapsulated, frame_of
from tests.make.images import real_file

ROUNDS = 15


def run(folder: Path) -> Table:
    """Each syntax once a turn: the same 512 x 512 slice of 16 signed bits, or 12 unsigned."""
    files = _files()
    contestants = {syntax: (lambda data=data: decode(data)) for syntax, data in files.items()}
    medians = interleaved(contestants, ROUNDS)
    table = Table(title="decode: a CT slice of 512 x 512, one thread, in the order of preference")
    for heading in ("transfer syntax", "ms", "kB"):
        table.add_column(heading, justify="left" if heading == "transfer syntax" else "right")
    for syntax in TRANSFER_SYNTAXES:
        if syntax in files:
            size = f"{len(files[syntax]) / 1000:.0f}"
            table.add_row(UID(syntax).name, f"{1000 * medians[syntax]:.1f}", size)
    return table


def _files() -> dict[str, bytes]:
    plain = real_file("693_UNCR.dcm")
    ds = dcmread(io.BytesIO(plain))
    values = ds.pixel_array
    unsigned = (values.astype(int) + 2048).clip(0, 4095).astype("u2")
    files = {str(ds.file_meta.TransferSyntaxUID): plain}
    for syntax in CODINGS:
        stored, bits = (unsigned, 12) if syntax in LOSSY_ERROR else (values, 16)
        if syntax == JPEGBaseline8Bit:
            stored, bits = (unsigned >> 4).astype("u1"), 8
        an_image_object(ds, stored[None], bits=bits)
        files[syntax] = to_bytes(encapsulated(ds, [frame_of(stored, syntax, bits)], syntax))
    files[DeflatedExplicitVRLittleEndian] = _deflated(plain)
    return files


def _deflated(file: bytes) -> bytes:
    ds = dcmread(io.BytesIO(file))
    start = 144 + ds.file_meta.FileMetaInformationGroupLength
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    head = to_bytes(ds)
    meta = 144 + dcmread(io.BytesIO(head)).file_meta.FileMetaInformationGroupLength
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return head[:meta] + packer.compress(file[start:]) + packer.flush()

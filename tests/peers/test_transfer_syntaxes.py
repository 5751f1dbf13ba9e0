"""Every transfer syntax: others compress, others send, the service triages, others judge.

DCMTK, GDCM or, for HTJ2K, OpenJPH make the file; DCMTK sends it (HTJ2K, which it does not know, our
own sender); what the spool then holds must decode as another decoder says.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicom_xai import dimse
from dicom_xai.decode.pixels import decode
from dicom_xai.demo.phantom import chest, fresh_uid, to_bytes
from dicom_xai.demo.site import Site
from dicom_xai.spool import Spool
from tests.make.books import rows, wait_until_idle
from tests.make.compressed import encapsulated
from tests.make.dcmtk import dcmtk, dump_complaints, storescu
from tests.make.images import real_file
from tests.make.studies import changed
from tests.make.validators import dciodvfy_errors

pytestmark = [
    pytest.mark.peers("storescu", "dcmdump", "gdcmconv", "dciodvfy"),
    pytest.mark.slow,
]

ROUTES = """
routes:
  - name: all
    when: {}
    per: instance
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}, {object: seg, to: [pacs]}]
    budget_s: 600
"""
LUMINANCE = np.array([0.299, 0.587, 0.114])
#: storescu has no option for process 14 with another predictor than the first.
PROCESS_14 = """
[[TransferSyntaxes]]
[Process14]
TransferSyntax1 = JPEGLossless:Non-hierarchical:Process14
[[PresentationContexts]]
[Contexts]
PresentationContext1 = CTImageStorage\\Process14
[[Profiles]]
[Process14]
PresentationContexts = Contexts
"""
PROFILE, PYNETDICOM, OPENJPH = "profile", "pynetdicom", "openjph"


@dataclass(frozen=True, slots=True)
class Case:
    """One compressed file: what it is of, who makes, sends and decodes it.

    `tolerance` is the largest difference of a stored value between two decoders: 0 where the
    standard leaves none a choice. Two inverse DCTs may round differently (T.81 A.3.3), and so may
    two irreversible wavelet transforms; float32 luminance rounds in its 24th bit.
    """

    name: str
    source: str  #: a key of `sources`
    syntax: str
    make: str  #: a command that gets two file names, or OpenJPH
    send: str  #: what storescu is told to propose, or our own sender
    undo: str  #: a command that gets two file names, or OpenJPH
    tolerance: float = 0.0


CASES = (
    Case("implicit", "ct", ImplicitVRLittleEndian, "dcmconv +ti", "-xi", "dcmconv +te"),
    Case("explicit", "ct", ExplicitVRLittleEndian, "dcmconv +te", "-xe", "dcmconv +te"),
    Case("big", "ct", ExplicitVRBigEndian, "dcmconv +tb", "-xb", "dcmconv +te"),
    Case("deflated", "ct", DeflatedExplicitVRLittleEndian, "dcmconv +td", "-xd", "dcmconv +te"),
    Case("rle", "ct", RLELossless, "dcmcrle", "-xr", "dcmdrle"),
    Case("rle-frames", "frames", RLELossless, "dcmcrle", "-xr", "gdcmconv -w"),
    Case("rle-rgb", "rgb", RLELossless, "gdcmconv --rle", "-xr", "dcmdrle", 1e-4),
    Case("baseline", "byte", JPEGBaseline8Bit, "dcmcjpeg +eb", "-xy", "dcmdjpeg", 1),
    Case("baseline-ycc", "rgb", JPEGBaseline8Bit, "dcmcjpeg +eb", "-xy", "dcmdjpeg +cn", 1),
    Case("baseline-rgb", "rgb", JPEGBaseline8Bit, "dcmcjpeg +eb +cr", "-xy", "dcmdjpeg +cn", 1),
    Case("extended", "twelve", JPEGExtended12Bit, "dcmcjpeg +ee", "-xx", "dcmdjpeg", 1),
    Case("lossless", "ct", JPEGLossless, "dcmcjpeg +el +sv 6", PROFILE, "dcmdjpeg"),
    Case("sv1", "ct", JPEGLosslessSV1, "dcmcjpeg +e1", "-xs", "dcmdjpeg"),
    Case("sv1-rgb", "rgb", JPEGLosslessSV1, "gdcmconv --jpeg", "-xs", "dcmdjpeg +cn", 1e-4),
    Case("ls", "ct", JPEGLSLossless, "dcmcjpls +el", "-xt", "dcmdjpls"),
    Case("ls-frames", "frames", JPEGLSLossless, "gdcmconv --jpegls", "-xt", "dcmdjpls"),
    Case("ls-near", "twelve", JPEGLSNearLossless, "dcmcjpls +en +md 2", "-xu", "dcmdjpls"),
    Case("j2k", "ct", JPEG2000Lossless, "gdcmconv --j2k", "-xv", "gdcmconv -w"),
    Case("j2k-rgb", "rgb", JPEG2000Lossless, "gdcmconv --j2k", "-xv", "gdcmconv -w", 1e-4),
    Case("j2k-lossy", "twelve", JPEG2000, "gdcmconv --j2k -Y -r 10", "-xw", "gdcmconv -w", 1),
    Case("ht", "ct", HTJ2KLossless, OPENJPH, PYNETDICOM, OPENJPH),
    Case("ht-rpcl", "twelve", HTJ2KLosslessRPCL, OPENJPH, PYNETDICOM, OPENJPH),
    Case("ht-lossy", "twelve", HTJ2K, OPENJPH, PYNETDICOM, OPENJPH, 1),
)


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """One file as it went out."""

    case: Case
    plain: Path  #: before anybody compressed it
    path: Path
    uid: str
    answer: str


@dataclass(frozen=True, slots=True, eq=False)
class Trip:
    """All that was sent, and the site that took it."""

    site: Site
    sent: dict[str, Sent]


def sources() -> dict[str, bytes]:
    """Uncompressed images of each kind, explicit little endian."""
    twelve = chest(np.random.default_rng(7), views=("PA",), matrix=(160, 140)).datasets[0]
    byte = dcmread(io.BytesIO(to_bytes(twelve)))
    byte.PixelData = (twelve.pixel_array >> (twelve.BitsStored - 8)).astype(np.uint8).tobytes()
    byte["PixelData"].VR = "OB"
    byte.BitsAllocated, byte.BitsStored, byte.HighBit = 8, 8, 7
    for keyword in ("WindowCenter", "WindowWidth"):
        if keyword in byte:
            delattr(byte, keyword)
    return {
        "ct": real_file("CT_small.dcm"),  # 16 bits, signed
        "twelve": to_bytes(twelve),
        "byte": to_bytes(byte),
        "rgb": real_file("examples_rgb_color.dcm"),
        "frames": real_file("eCT_Supplemental.dcm"),
    }


@pytest.fixture(scope="module")
def trip(tmp_path_factory: pytest.TempPathFactory, seeing_models: Path) -> Iterator[Trip]:
    folder = tmp_path_factory.mktemp("transfer-syntaxes")
    site = Site(
        folder / "site",
        routes=ROUTES,
        models=seeing_models,
        environment={"OMP_NUM_THREADS": "1"},
    )
    images = sources()
    with site:
        sent = {case.name: _send(site, case, images[case.source], folder) for case in CASES}
        wait_until_idle(site.folder, timeout_s=240)
        yield Trip(site, sent)


def _send(site: Site, case: Case, image: bytes, folder: Path) -> Sent:
    plain, path = folder / f"{case.name}.plain.dcm", folder / f"{case.name}.dcm"
    plain.write_bytes(changed(image, SOPInstanceUID=fresh_uid()))
    if case.make == OPENJPH:
        path.write_bytes(to_bytes(_htj2k(dcmread(plain), case.syntax)))
    else:
        _convert(case.make, plain, path)
    made = dcmread(path, stop_before_pixels=True)
    assert made.file_meta.TransferSyntaxUID == case.syntax, case.name
    return Sent(case, plain, path, str(made.SOPInstanceUID), _answer(site, case, path))


def _answer(site: Site, case: Case, path: Path) -> str:
    if case.send == PYNETDICOM:
        (status,) = site.send([path.read_bytes()])
        return dimse.Status(status).name.capitalize()
    if case.send == PROFILE:
        profile = path.with_name("storescu.cfg")
        profile.write_text(PROCESS_14)
        return storescu(site.port, [path], "-xf", str(profile), "Process14", required=False)[path]
    return storescu(site.port, [path], case.send)[path]


def _htj2k(ds: Dataset, syntax: str) -> Dataset:
    options = {"level": 0.0005} if syntax == HTJ2K else {}
    frame = imagecodecs.htj2k_encode(ds.pixel_array, reversible=syntax != HTJ2K, **options)
    return encapsulated(ds, [bytes(frame)], syntax)


def _convert(command: str, source: Path, made: Path) -> None:
    program, *options = command.split()
    done = dcmtk(program, *options, source, made)
    assert made.exists(), done.stderr


def test_the_cases_are_all_syntaxes_that_are_taken() -> None:
    assert {case.syntax for case in CASES} == set(dimse.TRANSFER_SYNTAXES)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_what_was_sent_is_stored_in_its_syntax(trip: Trip, name: str) -> None:
    sent = trip.sent[name]
    assert sent.answer == "Success"
    (row,) = _stored(trip, sent)
    assert row["transfer_syntax_uid"] == sent.case.syntax


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_what_is_stored_decodes_as_another_decoder_says(
    trip: Trip, name: str, tmp_path: Path
) -> None:
    sent = trip.sent[name]
    (row,) = _stored(trip, sent)
    found = decode(Spool(trip.site.folder / "spool").read(str(row["spool_key"])))
    expected = _by_another(sent, tmp_path)
    assert found.stored.shape == expected.shape
    difference = np.abs(found.stored.astype(np.float64) - expected)
    assert difference.max() <= sent.case.tolerance


def _by_another(sent: Sent, folder: Path) -> np.ndarray:
    """``(frames, rows, columns)``, luminance of colour; pydicom reads uncompressed bytes only."""
    if sent.case.undo == OPENJPH:
        ds = dcmread(sent.path)
        # one frame in one fragment, behind an empty or one-entry table
        start = ds.PixelData.index(b"\xff\x4f\xff\x51")
        return np.asarray(imagecodecs.htj2k_decode(ds.PixelData[start:]))[None]
    undone = folder / "undone.dcm"
    _convert(sent.case.undo, sent.path, undone)
    ds = dcmread(undone)
    assert not UID(ds.file_meta.TransferSyntaxUID).is_encapsulated
    ds.pixel_array_options(raw=True)
    values = ds.pixel_array
    if ds.SamplesPerPixel == 3:
        values = values @ LUMINANCE if ds.PhotometricInterpretation == "RGB" else values[..., 0]
    return np.asarray(values.reshape(-1, ds.Rows, ds.Columns))


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_each_comes_back_as_results_that_validate(trip: Trip, name: str, tmp_path: Path) -> None:
    sent = trip.sent[name]
    made = rows(
        trip.site.folder,
        "SELECT result.kind, result.spool_key FROM result"
        " JOIN instance ON instance.id = result.source_instance_id"
        " WHERE instance.sop_instance_uid = ?",
        sent.uid,
    )
    assert {row["kind"] for row in made} == {"sc", "seg"}
    inherited = set(map(_plain, dciodvfy_errors(sent.plain)))
    for row in made:
        path = tmp_path / f"{row['kind']}.dcm"
        path.write_bytes(Spool(trip.site.folder / "spool").read(str(row["spool_key"])))
        assert dump_complaints(path) == []
        assert set(map(_plain, dciodvfy_errors(path))) <= inherited


def _plain(error: str) -> str:
    """An error without where it stands."""
    return error.rpartition("> - ")[2]


def _stored(trip: Trip, sent: Sent) -> list[dict[str, object]]:
    return rows(
        trip.site.folder,
        "SELECT transfer_syntax_uid, spool_key FROM instance WHERE sop_instance_uid = ?",
        sent.uid,
    )

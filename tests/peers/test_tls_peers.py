"""TLS with DCMTK and Orthanc, both ways, and what their users see when they are refused."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicom_xai.config import ClientTLS, Destination, Listener, ListenerTLS
from dicom_xai.deliver.storage_scu import StorageSCU, Timeouts
from dicom_xai.errors import DestinationUnavailableError
from dicom_xai.receive.inspect import file_meta
from tests.make.associations import HOST, Shelf, an_image, encoded, listening
from tests.make.certificates import Authority, Signed
from tests.make.dcmtk import dcmtk
from tests.make.orthanc import Orthanc

CT = [(CTImageStorage, ExplicitVRLittleEndian)]
SHORT = Timeouts(connect_s=5.0, associate_s=5.0, answer_s=10.0)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def peer(authority: Authority) -> Signed:
    return authority.sign("peer", is_rsa=True)


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, bytes]:
    """A file, and its data set."""
    ds = an_image(rows=512, columns=512)
    data = encoded(ds)
    path = tmp_path / "image.dcm"
    names = (ExplicitVRLittleEndian, ds.SOPClassUID, ds.SOPInstanceUID)
    path.write_bytes(file_meta(*names, "PEER") + data)
    return path, data


def our_door(authority: Authority) -> tuple[Listener, ...]:
    ours = authority.sign("door", is_rsa=True)
    tls = ListenerTLS(
        certificate=ours.certificate,
        private_key=ours.private_key,
        ca=authority.ca,
        ae_titles_by_certificate={"peer": ("STORESCU", "ECHOSCU", "ORTHANC")},
    )
    return (Listener(ae_title="DICOM_XAI", host=HOST, port=0, tls=tls),)


def our_files(authority: Authority, **fields: object) -> ClientTLS:
    ours = authority.sign("us", is_rsa=True)
    values = {
        "ca": authority.ca,
        "certificate": ours.certificate,
        "private_key": ours.private_key,
        "server_name": "peer",
    }
    return ClientTLS.model_validate(values | fields)


def options_of(shown: Signed, ca: Path) -> Sequence[object]:
    return ("+tls", shown.private_key, shown.certificate, "+cf", ca)


@pytest.mark.peers("storescu", "echoscu")
@pytest.mark.promise("N10")
@pytest.mark.parametrize("profile", ["+py", "+px", "+pz"])
def test_dcmtk_stores_and_echoes_in_each_bcp_195_profile(
    authority: Authority, peer: Signed, image: tuple[Path, bytes], profile: str
) -> None:
    door = Shelf()
    shown = (*options_of(peer, authority.ca), profile)
    with listening(door, listeners=our_door(authority)) as scp:
        to = ("-aec", "DICOM_XAI", HOST, scp.ports[0])
        echo = dcmtk("echoscu", *shown, *to)
        assert echo.returncode == 0, echo.stderr
        store = dcmtk("storescu", *shown, *to, image[0])
        assert store.returncode == 0, store.stderr
        door.wait("ends")
    assert door.data_sets == [image[1]]


@pytest.mark.peers("echoscu")
@pytest.mark.promise("N10")
def test_what_a_dcmtk_user_sees_when_refused(
    authority: Authority, peer: Signed, tmp_path: Path
) -> None:
    door = Shelf()
    elsewhere = Authority(tmp_path / "elsewhere")
    expired = authority.sign("peer", first_day=-9, last_day=-2, file="late", is_rsa=True)
    foreign = elsewhere.sign("peer", is_rsa=True)
    other = authority.sign("other", is_rsa=True)
    cases = [
        (("+tla", "+cf", authority.ca), "tls"),
        (options_of(expired, authority.ca), "tls"),
        (options_of(foreign, authority.ca), "tls"),
        (options_of(peer, elsewhere.ca), "tls"),  # it refuses us
        ((), "tls"),  # plain
        (options_of(other, authority.ca), "certificate"),
        ((*options_of(peer, authority.ca), "-aet", "CT2"), "certificate"),
    ]
    said = []
    with listening(door, listeners=our_door(authority)) as scp:
        for number, (shown, _) in enumerate(cases, start=1):
            to = ("-to", 5, "-ta", 5, "-aec", "DICOM_XAI", HOST, scp.ports[0])
            done = dcmtk("echoscu", *shown, *to)
            assert done.returncode != 0
            said.append(done.stdout + done.stderr)
            door.wait("refusals", number)
    assert door.reasons() == [reason for _, reason in cases]
    assert "Calling AE Title Not Recognized" in said[5]
    assert "Calling AE Title Not Recognized" in said[6]
    assert all(text.strip() for text in said)


@contextmanager
def storescp(folder: Path, *options: object) -> Iterator[int]:
    """DCMTK's server behind TLS on a free port."""
    with socket.create_server((HOST, 0)) as probe:
        port = int(probe.getsockname()[1])
    folder.mkdir(exist_ok=True)
    words = [str(each) for each in ("storescp", "-od", folder, "+B", *options, port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection((HOST, port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
        yield port
    finally:
        process.terminate()
        process.wait(10)


def place(port: int, tls: ClientTLS) -> Destination:
    return Destination(type="dimse", ae_title="PEER", host=HOST, port=port, tls=tls)


@pytest.mark.peers("storescp")
@pytest.mark.promise("N10")
def test_dcmtk_keeps_our_bytes_by_mutual_tls(
    authority: Authority, peer: Signed, image: tuple[Path, bytes], tmp_path: Path
) -> None:
    path, data = image
    with storescp(tmp_path / "kept", *options_of(peer, authority.ca)) as port:
        scu = StorageSCU("pacs", place(port, our_files(authority)), CT, SHORT)
        assert scu.send(path.read_bytes()).status == 0
        scu.close()
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.read_bytes().endswith(data)


@pytest.mark.peers("storescp")
@pytest.mark.promise("N10")
def test_a_dcmtk_that_we_or_it_do_not_trust_gets_nothing(
    authority: Authority, peer: Signed, image: tuple[Path, bytes], tmp_path: Path
) -> None:
    elsewhere = Authority(tmp_path / "elsewhere")
    expired = authority.sign("peer", first_day=-9, last_day=-2, file="late", is_rsa=True)
    good = our_files(authority)
    cases = [
        (options_of(expired, authority.ca), good, "has expired"),
        (options_of(elsewhere.sign("peer", is_rsa=True), authority.ca), good, "certificate"),
        (options_of(peer, authority.ca), our_files(authority, server_name="pacs"), "mismatch"),
        (options_of(peer, elsewhere.ca), good, "TLS failed|closed|agreed to no association"),
        ((), good, "does it speak TLS on this port"),  # plain: it waits for more
    ]
    kept = tmp_path / "kept"
    for options, tls, why in cases:
        with (
            storescp(kept, *options) as port,
            pytest.raises(DestinationUnavailableError, match=why),
        ):
            StorageSCU("pacs", place(port, tls), CT, SHORT).send(image[0].read_bytes())
    assert list(kept.iterdir()) == []


class SecureOrthanc(Orthanc):
    """Orthanc that speaks TLS alone, with us as its one modality."""

    def __init__(self, folder: Path, authority: Authority, shown: Signed, our_port: int) -> None:
        super().__init__(folder)
        self._files = (shown, authority.ca)
        self._our_port = our_port

    def _config(self) -> dict[str, object]:
        shown, ca = self._files
        return {
            **super()._config(),
            "DicomTlsEnabled": True,
            "DicomTlsCertificate": str(shown.certificate),
            "DicomTlsPrivateKey": str(shown.private_key),
            "DicomTlsTrustedCertificates": str(ca),
            "DicomTlsRemoteCertificateRequired": True,
            "DicomModalities": {
                "service": {
                    "AET": "DICOM_XAI",
                    "Host": HOST,
                    "Port": self._our_port,
                    "UseDicomTls": True,
                }
            },
        }

    def post(self, path: str, body: object) -> object:
        """Its answer to a POST of JSON."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._url(path), data=data, method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")


@pytest.mark.peers("Orthanc")
@pytest.mark.promise("N10")
def test_orthanc_takes_from_us_and_sends_to_us_by_mutual_tls(
    authority: Authority, peer: Signed, image: tuple[Path, bytes], tmp_path: Path
) -> None:
    path, data = image
    door = Shelf()
    with (
        listening(door, listeners=our_door(authority)) as scp,
        SecureOrthanc(tmp_path / "orthanc", authority, peer, scp.ports[0]) as orthanc,
    ):
        to = place(orthanc.port, our_files(authority))
        to = to.model_copy(update={"ae_title": orthanc.ae_title})
        scu = StorageSCU("pacs", to, CT, SHORT)
        assert scu.echo().echo_s > 0
        assert scu.send(path.read_bytes()).status == 0
        scu.close()
        (held,) = json.loads(orthanc.get("instances"))
        orthanc.post("modalities/service/echo", {})
        orthanc.post("modalities/service/store", held)
        door.wait("ends")
        # without a certificate of ours it takes nothing
        bare = to.model_copy(update={"tls": ClientTLS(ca=authority.ca, server_name="peer")})
        with pytest.raises(DestinationUnavailableError):
            StorageSCU("pacs", bare, CT, SHORT).open()
    assert door.data_sets == [data]
    assert door.arrivals[0].sender.calling_ae_title == "ORTHANC"

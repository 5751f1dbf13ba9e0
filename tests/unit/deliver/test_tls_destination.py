"""The sender towards destinations that speak TLS."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification

from dicom_xai.config import ClientTLS, Destination, ListenerTLS
from dicom_xai.deliver.storage_scu import StorageSCU, Timeouts
from dicom_xai.errors import DestinationUnavailableError
from dicom_xai.receive.inspect import file_meta
from dicom_xai.tls import Credentials, Rotation
from tests.make.associations import HOST, an_image, encoded, stubborn, wait_until_all_have_ended
from tests.make.certificates import Authority

SHORT = Timeouts(connect_s=2.0, associate_s=2.0, answer_s=5.0, stall_s=2.0)
CT = [(CTImageStorage, ExplicitVRLittleEndian)]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    wait_until_all_have_ended()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def a_file(columns: int = 64) -> bytes:
    ds = an_image(rows=512, columns=columns)
    data = encoded(ds)
    return file_meta(ExplicitVRLittleEndian, ds.SOPClassUID, ds.SOPInstanceUID, "SENDER") + data


@contextmanager
def archive(context: ssl.SSLContext, kept: list[bytes]) -> Iterator[int]:
    """pynetdicom's own SCP behind TLS; gives its port."""
    ae = AE("PACS")
    ae.add_supported_context(Verification)
    ae.add_supported_context(CTImageStorage, ExplicitVRLittleEndian)

    def keep(event: evt.Event) -> int:
        kept.append(event.encoded_dataset(include_meta=False))
        return 0x0000

    server = ae.start_server(
        (HOST, 0), block=False, ssl_context=context, evt_handlers=[(evt.EVT_C_STORE, keep)]
    )
    try:
        yield server.server_address[1]
    finally:
        ae.shutdown()


def guarded_by(authority: Authority, name: str = "pacs") -> ssl.SSLContext:
    signed = authority.sign(name)
    files = ListenerTLS(
        certificate=signed.certificate, private_key=signed.private_key, ca=authority.ca
    )
    return Credentials(name, files).context()


def sending(
    port: int, tls: ClientTLS, rotations: list[Rotation] | None = None, host: str = HOST
) -> StorageSCU:
    place = Destination(type="dimse", ae_title="PACS", host=host, port=port, tls=tls)
    rotated = None if rotations is None else rotations.append
    return StorageSCU("pacs", place, CT, SHORT, rotated=rotated)


def ours(authority: Authority, **fields: object) -> ClientTLS:
    signed = authority.sign("us")
    values = {
        "ca": authority.ca,
        "certificate": signed.certificate,
        "private_key": signed.private_key,
    }
    return ClientTLS.model_validate(values | fields)


@pytest.mark.promise("N10")
def test_objects_arrive_byte_for_byte_over_mutual_tls(authority: Authority) -> None:
    kept: list[bytes] = []
    files = [a_file(), a_file(4000), a_file()]  # 64 kB and 4 MB: many TLS records
    with archive(guarded_by(authority), kept) as port:
        scu = sending(port, ours(authority))
        assert scu.echo().echo_s > 0
        assert [scu.send(file).status for file in files] == [0, 0, 0]
        scu.close()
    assert [file.endswith(data) for file, data in zip(files, kept, strict=True)] == [True] * 3


@pytest.mark.promise("N10")
def test_why_tls_failed_is_said(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger")
    for tls, why in (
        (ours(authority, server_name="elsewhere"), "Hostname mismatch"),
        (ours(authority, ca=stranger.ca), "self-signed certificate in certificate chain"),
        (ClientTLS(ca=authority.ca), "certificate required"),
        (ours(stranger, ca=authority.ca), "unknown ca"),
    ):
        with archive(guarded_by(authority), []) as port:
            scu = sending(port, tls)
            with pytest.raises(DestinationUnavailableError, match=f"TLS failed: .*{why}"):
                scu.open()
            assert not scu.is_open


@pytest.mark.promise("N10")
def test_a_destination_that_speaks_plain_is_never_sent_to_in_the_clear(
    authority: Authority,
) -> None:
    heard: list[bytes] = []

    def reject(connection: socket.socket) -> None:
        heard.append(connection.recv(64))
        connection.sendall(b"\x03\x00\x00\x00\x00\x04\x00\x01\x01\x01")  # A-ASSOCIATE-RJ

    why = "TLS failed: (wrong version number|packet length)"
    with stubborn(reject) as port, pytest.raises(DestinationUnavailableError, match=why):
        sending(port, ours(authority)).open()
    assert heard[0][:1] == b"\x16"  # a TLS handshake record, no PDU


@pytest.mark.promise("N1")
def test_a_destination_that_is_silent_during_the_handshake_is_given_up(
    authority: Authority,
) -> None:
    why = "did not begin TLS in 2 s"
    with (
        stubborn(lambda sock: None) as port,
        pytest.raises(DestinationUnavailableError, match=why),
    ):
        sending(port, ours(authority)).open()


@pytest.mark.promise("N10")
def test_a_renewed_certificate_is_shown_on_the_next_association(authority: Authority) -> None:
    rotations: list[Rotation] = []
    with archive(guarded_by(authority), []) as port:
        scu = sending(port, ours(authority), rotations)
        scu.open()
        scu.close()
        ours(authority)  # signs again, in the same place
        scu.open()
        scu.close()
    assert [rotation.is_taken for rotation in rotations] == [True]

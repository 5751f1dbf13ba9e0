"""Listeners that speak TLS: who gets in, who does not, and who cannot hold up the others."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicom_xai.config import ClientTLS, Destination, Listener, ListenerTLS
from dicom_xai.deliver.storage_scu import StorageSCU, Timeouts
from dicom_xai.errors import DestinationUnavailableError
from dicom_xai.receive.inspect import file_meta
from tests.make.associations import (
    HOST,
    Shelf,
    an_image,
    association_request,
    connected,
    encoded,
    listening,
    next_pdu,
)
from tests.make.certificates import Authority, Signed

CT = [(CTImageStorage, ExplicitVRLittleEndian)]
SHORT = Timeouts(connect_s=5.0, associate_s=5.0, answer_s=5.0)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def door_of(authority: Authority, **fields: object) -> tuple[Listener, ...]:
    """One listener with TLS, whose certificate is `door`."""
    ours = authority.sign("door")
    values: dict[str, object] = {
        "certificate": ours.certificate,
        "private_key": ours.private_key,
        "ca": authority.ca,
    }
    tls = ListenerTLS.model_validate(values | fields)
    return (Listener(ae_title="DICOM_XAI", host=HOST, port=0, tls=tls),)


def a_sender(
    port: int, authority: Authority, shown: Signed | None, calling: str = "CT1"
) -> StorageSCU:
    tls = ClientTLS(
        ca=authority.ca,
        server_name="door",
        certificate=shown.certificate if shown else None,
        private_key=shown.private_key if shown else None,
    )
    place = Destination(
        type="dimse", ae_title="DICOM_XAI", host=HOST, port=port, calling_ae_title=calling, tls=tls
    )
    return StorageSCU("door", place, CT, SHORT)


def a_file(columns: int = 16) -> tuple[bytes, bytes]:
    """A file, and its data set."""
    ds = an_image(rows=512, columns=columns)
    data = encoded(ds)
    names = (ExplicitVRLittleEndian, ds.SOPClassUID, ds.SOPInstanceUID)
    return file_meta(*names, "CT1") + data, data


@pytest.mark.promise("N10")
@pytest.mark.promise("D7")
def test_an_object_arrives_byte_for_byte_over_mutual_tls(authority: Authority) -> None:
    door = Shelf()
    file, data = a_file(2000)  # 2 MB: many records
    with listening(door, listeners=door_of(authority)) as scp:
        scu = a_sender(scp.ports[0], authority, authority.sign("ct-1"))
        assert scu.send(file).status == 0
        assert scu.send(a_file()[0]).status == 0
        scu.close()
        door.wait("ends")
    assert door.data_sets[0] == data
    assert door.ends == [(1, "released")]


@pytest.mark.promise("N10")
@pytest.mark.promise("N11")
def test_nobody_gets_in_without_a_certificate_that_is_taken(
    authority: Authority, tmp_path: Path
) -> None:
    door = Shelf()
    expired = authority.sign("ct-1", first_day=-9, last_day=-2, file="expired")
    stranger = Authority(tmp_path / "elsewhere").sign("ct-1")
    with listening(door, listeners=door_of(authority)) as scp:
        for shown in (None, expired, stranger):
            with pytest.raises(DestinationUnavailableError):
                a_sender(scp.ports[0], authority, shown).send(a_file()[0])
        plain = connected(scp.ports[0], association_request())
        assert next_pdu(plain)[:1] != b"\x02"
        plain.close()
        door.wait("refusals", 4)
    assert door.reasons() == ["tls"] * 4
    assert sum("certificate" in why for why in door.details) == 3
    assert (door.transfers, door.arrivals) == (0, [])


@pytest.mark.promise("N10")
def test_a_certificate_is_tied_to_its_ae_titles(authority: Authority) -> None:
    door = Shelf()
    tied = door_of(authority, ae_titles_by_certificate={"ct-1": ["CT1"], "ct-2": ["CT2"]})
    ct_1, other = authority.sign("ct-1"), authority.sign("other")
    with listening(door, listeners=tied) as scp:
        allowed = a_sender(scp.ports[0], authority, ct_1)
        allowed.open()
        allowed.close()
        for shown, calling in ((ct_1, "CT2"), (other, "CT1")):
            with pytest.raises(DestinationUnavailableError, match="Calling AE title not recog"):
                a_sender(scp.ports[0], authority, shown, calling).open()
    assert door.reasons() == ["certificate"] * 2


@pytest.mark.promise("N1")
@pytest.mark.promise("N10")
def test_silent_clients_neither_hold_up_a_good_one_nor_stay(authority: Authority) -> None:
    door = Shelf()
    with listening(door, listeners=door_of(authority)) as scp:
        silent = [connected(scp.ports[0]) for _ in range(15)]
        half = [connected(scp.ports[0], b"\x16\x03\x01\x02\x00\x01\x00") for _ in range(15)]
        scu = a_sender(scp.ports[0], authority, authority.sign("ct-1"))
        assert scu.echo().echo_s > 0
        scu.close()
        assert "no-association-request" not in door.reasons()  # they were still there
        door.wait("refusals", 30)
        for sock in (*silent, *half):
            assert next_pdu(sock) == b""
            sock.close()
    assert door.reasons() == ["no-association-request"] * 30


@pytest.mark.promise("N10")
def test_a_renewed_certificate_is_shown_and_open_associations_go_on(authority: Authority) -> None:
    door = Shelf()
    with listening(door, listeners=door_of(authority)) as scp:
        ct_1 = authority.sign("ct-1")
        scu = a_sender(scp.ports[0], authority, ct_1)
        assert scu.send(a_file()[0]).status == 0
        before = _serial(scp.ports[0], authority, ct_1)
        door_of(authority)  # signs again, in the same place
        assert _serial(scp.ports[0], authority, ct_1) != before
        Path(authority.folder / "door.key").write_text("torn")
        last = _serial(scp.ports[0], authority, ct_1)
        assert scu.send(a_file()[0]).status == 0
        scu.close()
    assert last not in ("", before)
    assert door.transfers == 1


@pytest.mark.promise("N10")
def test_plain_and_tls_are_listeners_of_their_own(authority: Authority) -> None:
    door = Shelf()
    plain = Listener(ae_title="DICOM_XAI", host=HOST, port=0)
    with listening(door, listeners=(plain, *door_of(authority))) as scp:
        place = Destination(type="dimse", ae_title="DICOM_XAI", host=HOST, port=scp.ports[0])
        scu = StorageSCU("door", place, CT, SHORT)
        assert scu.send(a_file()[0]).status == 0
        scu.close()
        secure = a_sender(scp.ports[1], authority, authority.sign("ct-1"))
        assert secure.send(a_file()[0]).status == 0
        secure.close()


def _serial(port: int, authority: Authority, shown: Signed) -> str:
    """The serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=authority.ca)
    context.load_cert_chain(shown.certificate, shown.private_key)
    with (
        socket.create_connection((HOST, port), 5) as raw,
        context.wrap_socket(raw, server_hostname="door") as wrapped,
    ):
        return str((wrapped.getpeercert() or {})["serialNumber"])

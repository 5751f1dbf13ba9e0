"""Commands that need no model, as their users see them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.uid import ExplicitVRLittleEndian
from typer.testing import CliRunner, Result

from dicom_xai.cli import app
from dicom_xai.config import Listener, ListenerTLS
from dicom_xai.errors import ConfigError, DestinationUnavailableError
from dicom_xai.ledger import Ledger
from dicom_xai.receive.inspect import file_meta
from tests.make.associations import HOST, Shelf, an_image, encoded, listening
from tests.make.certificates import Authority
from tests.make.config_files import Folder
from tests.make.ledger import an_instance, receive, url_in


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Has signed `door` and `us`."""
    made = Authority(tmp_path / "tls")
    made.sign("door")
    made.sign("us")
    return made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    ds = an_image()
    path = tmp_path / "image.dcm"
    names = (ExplicitVRLittleEndian, ds.SOPClassUID, ds.SOPInstanceUID)
    path.write_bytes(file_meta(*names, "SENDER") + encoded(ds))
    return path


def guarded(authority: Authority) -> dict[str, object]:
    """A listener that asks for certificates, and ties `us` to one AE title."""
    tls = ListenerTLS(
        certificate=authority.folder / "door.pem",
        private_key=authority.folder / "door.key",
        ca=authority.ca,
        ae_titles_by_certificate={"us": ("DICOM_XAI", "XAI_OUT")},
    )
    return {"listeners": (Listener(ae_title="DICOM_XAI", host=HOST, port=0, tls=tls),)}


@pytest.mark.promise("N10")
def test_send_speaks_mutual_tls_to_an_address(authority: Authority, image: Path) -> None:
    door = Shelf()
    with listening(door, **guarded(authority)) as scp:
        to = ("--to", f"DICOM_XAI@{HOST}:{scp.ports[0]}", "--tls-ca", authority.ca)
        ours = ("--tls-certificate", authority.folder / "us.pem")
        ours += ("--tls-key", authority.folder / "us.key")
        done = run("send", image, *to, *ours)
        assert (done.exit_code, "0x0000 delivered" in done.output) == (0, True), done.output
        assert run("send", image, *to, *ours, "--tls-name", "door").exit_code == 0
        elsewhere = run("send", image, *to, *ours, "--tls-name", "elsewhere").exception
        assert isinstance(elsewhere, DestinationUnavailableError)
        assert "TLS failed: Hostname mismatch" in str(elsewhere)
        unknown = run("send", image, *to).exception
        assert isinstance(unknown, DestinationUnavailableError)
        assert "certificate required" in str(unknown)
    assert len(door.arrivals) == 2


@pytest.mark.promise("N10")
def test_send_to_a_name_takes_the_terms_of_that_destination(
    authority: Authority, image: Path, tmp_path: Path
) -> None:
    door = Shelf()
    with listening(door, **guarded(authority)) as scp:
        folder = Folder(tmp_path)
        terms = f"port: {scp.ports[0]}, calling_ae_title: XAI_OUT, tls: " + (
            "{ca: tls/ca.pem, certificate: tls/us.pem, private_key: tls/us.key}}"
        )
        folder.spoil("dicom-xai.yaml", "ae_title: PACS, host", "ae_title: DICOM_XAI, host")
        folder.spoil("dicom-xai.yaml", "port: 4242}", terms)
        done = run("send", image, "--to", "pacs", "--config", folder.write())
    assert (done.exit_code, "0x0000 delivered" in done.output) == (0, True), done.output
    assert door.arrivals[0].sender.calling_ae_title == "XAI_OUT"


def test_plain_text_is_never_sent_where_tls_was_asked_for(
    authority: Authority, image: Path
) -> None:
    door = Shelf()
    with listening(door) as scp:
        to = ("--to", f"DICOM_XAI@{HOST}:{scp.ports[0]}")
        assert run("send", image, *to).exit_code == 0
        refused = run("send", image, *to, "--tls-ca", authority.ca).exception
    assert isinstance(refused, DestinationUnavailableError)
    assert len(door.arrivals) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "pacz"), "no destination 'pacz' in .*; did you mean 'pacs'?"),
        (("--to", "elsewhere"), "known: pacs; another address is AE@HOST:PORT"),
        (("--to", "PACS@host"), "wanted AE@HOST:PORT"),
        (("--to", "pacs", "--calling", "ME"), "has its terms in .*: leave them out"),
        (("--to", "pacs", "--tls-ca", "ca.pem"), "has its terms in .*: leave them out"),
        (("--to", "PACS@h:104", "--tls-key", "us.key"), "go together"),
        (("--to", "PACS@h:104", "--tls-name", "pacs"), "--tls-ca is missing"),
        (("--to", "PACS@h:104", "--tls-ca", "no.pem"), "no.pem cannot be used: No such file"),
    ],
)
def test_what_send_cannot_do_is_said(
    arguments: tuple[str, ...], words: str, image: Path, tmp_path: Path
) -> None:
    config = Folder(tmp_path).write()
    done = run("send", image, *arguments, "--config", config)
    with pytest.raises(ConfigError, match=words):
        raise done.exception or AssertionError(done.output)


def test_the_quarantine_is_counted_and_listed_and_names_no_patient(tmp_path: Path) -> None:
    config = Folder(tmp_path / "config").write()
    ledger = Ledger(url_in(tmp_path / "var"))
    nothing = run("ledger", "quarantine", "--config", config)
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    for number in (1, 2):
        for content in ("", "other"):
            receive(ledger, an_instance(number, content=content))
    ledger.close()
    listed = run("ledger", "quarantine", "--config", config)
    assert listed.exit_code == 0
    for number in (1, 2):
        assert an_instance(number).sop_instance_uid in listed.stdout.splitlines()[3 - number]
    assert "2 in all" in listed.stdout

"""Contexts by BCP 195: what they refuse, and how they follow their files."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dicom_xai.config import ClientTLS, ListenerTLS, Secret
from dicom_xai.errors import ConfigError
from dicom_xai.tls import Credentials, Rotation, TLSSocket, names_in
from tests.make.certificates import Authority, Signed


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def listener(signed: Signed, authority: Authority, **fields: object) -> ListenerTLS:
    values = {
        "certificate": signed.certificate,
        "private_key": signed.private_key,
        "ca": authority.ca,
    }
    return ListenerTLS.model_validate(values | fields)


def client(authority: Authority, signed: Signed | None = None, **fields: object) -> ClientTLS:
    values: dict[str, object] = {"ca": authority.ca}
    if signed is not None:
        values |= {"certificate": signed.certificate, "private_key": signed.private_key}
    return ClientTLS.model_validate(values | fields)


@contextmanager
def answering(context: ssl.SSLContext, problems: list[str]) -> Iterator[int]:
    """A server that shakes hands once and echoes one line; gives its port."""
    door = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = door.accept()
        connection.settimeout(5)
        try:
            with context.wrap_socket(connection, server_side=True) as wrapped:
                wrapped.settimeout(5)
                wrapped.sendall(wrapped.recv(100))
        except OSError as error:
            problems.append(getattr(error, "reason", None) or type(error).__name__)
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield door.getsockname()[1]
    finally:
        thread.join(10)
        door.close()


def exchange(server: ssl.SSLContext, context: ssl.SSLContext, name: str) -> tuple[bytes, str]:
    """What comes back, and what the client's end says when TLS fails."""
    with (
        answering(server, []) as port,
        socket.create_connection(("127.0.0.1", port), 5) as raw,
    ):
        try:
            wrapped = context.wrap_socket(raw, server_hostname=name)
        except ssl.SSLError as error:
            return b"", str(getattr(error, "verify_message", "") or error.reason)
        with wrapped:
            wrapped.settimeout(5)
            with suppress(OSError):  # closed already; the reason waits to be read
                wrapped.sendall(b"hello")
            try:
                return wrapped.recv(100), ""
            except OSError:
                assert isinstance(wrapped, TLSSocket)
                return b"", wrapped.problem


@pytest.mark.promise("N10")
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_both_ends_meet_in_tls_1_2_and_1_3(authority: Authority, version: str) -> None:
    at_server = Credentials("door", listener(authority.sign("door"), authority)).context()
    at_client = Credentials("pacs", client(authority, authority.sign("us"))).context()
    at_client.maximum_version = at_client.minimum_version = ssl.TLSVersion[version]
    assert exchange(at_server, at_client, "door") == (b"hello", "")


@pytest.mark.promise("N10")
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_older_versions_are_refused(authority: Authority, version: str) -> None:
    at_server = Credentials("door", listener(authority.sign("door"), authority)).context()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(authority.ca)
    old.minimum_version = old.maximum_version = ssl.TLSVersion[version]
    old.set_ciphers("ALL:@SECLEVEL=0")  # or its own library would not even ask
    answer, problem = exchange(at_server, old, "door")
    assert not answer
    assert "PROTOCOL_VERSION" in problem


@pytest.mark.promise("N10")
def test_every_cipher_of_tls_1_2_has_forward_secrecy_and_authentication(
    authority: Authority,
) -> None:
    context = Credentials("door", listener(authority.sign("door"), authority)).context()
    offered = [each for each in context.get_ciphers() if each["protocol"] == "TLSv1.2"]
    assert offered
    assert all(each["kea"] == "kx-ecdhe" and each["aead"] for each in offered)
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_NO_COMPRESSION


@pytest.mark.promise("N10")
def test_a_client_without_certificate_or_with_a_strangers_or_an_expired_one_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
    at_server = Credentials("door", listener(authority.sign("door"), authority)).context()
    strangers = Authority(tmp_path / "strangers").sign("us")
    expired = authority.sign("us", first_day=-9, last_day=-2, file="expired")
    revoked = authority.sign("us", file="revoked")
    files = listener(authority.sign("door"), authority, crl=authority.revoke(revoked))
    with_list = Credentials("door", files).context()
    for server, shown, word in (
        (at_server, None, "certificate required"),
        (at_server, strangers, "unknown ca"),
        (at_server, expired, "certificate expired"),
        (with_list, revoked, "certificate revoked"),
    ):
        context = Credentials("pacs", client(authority, shown)).context()
        answer, problem = exchange(server, context, "door")
        assert not answer
        assert word in problem


@pytest.mark.promise("N10")
def test_a_server_with_another_name_or_an_unknown_signer_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
    ours = authority.sign("us")
    forged = Authority(tmp_path / "strangers").sign("door")
    context = Credentials("pacs", client(authority, ours)).context()
    honest = Credentials("door", listener(authority.sign("door"), authority)).context()
    false = Credentials("door", listener(forged, authority)).context()
    assert exchange(honest, context, "elsewhere")[1].startswith("Hostname mismatch")
    assert "unable to get local issuer" in exchange(false, context, "door")[1]


def test_names_are_dns_names_and_common_names(authority: Authority) -> None:
    at_server = Credentials("door", listener(authority.sign("door"), authority)).context()
    at_client = Credentials("pacs", client(authority, authority.sign("ct-1.example"))).context()
    near, far = socket.socketpair()
    seen: list[tuple[str, ...]] = []

    def serve() -> None:
        with at_server.wrap_socket(near, server_side=True) as wrapped:
            seen.append(names_in(wrapped.getpeercert()))

    thread = threading.Thread(target=serve)
    thread.start()
    with at_client.wrap_socket(far, server_hostname="door"):
        thread.join(10)
    assert seen == [("ct-1.example",)]
    assert names_in(None) == names_in({}) == ()


@pytest.mark.promise("N10")
def test_a_renewed_certificate_serves_the_next_connection(
    authority: Authority, tmp_path: Path
) -> None:
    told: list[Rotation] = []
    ours = authority.sign("door", last_day=2, file="renewed")
    credentials = Credentials("door", listener(ours, authority), told.append)
    old = credentials.context()
    assert credentials.context() is old
    before = credentials.certificate
    authority.sign("door", last_day=20, file="renewed")
    assert credentials.context() is not old
    after = credentials.certificate
    assert before is not None
    assert after is not None
    # seventeen of the eighteen days, for a test that runs at midnight
    assert after.expires_s - before.expires_s > 17 * 86_400
    assert [rotation.is_taken for rotation in told] == [True]


@pytest.mark.promise("N10")
@pytest.mark.parametrize("how", ["expired", "key of another", "torn", "gone", "open to all"])
def test_a_broken_new_one_keeps_the_old_and_is_told_once(
    authority: Authority, tmp_path: Path, how: str
) -> None:
    told: list[Rotation] = []
    ours = Authority(tmp_path, "Test CA").sign("door")
    credentials = Credentials("door", listener(ours, authority), told.append)
    old = credentials.context()
    if how == "expired":
        Authority(tmp_path).sign("door", first_day=-9, last_day=-2)
    elif how == "key of another":
        ours.private_key.write_bytes(authority.sign("other").private_key.read_bytes())
    elif how == "torn":
        ours.certificate.write_bytes(ours.certificate.read_bytes()[:200])
    elif how == "gone":
        ours.certificate.unlink()
    else:
        ours.private_key.chmod(0o644)
        os.utime(ours.private_key, (1, 1))
    assert credentials.context() is old
    assert credentials.context() is old
    assert [rotation.is_taken for rotation in told] == [False]
    assert told[0].problem


def test_a_certificate_that_is_expired_at_start_is_used_and_said(authority: Authority) -> None:
    # there is no older one to keep, and other listeners must not suffer
    expired = authority.sign("door", first_day=-9, last_day=-2, file="late")
    certificate = Credentials("door", listener(expired, authority)).certificate
    assert certificate is not None
    assert certificate.expires_s == 0
    assert "has expired" in certificate.problem


@pytest.mark.promise("K7")
@pytest.mark.parametrize("mode", [0o604, 0o644, 0o660, 0o666])
def test_a_key_that_others_may_use_is_refused(authority: Authority, mode: int) -> None:
    signed = authority.sign("door", file="open")
    signed.private_key.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod"):
        Credentials("door", listener(signed, authority))


@pytest.mark.promise("K7")
def test_the_password_of_a_key_comes_from_a_file_or_the_environment(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = authority.sign("door", file="locked", password=b"QUAGGA")
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text("QUAGGA\n")
    monkeypatch.setenv("DOOR_PASSWORD", "QUAGGA")
    for secret in (Secret(file=file), Secret(variable="DOOR_PASSWORD")):
        files = listener(signed, authority, private_key_password=secret)
        assert Credentials("door", files).certificate is not None
        assert "QUAGGA" not in files.model_dump_json() + repr(files)
    monkeypatch.setenv("DOOR_PASSWORD", "wrong")
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        Credentials("door", files)
    assert "wrong" not in str(caught.value)
    monkeypatch.delenv("DOOR_PASSWORD")
    with pytest.raises(ConfigError, match="DOOR_PASSWORD is not set"):
        Credentials("door", files)
    with pytest.raises(ConfigError, match="cannot be used"):  # and nobody is asked for it
        Credentials("door", listener(signed, authority))


def test_one_thread_reads_while_another_writes(authority: Authority) -> None:
    at_server = Credentials("door", listener(authority.sign("door"), authority)).context()
    at_client = Credentials("pacs", client(authority, authority.sign("us"))).context()
    near, far = socket.socketpair()
    for end in (near, far):
        end.settimeout(10)
    size = 4_000_000
    got: list[int] = []

    def echo() -> None:
        with at_server.wrap_socket(near, server_side=True) as wrapped:
            done = 0
            while done < size:
                done += len(data := wrapped.recv(65_536))
                wrapped.sendall(data)

    def read(wrapped: ssl.SSLSocket) -> None:
        done = 0
        while done < size:
            done += len(wrapped.recv(65_536))
        got.append(done)

    server = threading.Thread(target=echo)
    server.start()
    with at_client.wrap_socket(far, server_hostname="door") as wrapped:
        reader = threading.Thread(target=read, args=(wrapped,))
        reader.start()
        wrapped.sendall(bytes(size))
        reader.join(20)
        server.join(20)
    assert got == [size]


@contextmanager
def connected(authority: Authority) -> Iterator[tuple[ssl.SSLSocket, ssl.SSLSocket]]:
    """Both ends of one connection after the handshake: the client's, the server's."""
    at_server = Credentials("door", listener(authority.sign("door"), authority)).context()
    at_client = Credentials("pacs", client(authority, authority.sign("us"))).context()
    near, far = socket.socketpair()
    kept: list[ssl.SSLSocket] = []
    server = threading.Thread(
        target=lambda: kept.append(at_server.wrap_socket(near, server_side=True))
    )
    server.start()
    with at_client.wrap_socket(far, server_hostname="door") as wrapped:
        server.join(10)
        yield wrapped, kept[0]
    kept[0].close()


def test_a_peer_that_stops_reading_is_given_up_in_time(authority: Authority) -> None:
    with connected(authority) as (ours, _):
        ours.settimeout(0.2)
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            ours.sendall(bytes(50_000_000))
        with pytest.raises(TimeoutError):
            ours.recv(1)
        # two waits of 0.2 s; ten times that for a busy machine
        assert time.monotonic() - started < 4


def test_nothing_is_written_in_the_clear_after_a_shutdown(authority: Authority) -> None:
    with connected(authority) as (ours, theirs):
        ours.shutdown(socket.SHUT_RD)  # writing is still possible beneath
        with suppress(OSError):
            ours.send(b"in the clear")
        raw = socket.socket(fileno=os.dup(theirs.fileno()))
        raw.settimeout(5)
        assert b"in the clear" not in raw.recv(1000)
        raw.close()

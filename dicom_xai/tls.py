"""TLS by BCP 195 (RFC 8996, RFC 9325; PS3.15 B.12): contexts, and the files that they follow.

TLS 1.2 with forward secrecy and authenticated encryption, or TLS 1.3; nothing older, no
renegotiation, no compression. `Credentials.context` looks at its files each time it is asked, so
that a renewed certificate serves the next connection without a restart. What is new is proved by a
handshake with itself before it is used: the key fits, the chain is whole, the certificate is valid
today and made for this purpose. Where that fails the old context stays, and somebody is told.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dicom_xai.errors import ConfigError

#: RFC 9325 4.2: ECDHE for forward secrecy, AEAD only. TLS 1.3 has its own, all of that kind.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
#: OpenSSL's verify codes for a certificate that is fine on another day.
_DATE_CODES = (9, 10)


class TLSFiles(Protocol):
    """Which PEM files a context is made of, and whose it is: a server's or a client's."""

    @property
    def is_server(self) -> bool:
        """Whether the context is of a listener."""

    @property
    def verifies_peer(self) -> bool:
        """Whether a peer without a certificate of the `ca` is refused."""

    @property
    def certificate(self) -> Path | None:
        """Ours, then its chain; None where we show none."""

    @property
    def private_key(self) -> Path | None:
        """Of that certificate."""

    @property
    def ca(self) -> Path | None:
        """Who signs the peers' certificates."""

    @property
    def crl(self) -> Path | None:
        """The CA's revocation list."""

    def key_password(self) -> str:
        """Of an encrypted key, else empty; ConfigError where it cannot be read."""


class TLSSocket(ssl.SSLSocket):
    """A TLS connection that two threads may use, one reading and one writing.

    OpenSSL wants one thread at a time (CPython guards it from 3.13 on), so each call is made
    without blocking under a lock, and the waiting is done outside. It also remembers why TLS failed
    on it, and never falls back to plain text: the standard library's `shutdown` drops the
    encryption before it shuts the connection.
    """

    #: Why TLS failed, in OpenSSL's words; empty as long as it did not.
    problem = ""
    _limit_s: float | None = None
    _turn: threading.Lock | None = None

    def do_handshake(self, block: bool = False) -> None:
        """As the base class; the timeout counts for the whole handshake."""
        try:
            super().do_handshake(block)
        except ssl.SSLError as error:
            self.problem = words_of(error)
            raise
        self._turn = threading.Lock()
        super().settimeout(0)

    def settimeout(self, value: float | None) -> None:
        """For each later read and write; seconds, None waits for ever."""
        self._limit_s = value
        if self._turn is None:
            super().settimeout(value)

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """As the base class."""
        return self._patiently(lambda: super(TLSSocket, self).read(len, buffer))

    def send(self, data: Any, flags: int = 0) -> int:
        """As the base class."""
        return int(self._patiently(lambda: super(TLSSocket, self).write(data)))

    def shutdown(self, how: int) -> None:
        """Shut the connection beneath; what another thread still writes goes nowhere."""
        socket.socket.shutdown(self, how)

    def _patiently(self, act: Callable[[], Any]) -> Any:
        if self._turn is None:
            raise OSError(errno.ENOTCONN, "no handshake yet")
        deadline_s = None if self._limit_s is None else time.monotonic() + self._limit_s
        while True:
            try:
                with self._turn:
                    return act()
            except ssl.SSLWantReadError:
                wanted = select.POLLIN
            except ssl.SSLWantWriteError:
                wanted = select.POLLOUT
            except ssl.SSLEOFError:  # the peer hung up; why, it may have said before
                raise
            except ssl.SSLError as error:  # a TLS 1.3 server refuses our certificate only here
                self.problem = words_of(error)
                raise
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            poll = select.poll()
            poll.register(self.fileno(), wanted)
            if left_s is not None and (left_s <= 0 or not poll.poll(left_s * 1000)):
                raise TimeoutError
            if left_s is None:
                poll.poll()


@dataclass(frozen=True, slots=True)
class Certificate:
    """What matters of our own certificate.

    `expires_s` is in seconds since the epoch; 0 where it is not valid today.
    """

    expires_s: float
    problem: str = ""  #: why it is not valid today


@dataclass(frozen=True, slots=True)
class Rotation:
    """Files changed on disk: taken, or not and why."""

    use: str
    certificate: Certificate | None
    problem: str = ""

    @property
    def is_taken(self) -> bool:
        """Whether the new files serve now."""
        return not self.problem


class Credentials:
    """A TLS context that follows its files.

    Parameters
    ----------
    use : str
        What it is for, in messages and metrics: a config name.
    files : TLSFiles
    rotated : callable
        Told of each change on disk; on the thread that asked for the context.

    Raises
    ------
    ConfigError
        The files cannot be used. A certificate whose dates alone are wrong is taken at start,
        where there is no older one to keep; `certificate.problem` says so.
    """

    def __init__(
        self,
        use: str,
        files: TLSFiles,
        rotated: Callable[[Rotation], None] | None = None,
    ) -> None:
        self.use = use
        self.files = files
        self._rotated = rotated
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._context, self.certificate = self._load()

    def context(self) -> ssl.SSLContext:
        """The context of the newest files that can be used."""
        with self._lock:
            stamps = self._stamps()
            if stamps == self._seen:
                return self._context
            self._seen = stamps
            problem = ""
            try:
                context, certificate = self._load()
                problem = certificate.problem if certificate is not None else ""
            except ConfigError as error:
                problem = str(error)
            if not problem:
                self._context, self.certificate = context, certificate
            rotation = Rotation(self.use, self.certificate, problem)
        if self._rotated is not None:
            self._rotated(rotation)
        return self._context

    def _paths(self) -> list[Path]:
        files = self.files
        named = (files.certificate, files.private_key, files.ca, files.crl)
        return [path for path in named if path is not None]

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        """Which bytes lie there, as far as the file system tells."""
        found: list[tuple[int, int, int] | None] = []
        for path in self._paths():
            try:
                state = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((state.st_ino, state.st_mtime_ns, state.st_size))
        return found

    def _load(self) -> tuple[ssl.SSLContext, Certificate | None]:
        files = self.files
        context = _bare_context(files.is_server)
        certificate = None
        if files.certificate is not None and files.private_key is not None:
            self._load_chain(context)
            certificate = self._prove(files.is_server)
        if files.ca is not None:
            self._trust(context, files.ca)
        if files.crl is not None:
            self._trust(context, files.crl)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        context.verify_mode = ssl.CERT_REQUIRED if files.verifies_peer else ssl.CERT_NONE
        return context, certificate

    def _load_chain(self, context: ssl.SSLContext) -> None:
        files = self.files
        assert files.certificate is not None
        assert files.private_key is not None
        check_private(files.private_key)
        password = files.key_password()
        try:
            # always given: OpenSSL would ask the terminal for it
            context.load_cert_chain(files.certificate, files.private_key, lambda: password)
        except OSError as error:
            raise ConfigError(
                f"{self.use}: tls.certificate {files.certificate} and tls.private_key "
                f"{files.private_key} cannot be used: {words_of(error)}"
            ) from error

    def _trust(self, context: ssl.SSLContext, path: Path) -> None:
        try:
            context.load_verify_locations(path)
        except OSError as error:
            raise ConfigError(f"{self.use}: {path} cannot be used: {words_of(error)}") from error

    def _prove(self, is_server: bool) -> Certificate:
        """Shake hands with ourselves; a peer that trusts our certificate verifies all the rest."""
        assert self.files.certificate is not None
        server, client = _bare_context(True), _bare_context(False)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        judge = client if is_server else server
        self._trust(judge, self.files.certificate)
        judge.verify_mode = ssl.CERT_REQUIRED
        judge.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        self._load_chain(server)
        if not is_server:
            self._load_chain(client)
        try:
            at_server, at_client = _shake_hands(server, client)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in _DATE_CODES:
                return Certificate(0.0, f"{self.files.certificate}: {words_of(error)}")
            raise ConfigError(
                f"{self.use}: tls.certificate {self.files.certificate}: {words_of(error)}"
            ) from error
        except ssl.SSLError as error:
            raise ConfigError(
                f"{self.use}: tls.certificate {self.files.certificate}: {words_of(error)}"
            ) from error
        shown = (at_client if is_server else at_server).getpeercert() or {}
        return Certificate(ssl.cert_time_to_seconds(str(shown["notAfter"])))


def check_private(path: Path) -> None:
    """Refuse a file that everybody may read or write; its group may read (Debian's ssl-cert).

    Raises
    ------
    ConfigError
        Its mode is too open, or it is not there.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}") from error
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(f"{path} has mode {mode:04o}: others may use it; chmod 0600 or 0640")


def names_in(certificate: Any) -> tuple[str, ...]:
    """The names by which a peer's certificate may be known: its DNS names and common names.

    Parameters
    ----------
    certificate : dict or None
        What `ssl.SSLSocket.getpeercert` gives; empty when the peer showed none.
    """
    shown = certificate or {}
    names = [name for kind, name in shown.get("subjectAltName", ()) if kind == "DNS"]
    for part in shown.get("subject", ()):
        names += [value for key, value in part if key == "commonName"]
    return tuple(dict.fromkeys(names))


def words_of(error: OSError) -> str:
    """What went wrong, in OpenSSL's or the system's words, without its file and line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message)
    if isinstance(error, ssl.SSLError):
        reason = error.reason or "the peer closed the connection"
        return str(reason).lower().replace("_", " ")
    return os.strerror(error.errno) if error.errno and error.errno > 0 else "no PEM of that kind"


def _bare_context(is_server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.sslsocket_class = TLSSocket
    return context


def _shake_hands(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A handshake in memory; gives the server's and the client's end."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    at_server = server.wrap_bio(to_server, to_client, server_side=True)
    at_client = client.wrap_bio(to_client, to_server)
    for _ in range(4):  # TLS 1.2 takes two round trips, TLS 1.3 one
        for end in (at_client, at_server):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return at_server, at_client

"""To the collector: RFC 5424 messages in RFC 5425 frames over TLS, in the order of the file.

The file is the queue, and `.sent` beside it holds the number of the last message that the collector
surely has. Syslog has no answer: what was written in the last seconds before a connection broke may
be lost, so it is sent again, and a collector can tell by the equal text. One process of the host
forwards at a time; when it ends, another takes over.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dicom_xai.audit.trail import Follower, Record, newest
from dicom_xai.telemetry import Event
from dicom_xai.tls import Credentials, Rotation, TLSSocket, words_of

if TYPE_CHECKING:
    from dicom_xai.config import SyslogConfig
    from dicom_xai.telemetry import Log, Metrics

#: Facility 10 (security), severity 5 (notice), as PS3.15 A.6 says: 10 * 8 + 5.
PRIORITY = 85
MESSAGE_ID = "DICOM+RFC3881"
APP_NAME = "dicom-xai"
POLL_S = 1.0
#: Connecting, shaking hands, and each write.
NETWORK_S = 5.0
#: A message is taken for delivered when its connection stood so long after it.
CONFIRM_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


def syslog_message(record: Record, host: str, pid: int) -> bytes:
    """One message as RFC 5424 writes it; the audit message follows a byte order mark (6.4)."""
    at = record.at.replace("+00:00", "Z")
    header = f"<{PRIORITY}>1 {at} {host} {APP_NAME} {pid} {MESSAGE_ID} - "
    return header.encode("ascii", "replace") + b"\xef\xbb\xbf" + record.message.encode()


def framed(message: bytes) -> bytes:
    """An octet-counted frame (RFC 5425 4.3)."""
    return b"%d %s" % (len(message), message)


class Forwarder:
    """Sends what the file gets, on a thread of its own.

    Parameters
    ----------
    directory : Path
        The trail's.
    config : SyslogConfig
    metrics : Metrics
    log : Log
    rotated : callable
        Told when the TLS files changed on disk.
    clock : callable
        Monotonic seconds.

    Raises
    ------
    ConfigError
        The TLS files cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        config: SyslogConfig,
        metrics: Metrics,
        log: Log,
        rotated: Callable[[Rotation], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._config = config
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self.credentials = Credentials("audit", config.tls, rotated)
        self._host = os.uname().nodename or "-"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit-syslog", daemon=True)
        self._rng = random.Random()

    def start(self) -> None:
        """Send from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Send no more; what is left is sent by whoever comes next."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(NETWORK_S + POLL_S)

    def _run(self) -> None:
        lock = self._lock()
        if lock is None:
            return
        try:
            pause_s = FIRST_PAUSE_S
            while not self._stopping.is_set():
                before = self._confirmed()
                problem = self._forward()
                if self._stopping.is_set():
                    return
                if self._confirmed() > before:
                    pause_s = FIRST_PAUSE_S
                self._log.warning(
                    Event.AUDIT_UNREACHABLE,
                    host=self._config.host,
                    port=self._config.port,
                    reason=problem,
                    delay_s=round(pause_s, 1),
                )
                self._stopping.wait(pause_s * self._rng.uniform(0.8, 1.2))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            os.close(lock)

    def _lock(self) -> int | None:
        """Wait until no other process forwards; None when told to stop meanwhile."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._directory / "syslog.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while not self._stopping.is_set():
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._stopping.wait(POLL_S)
            else:
                return fd
        os.close(fd)
        return None

    def _forward(self) -> str:
        """Send until the connection breaks; gives why."""
        follower = Follower(self._directory, self._confirmed())
        connection: socket.socket | None = None
        sent: deque[tuple[float, int]] = deque()
        last = self._confirmed()
        try:
            connection = self._connect()
            while not self._stopping.is_set():
                self._check_open(connection)
                while sent and self._clock() - sent[0][0] > CONFIRM_S:
                    self._confirm(sent.popleft()[1])
                self._show_backlog(last)
                record = follower.next()
                if record is None:
                    self._stopping.wait(POLL_S)
                    continue
                if record.number > last + 1 and last:
                    self._metrics.audit_dropped.inc(record.number - last - 1)
                connection.sendall(framed(syslog_message(record, self._host, os.getpid())))
                last = record.number
                sent.append((self._clock(), last))
            return ""
        except OSError as error:
            problem = connection.problem if isinstance(connection, TLSSocket) else ""
            self._show_backlog(self._confirmed())
            return problem or words_of(error)
        finally:
            follower.close()
            if connection is not None:
                connection.close()

    def _connect(self) -> socket.socket:
        config = self._config
        raw = socket.create_connection((config.host, config.port), NETWORK_S)
        try:
            name = config.tls.server_name or config.host
            wrapped = self.credentials.context().wrap_socket(raw, server_hostname=name)
        except OSError:
            raw.close()
            raise
        return wrapped

    def _check_open(self, connection: socket.socket) -> None:
        """A collector says nothing; all that can be read is its end, or a TLS alert."""
        connection.settimeout(0)
        with suppress(TimeoutError):
            if not connection.recv(4096):
                raise ConnectionResetError("closed by the collector")
        connection.settimeout(NETWORK_S)

    def _confirmed(self) -> int:
        try:
            return int((self._directory / ".sent").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def _confirm(self, number: int) -> None:
        fresh = self._directory / ".sent.new"
        fresh.write_text(str(number))
        fresh.chmod(0o600)
        fresh.rename(self._directory / ".sent")

    def _show_backlog(self, sent: int) -> None:
        last = newest(self._directory)
        self._metrics.audit_backlog.set(max(0, last.number - sent) if last else 0)

"""A syslog collector: takes TLS connections and keeps the octet-counted frames (RFC 5425)."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress

from dicom_xai.config import ClientTLS, ListenerTLS
from dicom_xai.tls import Credentials
from tests.make.certificates import Authority


class Collector:
    """Listens from `start` to `stop`, on the same port each time.

    Parameters
    ----------
    authority : Authority
        Signs its certificate and ours.
    """

    def __init__(self, authority: Authority) -> None:
        signed = authority.sign("collector")
        files = ListenerTLS(
            certificate=signed.certificate, private_key=signed.private_key, ca=authority.ca
        )
        ours = authority.sign("us")
        self.tls = ClientTLS(
            ca=authority.ca,
            certificate=ours.certificate,
            private_key=ours.private_key,
            server_name="collector",
        )
        self.frames: list[bytes] = []
        self._context = Credentials("collector", files).context()
        self._changed = threading.Condition()
        self._door: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self.port = 0

    def start(self) -> Collector:
        """Take connections."""
        self._door = socket.create_server(("127.0.0.1", self.port))
        self.port = self._door.getsockname()[1]
        thread = threading.Thread(target=self._accept, args=(self._door,))
        thread.start()
        self._threads.append(thread)
        return self

    def stop(self) -> None:
        """Close the door and all connections."""
        if self._door is not None:
            with suppress(OSError):
                self._door.shutdown(socket.SHUT_RDWR)
            self._door.close()
            self._door = None
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._threads.clear()
        self._connections.clear()

    def __enter__(self) -> Collector:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_for(self, count: int, timeout_s: float = 30.0) -> list[bytes]:
        """The frames, once there are so many; AssertionError when there are not."""
        with self._changed:
            done = self._changed.wait_for(lambda: len(self.frames) >= count, timeout_s)
        assert done, self.frames
        return self.frames

    def _accept(self, door: socket.socket) -> None:
        while True:
            try:
                connection, _ = door.accept()
            except OSError:
                return
            try:
                wrapped = self._context.wrap_socket(connection, server_side=True)
            except (OSError, ssl.SSLError):
                connection.close()
                continue
            self._connections.append(wrapped)
            with suppress(OSError), wrapped:
                self._read(wrapped)

    def _read(self, connection: socket.socket) -> None:
        data = b""
        while chunk := connection.recv(65_536):
            data += chunk
            while b" " in data:
                head, _, rest = data.partition(b" ")
                if len(rest) < int(head):
                    break
                with self._changed:
                    self.frames.append(rest[: int(head)])
                    self._changed.notify_all()
                data = rest[int(head) :]

"""Readiness and liveness by systemd's notification protocol (sd_notify(3)).

The same lines go to systemd, where each role is a unit, and to our own supervisor, where one
command runs all roles.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

SOCKET_VARIABLE = "NOTIFY_SOCKET"


class Notifier:
    """Tells whoever started us how we are; nobody listening is no error.

    Parameters
    ----------
    environment : mapping
        Where `NOTIFY_SOCKET` is looked up.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get(SOCKET_VARIABLE, "")
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def ready(self) -> None:
        """Work can be taken."""
        self._say("READY=1")

    def alive(self) -> None:
        """The main loop ticks."""
        self._say("WATCHDOG=1")

    def stopping(self) -> None:
        """No more work is taken."""
        self._say("STOPPING=1")

    def _say(self, line: str) -> None:
        if self._address:
            with (
                suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
            ):
                sock.sendto(line.encode(), self._address)


class NotifySocket:
    """The listening end, one for each child.

    Parameters
    ----------
    path : Path
        Short: a socket's address has about 100 bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        path.unlink(missing_ok=True)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def take(self) -> set[str]:
        """All lines said since the last call."""
        lines: set[str] = set()
        with suppress(BlockingIOError):
            while True:
                lines |= set(self._socket.recv(4096).decode("ascii", "replace").split("\n"))
        return lines

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self.path.unlink(missing_ok=True)

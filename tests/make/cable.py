"""A cable that can be cut: neither end hears of it, as when the other one lost its power.

What was under way when it was cut comes late if it is mended, as TCP's retransmissions do.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from tests.make.associations import HOST

_PART_BYTES = 65_536


class Cable:
    """Forwards connections to a port of this machine, both ways, while it is whole.

    Cut, it takes connections that lead nowhere, and passes on neither bytes nor the end of one.

    Parameters
    ----------
    to_port : int
    """

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self._is_whole = threading.Event()
        self._is_whole.set()
        self._left: dict[bool, int] = {}  #: bytes until it is cut, by direction
        self._lock = threading.Lock()
        self._is_over = False
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._door = socket.create_server((HOST, 0), backlog=64)
        self.port = int(self._door.getsockname()[1])

    def cut(self) -> None:
        """Now."""
        self._is_whole.clear()

    def cut_after(self, count: int, *, of_answers: bool = False) -> None:
        """As soon as so many bytes more went to the port, or came from it."""
        with self._lock:
            self._left[of_answers] = count

    @property
    def is_cut(self) -> bool:
        """Whether nothing passes."""
        return not self._is_whole.is_set()

    def mend(self) -> None:
        """Let all go on, what waits too."""
        with self._lock:
            self._left.clear()
        self._is_whole.set()

    def __enter__(self) -> Cable:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._is_whole.set()
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        for end in list(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(10)
            assert not thread.is_alive()
        for end in self._ends:
            end.close()

    def _start(self, work: object, *words: object) -> None:
        thread = threading.Thread(target=work, args=words, name="cable")  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._is_over:
            try:
                near, _ = self._door.accept()
            except OSError:
                return
            self._ends.append(near)
            self._start(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        self._is_whole.wait()
        if self._is_over:
            return
        far = socket.create_connection((HOST, self._to_port), timeout=10)
        far.settimeout(None)
        self._ends.append(far)
        self._start(self._pass_on, near, far, False)
        self._start(self._pass_on, far, near, True)

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        """One direction of one connection, until its source ends."""
        with suppress(OSError):
            while part := source.recv(_PART_BYTES):
                at = 0
                while at < len(part):
                    self._is_whole.wait()
                    allowed = self._allowed(len(part) - at, is_answer)
                    sink.sendall(part[at : at + allowed])
                    at += allowed
        self._is_whole.wait()
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _allowed(self, count: int, is_answer: bool) -> int:
        """How many of these bytes may pass before the cable is cut."""
        with self._lock:
            left = self._left.get(is_answer)
            if left is None:
                return count
            self._left[is_answer] = left - min(left, count)
            if left <= count:
                del self._left[is_answer]
                self._is_whole.clear()
            return min(left, count)

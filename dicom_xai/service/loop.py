"""The sender's threads: each does what is due for one peer, and waits for the bell.

One for each destination, one more where it commits, and one for each AE title that may ask us to
commit: a dead peer delays nobody.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from dicom_xai.config import Destination
from dicom_xai.deliver.line import Line
from dicom_xai.errors import LedgerBusyError
from dicom_xai.service.role import Context, watch_certificate
from dicom_xai.telemetry import Event

#: Safety net under the bell.
POLL_S = 0.5
#: Between asking a loop to stop and cutting its connection: the part of the grace it gets.
POLITE = 0.6


class Loop(ABC):
    """One thread, with a line to its peer that stands as long as there is work.

    Parameters
    ----------
    context : Context
    name : str
        The thread's.
    line : Line
        The thread's own.
    **about : str
        Fields of its log lines: whom it is for.
    """

    def __init__(self, context: Context, name: str, line: Line, **about: str) -> None:
        self.failure: BaseException | None = None
        self._context = context
        self._line = line
        self._log = context.log.bind(**about)
        self._stopping = threading.Event()
        self._bell = context.ledger.listen("sender")
        # a daemon: a peer that holds it must not hold the process
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Let the thread end when it may."""
        self._stopping.set()
        self._context.ledger.ring("sender")

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; False when it still runs."""
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def watch_certificate(self) -> None:
        """Show how long our certificate towards the peer lasts."""
        if self._line.credentials is not None:
            watch_certificate(self._context, self._line.credentials)

    def hang_up(self) -> None:
        """Cut the connection under the thread."""
        self._line.hang_up()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    if not self._step():
                        self._rest(self._pause_s())
                except LedgerBusyError as error:
                    self._wait_for_ledger(error)
        except BaseException as error:  # noqa: BLE001  # handed to tick, which ends the role
            self.failure = error
        finally:
            self._close()

    @abstractmethod
    def _step(self) -> bool:
        """Do one thing that is due; False when nothing is."""

    @abstractmethod
    def _next_at(self) -> float | None:
        """When something is due, on the ledger's clock; None when nothing will be."""

    def _rest(self, pause_s: float) -> None:
        """Wait for the bell, so long at most."""
        self._bell.wait(pause_s)

    def _close(self) -> None:
        """Let go of what the loop held; the last thing that its thread does."""
        self._line.close()
        self._bell.close()

    def _pause_s(self) -> float:
        at = self._next_at()
        if at is None:
            return POLL_S
        return max(0.01, min(POLL_S, at - self._context.ledger.now()))

    def _wait_for_ledger(self, error: LedgerBusyError) -> bool:
        """Wait a little, for a restart would empty no disk; True when asked to stop."""
        self._log.exception(Event.LEDGER_BUSY, error)
        return self._stopping.wait(POLL_S)


class DestinationLoop(Loop):
    """A thread for one destination.

    Parameters
    ----------
    context : Context
    work : str
        What it does, the first word of the thread's name.
    name : str
        The destination's.
    destination : Destination
    line : Line
        The thread's own.
    """

    def __init__(
        self, context: Context, work: str, name: str, destination: Destination, line: Line
    ) -> None:
        super().__init__(context, f"{work}-{name}", line, destination=name)
        self.destination = destination
        self._name = name


def end(loops: Sequence[Loop], grace_s: float) -> None:
    """Let loops finish, then cut their connections; all within one grace time.

    One that does not even end then is left to its deadlines, or to the end of the process. What it
    holds is claimed: nobody else sends that before the lease is over.
    """
    start_s = time.monotonic()
    for loop in loops:
        loop.ask_to_stop()
    held = [each for each in loops if not each.join(start_s + POLITE * grace_s - time.monotonic())]
    for loop in held:
        loop.hang_up()
    for loop in held:
        loop.join(start_s + grace_s - time.monotonic())

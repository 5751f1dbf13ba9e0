"""Storage commitment over the wire: ask a destination, or report to somebody who asked us.

A destination reports on the association of the request or on one that it opens to a listener of
ours (PS3.4 J.3.3). For the first the association is kept open for a while, as long as nothing else
is to be asked; `Asker.heard` is then called on the association's own thread.

Associations of their own: a report that comes in the middle of a C-STORE would be taken for its
answer, and results must not wait for promises.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING

from pydicom.filereader import read_dataset
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom import evt
from pynetdicom.presentation import build_context, build_role

from dicom_xai.commitment import (
    ACTION_TYPE,
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    SYNTAXES,
    CommitmentReport,
    CommitmentRequest,
    read_report,
    written,
)
from dicom_xai.deliver.line import Line
from dicom_xai.deliver.requestor import Timeouts
from dicom_xai.dimse import Status
from dicom_xai.errors import CannotUnderstandError
from dicom_xai.tls import Rotation

if TYPE_CHECKING:
    from pydicom import Dataset
    from pynetdicom.association import Association
    from pynetdicom.events import Event, EventHandlerType
    from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation

    from dicom_xai.config import Destination


class _CommitmentLine(Line):
    """An association for storage commitment alone."""

    def _opened(
        self,
        roles: tuple[SCP_SCU_RoleSelectionNegotiation, ...] = (),
        handlers: tuple[EventHandlerType, ...] = (),
    ) -> Association:
        """The association, asked for where there is none.

        Raises
        ------
        DestinationUnavailableError
            No connection, no answer, a rejection, or no storage commitment.
        """
        if self._association is not None and self.is_open:
            return self._association
        contexts = [build_context(PUSH_MODEL, list(SYNTAXES))]
        return self._associate(contexts, roles, handlers, " (storage commitment)")

    def _check(self, answer: Dataset, what: str) -> None:
        """Raise DestinationUnavailableError unless a request was answered with success."""
        status = answer.get("Status")
        if status == Status.SUCCESS:
            return
        self._drop()
        found = "nothing" if status is None else f"0x{status:04X}"
        raise self._unavailable(f"answered {found} to {what}")


class Asker(_CommitmentLine):
    """Asks one destination to commit to what it was sent.

    Parameters
    ----------
    name : str
        The destination's name in the configuration.
    destination : Destination
    heard : callable
        Given each report that comes on our association, on a thread of its own; the status that
        it gives is the answer to the destination.
    timeouts : Timeouts
    rotated : callable
        Told when the files of the destination's `tls` changed on disk.
    clock : callable
        Monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        destination: Destination,
        heard: Callable[[CommitmentReport], Status],
        timeouts: Timeouts | None = None,
        rotated: Callable[[Rotation], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name, destination, timeouts, rotated)
        self._heard = heard
        self._clock = clock
        self._asked_s = clock()
        self._message_id = 0

    def ask(self, request: CommitmentRequest) -> None:
        """Send one N-ACTION; returns when the destination has taken it (PS3.4 J.3.2).

        Raises
        ------
        DestinationUnavailableError
            It did not take it: ask again later.
        """
        association = self._opened(handlers=((evt.EVT_N_EVENT_REPORT, self._take_report),))
        self._message_id = self._message_id % 0xFFFF + 1
        try:
            with association.dimse.awaited():
                answer, _ = association.send_n_action(
                    _data_set_of(request),
                    ACTION_TYPE,
                    PUSH_MODEL,
                    PUSH_MODEL_INSTANCE,
                    msg_id=self._message_id,
                )
        except (RuntimeError, ValueError) as error:  # it ended since we looked
            self._drop()
            raise self._unavailable("closed the association before it was asked") from error
        self._check(answer, "an N-ACTION")
        self._asked_s = self._clock()

    def close_if_silent(self) -> bool:
        """Release an association on which nothing was asked for `keep_open_s`."""
        if self._association is None:
            return False
        if self.is_open and self._clock() - self._asked_s < self._destination.keep_open_s:
            return False
        self.close()
        return True

    def _take_report(self, event: Event) -> tuple[int, None]:
        information = event.request.EventInformation
        try:
            report = read_report(
                b"" if information is None else information.getvalue(),
                str(event.context.transfer_syntax),
            )
        except CannotUnderstandError:
            return int(Status.INVALID_ARGUMENT_VALUE), None
        return int(self._heard(report)), None


class Reporter(_CommitmentLine):
    """Reports to somebody who asked us for storage commitment, on associations that we open.

    Parameters
    ----------
    name : str
        Its AE title.
    destination : Destination
        Where it listens; each report has its own `calling_ae_title`.
    timeouts : Timeouts
    rotated : callable
        Told when the files of the destination's `tls` changed on disk.
    """

    kind = "peer"

    def report(self, report: CommitmentReport, asked_ae_title: str) -> None:
        """Send one N-EVENT-REPORT; returns when the peer has taken it (PS3.4 J.3.3).

        An association for each: reports are rare, and our AE title may differ.

        Parameters
        ----------
        report : CommitmentReport
        asked_ae_title : str
            The AE title of ours that the peer asked.

        Raises
        ------
        DestinationUnavailableError
            It did not take it: report again later.
        """
        self._destination = self._destination.model_copy(
            update={"calling_ae_title": asked_ae_title}
        )
        # who reports is the service's SCP, though it opens the association (PS3.7 D.3.3.4)
        association = self._opened(roles=(build_role(PUSH_MODEL, scp_role=True),))
        try:
            with association.dimse.awaited():
                answer, _ = association.send_n_event_report(
                    _data_set_of(report), report.event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE
                )
        except (RuntimeError, ValueError) as error:  # closed since, or not agreed to as an SCP
            self._drop()
            raise self._unavailable("does not take reports on our associations") from error
        else:
            self._check(answer, "an N-EVENT-REPORT")
        finally:
            self.close()


def _data_set_of(content: CommitmentRequest | CommitmentReport) -> Dataset:
    return read_dataset(BytesIO(written(content, ImplicitVRLittleEndian)), True, True)

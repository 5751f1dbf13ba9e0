"""What the receiver turns away: each counted, a few log lines however many, the audit trail told.

The first of a kind is logged at once with its cause, and how many more of it came every `GATHER_S`,
so that a flood of refusals fills no disk and its lines still add up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from dicom_xai.errors import DuplicateInstanceError
from dicom_xai.service.audited import SECURITY_REASONS, node_of
from dicom_xai.service.role import Context
from dicom_xai.study import Sender
from dicom_xai.telemetry import Event, Gathered

#: Between two lines about one kind, seconds.
GATHER_S = 10.0
#: Our own failures, and a UID that stands for two contents: a person must act.
_FOR_A_PERSON = frozenset({"not-durable", "failed", DuplicateInstanceError.reason})


@dataclass(frozen=True, slots=True)
class _Kind:
    """Refusals that are logged together; fields of the log line, empty where nobody knows."""

    reason: str
    host: str
    ae_title: str
    listener: str


def _others(kind: _Kind) -> _Kind:
    """Those of one reason whose senders are not told apart any more."""
    return replace(kind, host="others", ae_title="", listener="")


class Refusals:
    """One receiver's.

    Parameters
    ----------
    context : Context
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._gathered: Gathered[_Kind] = Gathered(_others)
        self._told_at = context.ledger.now()
        self._is_over = False

    def add(self, reason: str, sender: Sender, detail: str) -> None:
        """Something was refused; called on any thread.

        Parameters
        ----------
        reason : str
            Of a closed set: a metric's label.
        sender : Sender
            As far as it was known by then.
        detail : str
            What stands behind the reason, without patient data; may be empty.
        """
        self._context.metrics.instances_refused.labels(reason).inc()
        kind = _Kind(reason, sender.source_address, sender.calling_ae_title, sender.listener)
        count = 1
        with self._lock:
            if not self._is_over:
                kind, count = self._gathered.add(kind)
        if count == 1:
            self._tell(kind, 1, detail)
        if reason in SECURITY_REASONS:
            self._context.audit.refused(reason, node_of(sender))

    def tick(self) -> None:
        """Say how many more came, where that is due."""
        now = self._context.ledger.now()
        if now - self._told_at >= GATHER_S:
            self._told_at = now
            self._tell_rest(is_over=False)

    def end(self) -> None:
        """Say how many more came; what comes from here on is said at once."""
        self._tell_rest(is_over=True)

    def _tell_rest(self, *, is_over: bool) -> None:
        with self._lock:
            gathered = self._gathered.take()
            self._is_over = is_over
        for kind, count in gathered.items():
            if count > 1:  # the first is told
                self._tell(kind, count - 1, "")

    def _tell(self, kind: _Kind, count: int, detail: str) -> None:
        log = self._context.log
        write: Callable[..., None] = log.error if kind.reason in _FOR_A_PERSON else log.warning
        known = {"host": kind.host, "ae_title": kind.ae_title, "listener": kind.listener}
        fields = {name: value for name, value in (*known.items(), ("error", detail)) if value}
        write(Event.INSTANCE_REFUSED, reason=kind.reason, count=count, **fields)

"""What a role speaks to: messages into the trail, refusals gathered so that a flood is one line.

`record` may be called on any thread and never raises: care goes on when the trail cannot be
written, and the loss is counted and logged.
"""

from __future__ import annotations

import os
import pwd
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dicom_xai.audit.messages import Message, Participant, node_refused
from dicom_xai.audit.syslog import Forwarder
from dicom_xai.audit.trail import Trail
from dicom_xai.telemetry import Event, Gathered
from dicom_xai.tls import Rotation

if TYPE_CHECKING:
    from dicom_xai.config import AuditConfig
    from dicom_xai.telemetry import Log, Metrics

#: Refusals are written after the first of these pauses; the pause doubles while they go on.
FIRST_GATHER_S, LONGEST_GATHER_S = 1.0, 60.0
#: A node that nobody can tell from the others any more.
_OTHERS = Participant("others")


class Recorder:
    """One process's pen.

    Parameters
    ----------
    config : AuditConfig
        With `directory` made absolute.
    role : str
        Which process this is, for the messages.
    metrics : Metrics
    log : Log
    rotated : callable
        Told when the collector's TLS files changed on disk.
    """

    def __init__(
        self,
        config: AuditConfig,
        role: str,
        metrics: Metrics,
        log: Log,
        rotated: Callable[[Rotation], None] | None = None,
    ) -> None:
        assert config.directory is not None
        self.includes_patient_id = config.include_patient_id
        self.process = Participant(
            f"dicom-xai {role}", address=machine(), alternative_id=str(os.getpid())
        )
        self._config = config
        self._metrics = metrics
        self._log = log
        self._trail = Trail(config.directory, config.rotate_bytes, config.rotate_days)
        self._refusals: Gathered[tuple[str, Participant]] = Gathered(_with_the_others)
        self._news = threading.Condition()
        self._is_stopping = False
        self._gatherer = threading.Thread(target=self._gather, name="audit", daemon=True)
        self.forwarder = (
            Forwarder(config.directory, config.syslog, metrics, log, rotated)
            if config.syslog is not None
            else None
        )

    def start(self) -> None:
        """Write refusals, and forward to the collector, from now on."""
        self._gatherer.start()
        if self.forwarder is not None:
            self.forwarder.start()

    def stop(self) -> None:
        """Write what was gathered; end the threads."""
        with self._news:
            self._is_stopping = True
            self._news.notify_all()
        if self._gatherer.is_alive():
            self._gatherer.join()
        if self.forwarder is not None:
            self.forwarder.stop()

    def record(self, message: Message) -> None:
        """Write a message; returns when it is on disk, or counted as lost."""
        source_id = self._config.source_id or machine()
        site_id = self._config.site_id or ""
        try:
            self._trail.append(lambda at: message.xml(at, source_id, site_id))
        except OSError as error:
            self._metrics.audit_messages.labels("lost").inc()
            reason = os.strerror(error.errno or 0)
            self._log.error(Event.AUDIT_LOST, kind=message.event.meaning, reason=reason)
        else:
            self._metrics.audit_messages.labels("written").inc()

    def refused(self, reason: str, node: Participant) -> None:
        """Somebody was turned away; written soon, equal ones together. Never waits for the disk."""
        with self._news:
            self._refusals.add((reason, node))
            self._news.notify_all()

    def _gather(self) -> None:
        pause_s = FIRST_GATHER_S
        is_ending = False
        while not is_ending:
            with self._news:
                self._news.wait_for(lambda: self._is_stopping or bool(self._refusals))
                self._news.wait_for(lambda: self._is_stopping, pause_s)
                is_ending = self._is_stopping
                gathered = self._refusals.take()
            for (reason, node), count in gathered.items():
                self.record(node_refused(self.process, node, reason, count))
            with self._news:
                is_quiet = not self._refusals
            pause_s = FIRST_GATHER_S if is_quiet else min(2 * pause_s, LONGEST_GATHER_S)


def _with_the_others(kind: tuple[str, Participant]) -> tuple[str, Participant]:
    return kind[0], _OTHERS


def machine() -> str:
    """The name of this host."""
    return os.uname().nodename


def person() -> Participant:
    """Who runs this command, as far as the system vouches for it.

    The user of the process counts, not what the environment says; where the login had another name
    (`sudo`), that stands beside it. The remote end is the session's own word.
    """
    user = _name_of(os.getuid())
    login = _login()
    remote = os.environ.get("SSH_CONNECTION", "").partition(" ")[0]
    return Participant(
        user,
        is_requestor=True,
        address=remote or machine(),
        alternative_id=login if login != user else "",
    )


def _login() -> str:
    """The user who logged in, kept by the kernel across `sudo`; empty outside a session."""
    try:
        number = int(Path("/proc/self/loginuid").read_text())
    except (OSError, ValueError):
        return ""
    return _name_of(number) if number != 0xFFFFFFFF else ""


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)

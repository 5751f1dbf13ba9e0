"""What every role's process does: open ledger and spool, tick, reload on SIGHUP, stop on SIGTERM.

A role never exits halfway for a reload: the new config is loaded whole and handed over once; when
anything is wrong with it the old one stays and a line says so.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from math import inf
from pathlib import Path
from typing import Protocol

from dicom_xai import __version__
from dicom_xai.audit import Recorder
from dicom_xai.audit.messages import application_started, application_stopped, config_changed
from dicom_xai.audit.recorder import person
from dicom_xai.config import Config, load
from dicom_xai.errors import ConfigError, DicomXaiError, TransientError
from dicom_xai.ledger import Ledger
from dicom_xai.service.notify import Notifier
from dicom_xai.spool import Spool
from dicom_xai.telemetry import (
    MULTIPROCESS_VARIABLE,
    BuildCollector,
    Event,
    HTTPFace,
    LedgerCollector,
    LedgerState,
    Log,
    Metrics,
    Registry,
    describe,
    quiet_libraries,
    take_over_logging,
)
from dicom_xai.tls import Credentials, Rotation

TICK_S = 1.0
#: Spool and ledger are asked no more often whether they take anything in: it is a write.
_ASK_STORES_EVERY_S = 1.0
#: A disk that takes longer for one small write is told as not answering.
_STORES_ANSWER_IN_S = 3.0
#: A role that has not ticked for so long is stuck.
STUCK_AFTER_S = 15.0
#: How long SIGTERM waits for work under way.
GRACE_S = 10.0


class RoleName(StrEnum):
    """The roles; the order of the members is the order of the telemetry ports."""

    RECEIVER = "receiver"
    WORKER = "worker"
    SENDER = "sender"


@dataclass(frozen=True, slots=True)
class Context:
    """What a role is given."""

    config: Config
    ledger: Ledger
    spool: Spool
    metrics: Metrics
    log: Log
    audit: Recorder


class Role(Protocol):
    """What a role's process runs."""

    def start(self) -> None:
        """Take work from now on; returns when ready for it."""

    def tick(self) -> None:
        """Called every `TICK_S` seconds; an exception ends the process."""

    def use(self, config: Config) -> None:
        """Go on with another config; raises and keeps the old one when it cannot."""

    def stop(self, grace_s: float) -> None:
        """Take no more work and return within the grace time."""


def open_context(config: Config, role: str, registry: Registry, log: Log) -> Context:
    """Ledger, spool and metrics for one process."""
    metrics = Metrics(registry)
    metrics.prepare(route.name for route in config.routes.routes)
    log = log.bind(role=role)
    return Context(
        config=config,
        ledger=Ledger(config.service.ledger.url),
        spool=Spool(config.service.spool.directory, config.service.spool.min_free_bytes),
        metrics=metrics,
        log=log,
        audit=Recorder(
            config.service.audit, role, metrics, log, partial(report_rotation, metrics, log)
        ),
    )


def watch_certificate(context: Context, credentials: Credentials) -> None:
    """Show how long a certificate lasts, and take renewed files without waiting for a peer."""
    credentials.context()
    if credentials.certificate is not None:
        expires_s = credentials.certificate.expires_s
        context.metrics.certificate_expiry.labels(credentials.use).set(expires_s)


def report_rotation(metrics: Metrics, log: Log, rotation: Rotation) -> None:
    """Say that TLS files changed on disk, and whether they serve."""
    metrics.tls_refused.labels(rotation.use).set(0 if rotation.is_taken else 1)
    if rotation.is_taken:
        log.info(Event.TLS_RENEWED, use=rotation.use)
    else:
        log.error(Event.TLS_REFUSED, use=rotation.use, reason=rotation.problem)


def ledger_state(ledger: Ledger, spool: Spool) -> LedgerState:
    """What a scrape shows of ledger and spool."""
    depths = ledger.upkeep.depths()
    return LedgerState(
        depths=depths.rows,
        outbox_depths=depths.outbox,
        oldest_waiting_s=depths.oldest_s,
        dead_letters=depths.dead,
        uncommitted=depths.uncommitted,
        quarantined=depths.quarantined,
        free_bytes=spool.free_bytes,
    )


def ended_as_event(log: Log, serve: Callable[[], int]) -> int:
    """Serve, and say what ended it in the way that all else is said; gives the exit status.

    Parameters
    ----------
    log : Log
    serve : callable
        Gives the exit status where it was told to stop. A config that is wrong at start is
        `config-refused`, all else that it raises `role-crashed`; both give 2.
    """
    try:
        return serve()
    except ConfigError as error:
        log.error(Event.CONFIG_REFUSED, reason=str(error))
    except Exception as error:  # the top of a role; the message of what is not ours stays out
        log.exception(Event.ROLE_CRASHED, error)
    return 2


def run_role(name: RoleName, path: Path, make: Callable[[Context], Role], log: Log) -> int:
    """Run one role until it is told to stop; gives the exit status.

    Parameters
    ----------
    name : RoleName
    path : Path
        The service's config file.
    make : callable
        Builds the role.
    log : Log
    """
    log = log.bind(role=name)
    return ended_as_event(log, partial(_serve, name, path, make, log))


def _serve(name: RoleName, path: Path, make: Callable[[Context], Role], log: Log) -> int:
    quiet_libraries()
    config, lint = load(path)
    context = open_context(config, name, Registry(), log)
    log = context.log
    take_over_logging(log)
    log.info(Event.CONFIG_LOADED, config=config.digest[:12], count=len(lint))
    log.info(Event.ROLE_STARTED, pid=os.getpid(), version=__version__)
    asked = _Asked()
    notifier = Notifier()
    role = make(context)
    health = _Health(context, config.digest)
    is_alone = MULTIPROCESS_VARIABLE not in os.environ  # else the supervisor speaks for all
    parent = None if is_alone else os.getppid()
    face = _face(name, context, health) if is_alone else None
    if face is not None:
        face.start()
        context.audit.record(application_started(context.audit.process, person()))
    context.audit.start()
    try:
        _recover(context)
        role.start()
        # what is loaded by now stays: to walk it for garbage held a worker up for 0.25 s
        gc.collect()
        gc.freeze()
        health.is_started = True
        notifier.ready()
        log.info(Event.ROLE_READY, pid=os.getpid())
        while not asked.to_stop(TICK_S) and (parent is None or os.getppid() == parent):
            if asked.to_reload():
                health.revision = _reload(role, path, context, health.revision)
            _tick(role, context)
            health.ticked()
            notifier.alive()
    finally:
        notifier.stopping()
        role.stop(GRACE_S)
        if face is not None:
            face.stop()
            context.audit.record(application_stopped(context.audit.process))
        context.audit.stop()
        context.ledger.close()
        log.info(Event.ROLE_STOPPED, pid=os.getpid())
    return 0


class _Asked:
    """What signals ask of this process: to stop, or to read its config again.

    The supervisor starts a role with SIGHUP blocked: one that comes before this waits for it.
    """

    def __init__(self) -> None:
        self._signals: set[int] = set()
        self._wake = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def to_stop(self, within_s: float) -> bool:
        """Wait for a signal, so long at most; True when one has said to stop."""
        self._wake.wait(within_s)
        self._wake.clear()
        return signal.SIGTERM in self._signals or signal.SIGINT in self._signals

    def to_reload(self) -> bool:
        """Whether it was asked for since the last call."""
        if signal.SIGHUP not in self._signals:
            return False  # and one that comes now is there at the next call
        self._signals.discard(signal.SIGHUP)
        return True

    def _note(self, number: int, _frame: object) -> None:
        if number != signal.SIGHUP and number in self._signals:
            os._exit(1)  # asked twice: whatever hangs, go
        self._signals.add(number)
        self._wake.set()


def _face(name: RoleName, context: Context, health: _Health) -> HTTPFace:
    """The HTTP face of a role that runs alone."""
    registry = context.metrics.registry
    registry.register(LedgerCollector(lambda: ledger_state(context.ledger, context.spool)))
    registry.register(BuildCollector(__version__, lambda: health.revision))
    telemetry = context.config.service.telemetry
    port = telemetry.port and telemetry.port + list(RoleName).index(name)
    return HTTPFace(telemetry.host, port, registry, health)


def _recover(context: Context) -> None:
    """Free what dead processes held, and remove what they left half written."""
    freed = context.ledger.upkeep.release_dead()
    if freed:
        context.log.warning(Event.RECOVERED, count=freed)
    removed = context.spool.sweep()
    if removed:
        context.log.warning(Event.SWEPT, count=removed)


def _tick(role: Role, context: Context) -> None:
    """The role's own tick, then what every role has to see to.

    Raises
    ------
    TransientError
        The spool's disk failed to sync: the process ends.
    """
    role.tick()
    if not context.spool.is_healthy:
        # what this process wrote may not be there; the next one trusts no page of its own
        raise TransientError("the spool's disk failed to sync; this role begins anew")
    if context.audit.forwarder is not None:
        watch_certificate(context, context.audit.forwarder.credentials)


def check_reload(running: Config, wanted: Config) -> None:
    """Refuse what only a restart can change.

    Raises
    ------
    ConfigError
        Names the keys.
    """
    now, then = running.service, wanted.service
    changed = [
        key
        for key, differs in {
            "spool.directory": now.spool.directory != then.spool.directory,
            "ledger": now.ledger != then.ledger,
            "devices": now.devices != then.devices,
            "decode": now.decode != then.decode,
            "telemetry": now.telemetry != then.telemetry,
            "audit": now.audit != then.audit,
        }.items()
        if differs
    ]
    if changed:
        raise ConfigError(
            f"{wanted.path}: {', '.join(changed)} cannot change while the service runs; "
            "restart it, or put back what was there"
        )


def note_config(context: Context, path: Path, old: str, new: str, problem: str = "") -> None:
    """Tell the audit trail that another config is live, or was refused."""
    process = context.audit.process
    context.audit.record(config_changed(process, str(path), old, new, problem))


def _reload(role: Role, path: Path, context: Context, live: str) -> str:
    """Swap the config whole; gives the digest of what is live then."""
    reloads = context.metrics.config_reloads
    is_counted = MULTIPROCESS_VARIABLE not in os.environ  # else the supervisor counts, once for all
    try:
        config, _ = load(path)
        check_reload(context.config, config)
        role.use(config)
    except DicomXaiError as error:
        context.log.error(Event.CONFIG_REFUSED, reason=str(error))
        if is_counted:
            reloads.labels("refused").inc()
            note_config(context, path, live, "", str(error))
        return live
    if is_counted:
        reloads.labels("accepted").inc()
        note_config(context, path, live, config.digest)
    context.log.info(Event.CONFIG_LOADED, config=config.digest[:12])
    return config.digest


class Stores:
    """Whether there is room for what comes in, and the ledger takes writes.

    They are asked by a thread of its own, once a second at most and only while somebody wants to
    know: a disk that does not answer holds up nobody else.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._changed = threading.Condition()
        self._is_asked = False
        self._answered_at = -inf
        self._problems: list[str] = []
        self._thread = threading.Thread(target=self._answer_forever, name="stores", daemon=True)

    def problems(self) -> list[str]:
        """What is wrong, a sentence each; empty when nothing is."""
        with self._changed:
            if time.monotonic() - self._answered_at >= _ASK_STORES_EVERY_S:
                self._is_asked = True
                if self._thread.ident is None:  # many roles are never asked
                    self._thread.start()
                self._changed.notify_all()
                if not self._changed.wait_for(lambda: not self._is_asked, _STORES_ANSWER_IN_S):
                    return [f"spool and ledger did not answer in {_STORES_ANSWER_IN_S:g} s"]
            return self._problems

    def _answer_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_asked)
            problems = [
                *self._ask("spool", lambda: self._context.spool.check_room(0)),
                *self._ask("ledger", self._context.ledger.upkeep.tick),
            ]
            with self._changed:
                self._problems, self._answered_at = problems, time.monotonic()
                self._is_asked = False
                self._changed.notify_all()

    def _ask(self, name: str, use: Callable[[], None]) -> list[str]:
        try:
            use()
        except DicomXaiError as error:
            return [f"{name}: {error}"]
        except Exception as error:  # noqa: BLE001  # of a damaged database: it is the answer
            return [f"{name}: {describe(error)}"]
        return []


class _Health:
    """What the probes of a role that runs alone say."""

    def __init__(self, context: Context, revision: str) -> None:
        self._context = context
        self._stores = Stores(context)
        self._ticked_at = context.ledger.now()
        self.is_started = False
        self.revision = revision

    def ticked(self) -> None:
        self._ticked_at = self._context.ledger.now()

    def is_alive(self) -> bool:
        return not self.is_started or self._context.ledger.now() - self._ticked_at < STUCK_AFTER_S

    def why_not_ready(self) -> list[str]:
        return [*([] if self.is_started else ["starting"]), *self._stores.problems()]

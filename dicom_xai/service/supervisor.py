"""One command for all roles of one host: start, watch, restart, reload, stop, show metrics.

Each role is a process of its own: a GPU crash must not drop an association. The supervisor holds no
state; killed, it takes its roles with it, and the next start recovers from ledger and spool.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dicom_xai import __version__
from dicom_xai.audit import Participant
from dicom_xai.audit.messages import application_started, application_stopped
from dicom_xai.audit.recorder import person
from dicom_xai.config import Config, load
from dicom_xai.errors import ConfigError, DicomXaiError
from dicom_xai.service.notify import SOCKET_VARIABLE, Notifier, NotifySocket
from dicom_xai.service.role import (
    GRACE_S,
    STUCK_AFTER_S,
    Context,
    RoleName,
    Stores,
    check_reload,
    ended_as_event,
    ledger_state,
    note_config,
    open_context,
)
from dicom_xai.telemetry import (
    MULTIPROCESS_VARIABLE,
    BuildCollector,
    Event,
    HTTPFace,
    LedgerCollector,
    Log,
    ProcessesCollector,
    Registry,
    quiet_libraries,
)

CHECK_EVERY_S = 0.1
#: Pause before a role that ended is started again; doubled while it keeps ending.
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0
#: A role that lived so long has recovered.
RECOVERED_AFTER_S = 30.0
#: A config whose models are not loaded and tested by then is refused; the device may be wedged.
PROOF_AT_MOST_S = 600.0


@dataclass
class _Child:
    """One role's process."""

    role: RoleName
    device: str
    socket: NotifySocket
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    is_ready: bool = False
    alive_at: float = 0.0

    @property
    def name(self) -> str:
        """The role, and the device where there are several workers."""
        return f"{self.role}:{self.device}" if self.device else str(self.role)


@dataclass
class Supervisor:
    """All roles of one host.

    Parameters
    ----------
    path : Path
        The service's config file.
    log : Log
    proof_at_most_s : float
        How long a new config may take to be proven.
    """

    path: Path
    log: Log
    proof_at_most_s: float = PROOF_AT_MOST_S
    _children: list[_Child] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _reload: threading.Event = field(default_factory=threading.Event)
    _is_proving: threading.Lock = field(default_factory=threading.Lock)
    _revision: str = ""
    _stores: Stores | None = None

    def run(self) -> int:
        """Run until told to stop; gives the exit status."""
        return ended_as_event(self.log, self._serve)

    def _serve(self) -> int:
        quiet_libraries()
        config, lint = load(self.path)
        self._revision = config.digest
        self.log.info(Event.CONFIG_LOADED, config=config.digest[:12], count=len(lint))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._asked_to_stop())
        signal.signal(signal.SIGHUP, lambda *_: self._reload.set())
        folder = Path(tempfile.mkdtemp(prefix="dicom-xai-"))
        context = open_context(config, "supervisor", Registry(), self.log)
        self._stores = Stores(context)
        counted = ProcessesCollector(folder, context.metrics.registry)
        face = self._face(config, context, counted)
        try:
            self._children = _children(config, folder)
            for child in self._children:
                context.metrics.role_restarts.labels(child.role)
            face.start()
            context.audit.start()
            context.audit.record(application_started(context.audit.process, person()))
            self._watch_forever(config, context, folder, counted)
        finally:
            Notifier().stopping()
            self._stop_all()
            face.stop()
            context.audit.record(application_stopped(context.audit.process))
            context.audit.stop()
            context.ledger.close()
            shutil.rmtree(folder, ignore_errors=True)
        return 0

    def _asked_to_stop(self) -> None:
        """Stop; asked twice, stop whatever hangs, and now."""
        if self._stopping.is_set():
            for child in self._children:
                if child.process is not None:
                    child.process.kill()
            os._exit(1)
        self._stopping.set()

    def is_alive(self) -> bool:
        """Every ready role ticks."""
        now = time.monotonic()
        return all(
            now - child.alive_at < STUCK_AFTER_S for child in self._children if child.is_ready
        )

    def why_not_ready(self) -> list[str]:
        """The roles that are not ready, and what keeps spool or ledger from taking anything in."""
        stores = [] if self._stores is None else self._stores.problems()
        return [*self._unready_roles(), *stores]

    def _unready_roles(self) -> list[str]:
        return [f"{child.name} is not ready" for child in self._children if not child.is_ready]

    def _watch_forever(
        self, config: Config, context: Context, folder: Path, counted: ProcessesCollector
    ) -> None:
        notifier = Notifier()
        was_ready = False
        while not self._stopping.is_set():
            for child in self._children:
                self._look_after(child, context, folder, counted)
            if not was_ready and not self._unready_roles():
                was_ready = True
                notifier.ready()
                self.log.info(Event.ROLE_READY, role="all", port=config.service.telemetry.port)
            if self.is_alive():
                notifier.alive()
            if self._reload.is_set() and not self._is_proving.locked():
                self._reload.clear()
                threading.Thread(
                    target=self._prove_and_reload, args=(context,), name="reload", daemon=True
                ).start()
            self._stopping.wait(CHECK_EVERY_S)

    def _look_after(
        self, child: _Child, context: Context, folder: Path, counted: ProcessesCollector
    ) -> None:
        """Start, restart or end one role as its state asks."""
        now = time.monotonic()
        lines = child.socket.take()
        if lines:
            child.alive_at = now
            child.is_ready = child.is_ready or "READY=1" in lines
        if child.process is None:
            if now >= child.start_at:
                self._start(child, folder)
            return
        status = child.process.poll()
        if status is None and child.is_ready and now - child.alive_at > STUCK_AFTER_S:
            child.process.kill()
            status = child.process.wait()
        if status is None:
            return
        counted.end(child.process.pid)
        is_long = now - child.started_at > RECOVERED_AFTER_S
        child.pause_s = FIRST_PAUSE_S if is_long else min(child.pause_s * 2, LONGEST_PAUSE_S)
        child.process, child.is_ready, child.start_at = None, False, now + child.pause_s
        context.metrics.role_restarts.labels(child.role).inc()
        self.log.error(
            Event.ROLE_CRASHED, role=child.name, status=status, delay_s=round(child.pause_s, 2)
        )
        role = Participant(f"dicom-xai {child.name}", address=context.audit.process.address)
        context.audit.record(application_stopped(role, f"ended with status {status}"))

    def _start(self, child: _Child, folder: Path) -> None:
        command = [sys.executable, "-m", "dicom_xai.cli", "run", "--config", str(self.path)]
        command += ["--role", child.role]
        if child.device:
            command += ["--device", child.device]
        environment = {
            **os.environ,
            SOCKET_VARIABLE: str(child.socket.path),
            MULTIPROCESS_VARIABLE: str(folder),
        }
        # a role that has no handler yet would die of a reload; the mask is inherited
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            child.process = subprocess.Popen(command, env=environment, process_group=0)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        child.started_at = child.alive_at = time.monotonic()

    def _prove_and_reload(self, context: Context) -> None:
        """Prove the new config whole, models too, in a process of its own; then tell the roles.

        Where anything is wrong no role hears of it, and all go on with the old one.
        """
        with self._is_proving:
            try:
                status, words = self._prove()
                config, _ = load(self.path)
                check_reload(context.config, config)
            except DicomXaiError as error:
                self._refuse(context, str(error))
                return
            if status not in (0, 1):
                self._refuse(context, words)
                return
            context.metrics.config_reloads.labels("accepted").inc()
            note_config(context, self.path, self._revision, config.digest)
            self._revision = config.digest
            context.spool.keep_free(config.service.spool.min_free_bytes)
            self.log.info(Event.CONFIG_LOADED, config=config.digest[:12])
            for child in self._children:
                if child.process is not None:
                    child.process.send_signal(signal.SIGHUP)

    def _prove(self) -> tuple[int, str]:
        """What `dicom-xai check` says: exit status and words.

        Raises
        ------
        ConfigError
            It did not end in time.
        """
        command = [sys.executable, "-m", "dicom_xai.cli", "check", "--config", str(self.path)]
        proof = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            words, _ = proof.communicate(timeout=self.proof_at_most_s)
        except subprocess.TimeoutExpired as error:
            proof.kill()
            with suppress(subprocess.TimeoutExpired):  # what hangs in a driver may stay
                proof.communicate(timeout=1.0)
            raise ConfigError(
                f"{self.path}: `dicom-xai check` did not end in {self.proof_at_most_s:g} s; "
                "run it by hand, and look whether the device answers"
            ) from error
        return proof.returncode, words.strip()

    def _refuse(self, context: Context, reason: str) -> None:
        context.metrics.config_reloads.labels("refused").inc()
        self.log.error(Event.CONFIG_REFUSED, reason=reason)
        note_config(context, self.path, self._revision, "", reason)

    def _stop_all(self) -> None:
        """SIGTERM to all; SIGKILL to those that do not end within the grace time."""
        running = [child.process for child in self._children if child.process is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE_S + 2
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in self._children:
            child.socket.close()

    def _face(self, config: Config, context: Context, counted: ProcessesCollector) -> HTTPFace:
        registry = Registry()
        registry.register(counted)
        registry.register(LedgerCollector(lambda: ledger_state(context.ledger, context.spool)))
        registry.register(BuildCollector(__version__, lambda: self._revision))
        telemetry = config.service.telemetry
        return HTTPFace(telemetry.host, telemetry.port, registry, self)


def _children(config: Config, folder: Path) -> list[_Child]:
    """One receiver, one worker for each device, one sender."""
    devices = config.service.devices
    plan = [(RoleName.RECEIVER, "")]
    plan += [(RoleName.WORKER, device) for device in devices]
    plan += [(RoleName.SENDER, "")]
    return [
        _Child(role, device, NotifySocket(folder / f"{index}.sock"))
        for index, (role, device) in enumerate(plan)
    ]

"""What an admin would look at one by one: config, disk, ledger, ports, device, destinations."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dicom_xai.config import Config, ProblemsError, load
from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.errors import ConfigError, DicomXaiError
from dicom_xai.ledger import Ledger
from dicom_xai.service.check import route_problems

GOOD, LOOK, BAD = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: 0 well, 1 worth a look, 2 the service cannot run."""

    severity: int
    what: str
    found: str


def examine(path: Path) -> list[Finding]:
    """Look at everything; nothing is changed but an empty ledger made where there was none."""
    try:
        config, lint = load(path)
    except ProblemsError as error:
        return [Finding(BAD, "config", str(problem)) for problem in error.problems]
    findings = [Finding(LOOK, "config", str(problem)) for problem in lint]
    findings += [Finding(BAD, "routes", str(problem)) for problem in route_problems(config)]
    routes = len(config.routes.routes)
    summary = f"{routes} routes, {len(config.cards)} models, revision {config.digest[:12]}"
    return [
        Finding(GOOD, "config", summary),
        *findings,
        *_disk(config),
        *_ledger(config),
        *_listeners(config),
        *_devices(config),
        *_destinations(config),
    ]


def _disk(config: Config) -> Iterator[Finding]:
    spool = config.service.spool
    folder = spool.directory
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    severity = GOOD if free > 2 * spool.min_free_bytes else LOOK
    if free < spool.min_free_bytes:
        severity = BAD
    words = f"{free / 1e9:.1f} GB free, C-STORE is refused below {spool.min_free_bytes / 1e9:.1f}"
    yield Finding(severity, "spool", f"{spool.directory}: {words}")


def _ledger(config: Config) -> Iterator[Finding]:
    try:
        ledger = Ledger(config.service.ledger.url)
    except DicomXaiError as error:
        yield Finding(BAD, "ledger", str(error))
        return
    try:
        started = time.perf_counter()
        ledger.upkeep.tick()
        commit_ms = (time.perf_counter() - started) * 1e3
        depths = ledger.upkeep.depths()
    finally:
        ledger.close()
    yield Finding(GOOD if commit_ms < 50 else LOOK, "ledger", f"a commit takes {commit_ms:.1f} ms")
    waiting = ", ".join(f"{count} {queue}" for queue, count in depths.rows.items() if count)
    stuck = depths.rows["failed"] + depths.rows["held"] + sum(depths.dead.values())
    yield Finding(LOOK if stuck else GOOD, "queues", waiting or "empty")
    if depths.quarantined:
        words = (
            f"{depths.quarantined} instances came again with other content (`ledger quarantine`)"
        )
        yield Finding(LOOK, "quarantine", words)
    for destination, count in depths.dead.items():
        words = f"{count} objects were given up (`ledger deliveries --state dead`)"
        yield Finding(LOOK, f"dead letters for {destination}", words)


def _listeners(config: Config) -> Iterator[Finding]:
    for listener in config.service.receive.listeners:
        where = f"{listener.ae_title} on {listener.host}:{listener.port}"
        with socket.socket() as probe:
            probe.settimeout(2)
            is_open = probe.connect_ex((listener.host, listener.port)) == 0
        found = "answers" if is_open else "nobody listens: the service is not running"
        yield Finding(GOOD if is_open else LOOK, where, found)


def _devices(config: Config) -> Iterator[Finding]:
    # here and not above: a doctor of a broken installation must still run
    from dicom_xai.infer.session import resolve_device

    for asked in config.service.devices:
        try:
            device = resolve_device(asked)
        except ConfigError as error:
            yield Finding(BAD, f"device {asked}", str(error))
        else:
            yield Finding(GOOD, f"device {asked}", f"is {device.name}")


def _destinations(config: Config) -> Iterator[Finding]:
    for name, destination in config.service.destinations.items():
        where = f"{destination.ae_title}@{destination.host}:{destination.port}"
        scu = StorageSCU(name, destination)
        try:
            timing = scu.echo()
        except DicomXaiError as error:
            yield Finding(LOOK, f"destination {name}", f"{where}: {error}")
        else:
            how = "by TLS " if destination.tls is not None else ""
            times = (
                f"associated in {timing.associate_s * 1e3:.0f} ms, "
                f"C-ECHO in {timing.echo_s * 1e3:.0f} ms"
            )
            yield Finding(GOOD, f"destination {name}", f"{where}: {how}{times}")
        finally:
            scu.close()

"""What is read or summed at scrape time, not observed as it happens.

Roles under one supervisor write through prometheus_client's multi-process files (its environment
variable is set before they start); the supervisor serves the sum. Of a process that ended its
gauges go and what it counted stays, for a counter must not go backwards. Queue depths, the oldest
waiting unit and the like are the ledger's to tell.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from dicom_xai.errors import LedgerBusyError


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What a scrape wants to know of ledger and spool."""

    depths: Mapping[str, int]  #: queue name: rows
    outbox_depths: Mapping[str, int]  #: destination: undelivered objects
    oldest_waiting_s: Mapping[str, float]  #: queue name: age of its oldest row
    dead_letters: Mapping[str, int]  #: destination: objects given up
    uncommitted: Mapping[str, int]  #: destination: objects sent and not committed to yet
    quarantined: int
    free_bytes: int


class LedgerCollector(Collector):
    """Gauges read from ledger and spool at scrape time."""

    def __init__(self, read: Callable[[], LedgerState]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Yield the gauges' families; when the ledger does not answer, that alone."""
        up = "Whether the ledger answers."
        try:
            state = self._read()
        except LedgerBusyError:
            yield GaugeMetricFamily("dicom_xai_ledger_up", up, value=0)
            return
        yield GaugeMetricFamily("dicom_xai_ledger_up", up, value=1)
        yield _family(
            "dicom_xai_queue_depth_rows", "Rows waiting, by queue.", "queue", state.depths
        )
        yield _family(
            "dicom_xai_outbox_depth_objects",
            "Objects not yet delivered.",
            "destination",
            state.outbox_depths,
        )
        yield _family(
            "dicom_xai_oldest_waiting_seconds",
            "Age of the oldest row, by queue.",
            "queue",
            state.oldest_waiting_s,
        )
        yield _family(
            "dicom_xai_dead_letters_objects",
            "Objects given up.",
            "destination",
            state.dead_letters,
        )
        yield _family(
            "dicom_xai_uncommitted_objects",
            "Objects sent that wait for storage commitment.",
            "destination",
            state.uncommitted,
        )
        yield GaugeMetricFamily(
            "dicom_xai_quarantined_instances",
            "Instances kept apart: same UID, other content.",
            value=state.quarantined,
        )
        yield GaugeMetricFamily(
            "dicom_xai_spool_free_bytes", "Free bytes on the spool's disk.", value=state.free_bytes
        )


def _family(
    name: str, documentation: str, label: str, values: Mapping[str, float]
) -> GaugeMetricFamily:
    """One gauge with a series for each value of its label."""
    family = GaugeMetricFamily(name, documentation, labels=[label])
    for word, value in values.items():
        family.add_metric([word], value)
    return family


class BuildCollector(Collector):
    """Which version and which config are live."""

    def __init__(self, version: str, config_digest: Callable[[], str]) -> None:
        self._version = version
        self._config_digest = config_digest

    def collect(self) -> Iterable[Metric]:
        """Yield one info family."""
        info = {"version": self._version, "config": self._config_digest()[:12]}
        yield InfoMetricFamily("dicom_xai_build", "What runs.", value=info)


class ProcessesCollector(Collector):
    """The sum of what this process and its children counted, each series once.

    Parameters
    ----------
    folder : Path
        Into which the children write.
    own : CollectorRegistry
        Of this process.
    """

    def __init__(self, folder: Path, own: CollectorRegistry) -> None:
        self._own = own
        self._folder = folder
        self._lock = Lock()  # of the folder's files, and of what is kept of those that are gone
        self._ended: list[Metric] = []
        # the library has no types; without a registry it shows nothing by itself
        children = MultiProcessCollector(None, str(folder))  # type: ignore[no-untyped-call]
        self._collect_children: Callable[[], Iterable[Metric]] = children.collect

    def collect(self) -> Iterable[Metric]:
        """Yield each family once."""
        with self._lock:
            children = [*self._collect_children(), *self._ended]
        return _summed([*self._own.collect(), *children])

    def end(self, pid: int) -> None:
        """Keep what an ended child counted, and drop its files.

        Its gauges told of what it had and was. Without this each child that ever ran would show
        them for ever, and leave its files.
        """
        with self._lock:
            for file in self._folder.glob(f"*_{pid}.db"):
                if not file.name.startswith("gauge_"):
                    self._ended = list(_summed([*self._ended, *_counted_in(file)]))
                file.unlink()


def _counted_in(file: Path) -> Iterable[Metric]:
    try:
        merged: Iterable[Metric] = MultiProcessCollector.merge([str(file)])  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError, ValueError, struct.error):
        return []  # killed as it made the file, or the disk lost it: nothing to be had, or to fear
    return merged


def _summed(families: Iterable[Metric]) -> Iterable[Metric]:
    """Each family once, with each of its series once."""
    found: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in families:
        found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        into = sums.setdefault(family.name, {})
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            into[key] = into.get(key, 0.0) + sample.value
    for name, family in found.items():
        for (sample_name, labels), value in sums[name].items():
            family.add_sample(sample_name, dict(labels), value)
        yield family

"""What is read or summed at scrape time, not observed as it happens.

Roles under one supervisor write through prometheus_client's multi-process files (its environment
variable is set before they start); the supervisor serves the sum. Queue depths, the oldest waiting
unit and the like are the ledger's to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

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


class _ProcessesCollector(Collector):
    """The sum of what this process and its children counted, each series once."""

    def __init__(self, folder: str, own: CollectorRegistry) -> None:
        self._own = own
        # the library has no types; without a registry it shows nothing by itself
        children = MultiProcessCollector(None, folder)  # type: ignore[no-untyped-call]
        self._collect_children: Callable[[], Iterable[Metric]] = children.collect

    def collect(self) -> Iterable[Metric]:
        """Yield each family once."""
        families: dict[str, Metric] = {}
        sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for family in [*self._own.collect(), *self._collect_children()]:
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            into = sums.setdefault(family.name, {})
            for sample in family.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                into[key] = into.get(key, 0.0) + sample.value
        for name, family in families.items():
            for (sample_name, labels), value in sums[name].items():
                family.add_sample(sample_name, dict(labels), value)
            yield family


def join_processes(
    registry: CollectorRegistry, folder: str, own: CollectorRegistry | None = None
) -> None:
    """Let `registry` show the sum of all processes that write into `folder`, and of `own`."""
    registry.register(_ProcessesCollector(folder, own or CollectorRegistry()))

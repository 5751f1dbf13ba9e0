"""Every metric that a process observes.

`dicom_xai_<noun>_<unit>[_total]`; labels come from closed sets only (config names, stages, enums),
so that no sender can grow a series. What the ledger knows better than any process is in `scraped`.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dicom_xai.stages import Stage

#: Seconds; a boundary exactly at the 2 s budget makes the objective a plain ratio.
STAGE_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 5.0, 10.0, 30.0),
)
TRIAGE_BUCKETS = (
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
    *(2.5, 3.0, 5.0, 10.0, 30.0, 120.0, 600.0),
)
#: Where metrics are registered; the library's own class, for those who may not import it.
Registry = CollectorRegistry
MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """All metrics that a process observes; one object, handed to whoever observes.

    Parameters
    ----------
    registry : CollectorRegistry
        Where they are registered; tests give a fresh one.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.stage_seconds = Histogram(
            "dicom_xai_stage_seconds",
            "Time in one stage of the flow.",
            ["stage", "model"],
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self.triage_seconds = Histogram(
            "dicom_xai_triage_seconds",
            "Unit ready until the first destination has accepted all of its objects.",
            ["route", "priority"],
            buckets=TRIAGE_BUCKETS,
            registry=registry,
        )
        self.last_byte_seconds = Histogram(
            "dicom_xai_last_byte_to_triage_seconds",
            "Last instance of the unit stored until triaged: what a radiologist feels.",
            ["route", "priority"],
            buckets=TRIAGE_BUCKETS,
            registry=registry,
        )
        self.first_byte_seconds = Histogram(
            "dicom_xai_first_byte_to_triage_seconds",
            "First instance of the unit stored until triaged.",
            ["route", "priority"],
            buckets=TRIAGE_BUCKETS,
            registry=registry,
        )
        self.budget_exceeded = Counter(
            "dicom_xai_budget_exceeded_total",
            "Units whose deadline passed, counted when it passed, by the stage they were in.",
            ["route", "stage"],
            registry=registry,
        )
        self.degraded = Counter(
            "dicom_xai_degraded_total",
            "Units answered with less than the route's first choice, to hold the budget.",
            ["route", "how"],
            registry=registry,
        )
        self.decoder_deaths = Counter(
            "dicom_xai_decoder_deaths_total",
            "Decoding processes that died, or were killed for taking too long, over an object.",
            registry=registry,
        )
        self.model_file_changed = Gauge(
            "dicom_xai_model_file_changed",
            "1 when a model's file is not the one that was loaded.",
            ["model"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.prepared_bytes = Gauge(
            "dicom_xai_prepared_bytes",
            "Images decoded and not yet released by a job.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.associations = Gauge(
            "dicom_xai_open_associations",
            "Associations open now.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.back_pressure = Gauge(
            "dicom_xai_back_pressure_info",
            "1 while images are refused because this is scarce.",
            ["reason"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.instances_received = Counter(
            "dicom_xai_instances_received_total",
            "Instances answered with Success.",
            ["outcome"],
            registry=registry,
        )
        self.instances_refused = Counter(
            "dicom_xai_instances_refused_total",
            "Instances and associations not taken.",
            ["reason"],
            registry=registry,
        )
        self.units_forgotten = Counter(
            "dicom_xai_units_forgotten_total",
            "Failed or held units whose images were deleted after spool.keep_failed_days.",
            registry=registry,
        )
        self.received_bytes = Counter(
            "dicom_xai_received_bytes_total", "Bytes of instances stored.", registry=registry
        )
        self.studies = Counter(
            "dicom_xai_studies_total",
            "Units of work ended.",
            ["route", "outcome"],
            registry=registry,
        )
        self.results = Counter(
            "dicom_xai_results_total", "Objects made.", ["kind", "route"], registry=registry
        )
        self.results_skipped = Counter(
            "dicom_xai_results_skipped_total",
            "Objects planned and not made; the log says why.",
            ["kind", "route"],
            registry=registry,
        )
        self.deliveries = Counter(
            "dicom_xai_deliveries_total",
            "Answers of destinations to our objects.",
            ["destination", "outcome"],
            registry=registry,
        )
        self.commitments = Counter(
            "dicom_xai_commitments_total",
            "Our objects by what became of their storage commitment at a destination.",
            ["destination", "outcome"],
            registry=registry,
        )
        self.commitment_reports = Counter(
            "dicom_xai_commitment_reports_total",
            "Requests for storage commitment that we got, and our reports about them.",
            ["outcome"],
            registry=registry,
        )
        self.config_reloads = Counter(
            "dicom_xai_config_reloads_total", "Reloads asked for.", ["outcome"], registry=registry
        )
        self.role_restarts = Counter(
            "dicom_xai_role_restarts_total",
            "Roles that ended and were started again.",
            ["role"],
            registry=registry,
        )
        self.certificate_expiry = Gauge(
            "dicom_xai_tls_certificate_expiry_seconds",
            "Unix time until which our TLS certificate is valid; 0 where it is not valid now.",
            ["use"],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.tls_refused = Gauge(
            "dicom_xai_tls_refused_files",
            "1 while TLS files on disk cannot be used, and those read before serve on.",
            ["use"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.audit_messages = Counter(
            "dicom_xai_audit_messages_total",
            "Audit messages, by whether the trail's file holds them.",
            ["outcome"],
            registry=registry,
        )
        self.audit_backlog = Gauge(
            "dicom_xai_audit_backlog_messages",
            "Audit messages in the file that the collector has not got yet.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.audit_dropped = Counter(
            "dicom_xai_audit_dropped_total",
            "Audit messages that left the trail's folder before the collector had them.",
            registry=registry,
        )
        self.device = Gauge(
            "dicom_xai_device_info",
            "1 for the device and provider each model really runs on.",
            ["model", "device", "provider"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.model_cost_seconds = Gauge(
            "dicom_xai_model_cost_seconds",
            "Measured time of one image through a model, with explanation.",
            ["model"],
            registry=registry,
            multiprocess_mode="livemax",
        )

    def prepare(self, routes: Iterable[str]) -> None:
        """Make the series that alerts look at, at zero: a newborn series' first event is missed."""
        for route in routes:
            for stage in Stage:
                self.budget_exceeded.labels(route, stage)
        for outcome in ("accepted", "refused"):
            self.config_reloads.labels(outcome)
        for outcome in ("written", "lost"):
            self.audit_messages.labels(outcome)

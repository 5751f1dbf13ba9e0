"""Every metric, every log event, and the HTTP face that shows them.

Metrics: `dicom_xai_<noun>_<unit>[_total]`; labels come from closed sets only (config names, stages,
enums), so that no sender can grow a series. Roles under one supervisor write through
prometheus_client's multi-process files (its environment variable is set before they start); the
supervisor serves the sum. What the ledger knows better than any process (queue depths, the oldest
waiting unit) is read from it at scrape time.

Logs: one JSON object a line, an event from `Event` with fields from `FIELDS`. A field outside that
set is refused, so that a name, an identifier or a birth date has no way in.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from dicom_xai.errors import ConfigError, DicomXaiError, InvariantError, LedgerBusyError
from dicom_xai.stages import Stage

if TYPE_CHECKING:
    import uvicorn

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
            multiprocess_mode="liveall" if MULTIPROCESS_VARIABLE in os.environ else "all",
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
        depth = GaugeMetricFamily(
            "dicom_xai_queue_depth_rows", "Rows waiting, by queue.", labels=["queue"]
        )
        for queue, count in state.depths.items():
            depth.add_metric([queue], count)
        yield depth
        outbox = GaugeMetricFamily(
            "dicom_xai_outbox_depth_objects", "Objects not yet delivered.", labels=["destination"]
        )
        for destination, count in state.outbox_depths.items():
            outbox.add_metric([destination], count)
        yield outbox
        oldest = GaugeMetricFamily(
            "dicom_xai_oldest_waiting_seconds", "Age of the oldest row, by queue.", labels=["queue"]
        )
        for queue, age_s in state.oldest_waiting_s.items():
            oldest.add_metric([queue], age_s)
        yield oldest
        dead = GaugeMetricFamily(
            "dicom_xai_dead_letters_objects", "Objects given up.", labels=["destination"]
        )
        for destination, count in state.dead_letters.items():
            dead.add_metric([destination], count)
        yield dead
        uncommitted = GaugeMetricFamily(
            "dicom_xai_uncommitted_objects",
            "Objects sent that wait for storage commitment.",
            labels=["destination"],
        )
        for destination, count in state.uncommitted.items():
            uncommitted.add_metric([destination], count)
        yield uncommitted
        yield GaugeMetricFamily(
            "dicom_xai_quarantined_instances",
            "Instances kept apart: same UID, other content.",
            value=state.quarantined,
        )
        yield GaugeMetricFamily(
            "dicom_xai_spool_free_bytes", "Free bytes on the spool's disk.", value=state.free_bytes
        )


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


# ------------------------------------------------------------------ log events


class Event(StrEnum):
    """What a log line can say."""

    ROLE_STARTED = "role-started"
    ROLE_READY = "role-ready"
    ROLE_STOPPED = "role-stopped"
    ROLE_CRASHED = "role-crashed"
    CONFIG_LOADED = "config-loaded"
    CONFIG_REFUSED = "config-refused"
    TLS_RENEWED = "tls-renewed"
    TLS_REFUSED = "tls-refused"  #: the files on disk; those read before serve on
    AUDIT_LOST = "audit-lost"  #: the trail's file could not be written
    AUDIT_UNREACHABLE = "audit-unreachable"  #: the collector; the file goes on
    LISTENING = "listening"
    ASSOCIATION_REFUSED = "association-refused"
    BACK_PRESSURE = "back-pressure"
    INSTANCE_STORED = "instance-stored"
    INSTANCE_REFUSED = "instance-refused"
    INSTANCE_CONFLICT = "instance-conflict"
    UNIT_READY = "unit-ready"
    UNIT_HELD = "unit-held"
    JOB_STARTED = "job-started"
    JOB_DONE = "job-done"
    JOB_DEGRADED = "job-degraded"
    JOB_FAILED = "job-failed"
    JOB_RETRIED = "job-retried"
    LEASE_LOST = "lease-lost"
    WORKER_WEDGED = "worker-wedged"
    LEDGER_BUSY = "ledger-busy"
    DECODER_DIED = "decoder-died"
    BUDGET_EXCEEDED = "budget-exceeded"
    MODEL_LOADED = "model-loaded"
    MODEL_FILE_CHANGED = "model-file-changed"
    MODEL_REFUSED = "model-refused"
    RESULT_SKIPPED = "result-skipped"
    DELIVERED = "delivered"
    DELIVERY_RETRIED = "delivery-retried"
    DELIVERY_DEAD = "delivery-dead"
    COMMITTED = "committed"  #: a destination reported
    COMMITMENT_NOT_TAKEN = "commitment-not-taken"  #: our request
    COMMITMENT_LOST = "commitment-lost"  #: it does not hold what it took; sent again
    COMMITMENT_UNKNOWN = "commitment-unknown"  #: a report about no request of ours
    COMMITMENT_ASKED = "commitment-asked"  #: of us
    COMMITMENT_REPORTED = "commitment-reported"  #: by us
    COMMITMENT_REPORT_RETRIED = "commitment-report-retried"
    COMMITMENT_REPORT_DEAD = "commitment-report-dead"
    TRIAGED = "triaged"
    SWEPT = "swept"
    UNITS_FORGOTTEN = "units-forgotten"  #: failed or held, and older than spool.keep_failed_days
    RECOVERED = "recovered"
    MESSAGE = "message"  #: of a module below the roles; `file` names it


#: The only fields a log line may have. UIDs and config names; nothing a patient could be known by.
FIELDS = frozenset(
    """
    role pid port host listener ae_title destination route model device provider version config
    study_instance_uid series_instance_uid sop_instance_uid sop_class_uid transfer_syntax_uid
    unit job purpose generation stage trigger kind ordinal reason outcome status attempts delay_s
    elapsed_s budget_s latency_s stages count size_bytes explainer method layer file error backward
    nodes folder instances priority use
    """.split()
)


class Log:
    """Writes events as JSON lines.

    Parameters
    ----------
    stream : TextIO
        Where lines go; standard error in a role.
    bound : mapping
        Fields that every line has.
    """

    def __init__(self, stream: TextIO | None = None, **bound: object) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bound = bound
        _check_fields(bound)
        self._logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
            structlog.PrintLogger(self._stream),
            processors=[
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(sort_keys=False),
            ],
        ).bind(**bound)

    def info(self, event: Event, **fields: object) -> None:
        """Something that belongs to a good day."""
        self._write("info", event, fields)

    def warning(self, event: Event, **fields: object) -> None:
        """Odd, but recovered."""
        self._write("warning", event, fields)

    def error(self, event: Event, **fields: object) -> None:
        """A person must act."""
        self._write("error", event, fields)

    def exception(self, event: Event, error: BaseException, **fields: object) -> None:
        """As `error`, with where it was raised and, for errors of ours only, what it says.

        A library's message may quote a value of the data set, so it is left out.
        """
        self._write("error", event, {**fields, "error": describe(error)})

    def bind(self, **fields: object) -> Log:
        """A log whose every line has these fields too."""
        return Log(self._stream, **{**self._bound, **fields})

    def _write(self, level: str, event: Event, fields: Mapping[str, object]) -> None:
        _check_fields(fields)
        self._logger.msg(event, level=level, **fields)


def _check_fields(fields: Mapping[str, object]) -> None:
    unknown = set(fields) - FIELDS
    if unknown:
        raise InvariantError(f"log fields {sorted(unknown)} are not in telemetry.FIELDS")


def describe(error: BaseException) -> str:
    """An error and its causes: types, code lines, and the message where the error is ours."""
    lines = []
    link: BaseException | None = error
    while link is not None:
        message = f": {link}" if isinstance(link, DicomXaiError) else ""
        lines.append(f"{type(link).__name__}{message}")
        for frame in traceback.extract_tb(link.__traceback__)[-8:]:
            lines.append(f"  {Path(frame.filename).name}:{frame.lineno} {frame.name}")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n".join(lines)


def quiet_libraries() -> None:
    """Keep libraries' own log lines and warnings, which may quote data sets, off our output."""
    logging.captureWarnings(True)
    names = ("pynetdicom", "pydicom", "highdicom", "uvicorn", "uvicorn.error", "py.warnings")
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers = [logging.NullHandler()]
        logger.propagate = False


class _EventHandler(logging.Handler):
    """Writes what our modules say by `logging` as events."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """One line. An exception's own text is left out: whoever logs has described it."""
        write = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        write(Event.MESSAGE, reason=record.getMessage(), file=record.name)


def take_over_logging(log: Log) -> None:
    """Make events of the lines of modules that must not know `Log`, the receiver's guards say."""
    logger = logging.getLogger("dicom_xai")
    logger.handlers = [_EventHandler(log)]
    logger.propagate = False


# ------------------------------------------------------------------ the HTTP face


class Health(Protocol):
    """What the probes ask. A dead destination makes neither of them false."""

    def is_alive(self) -> bool:
        """Whether the main loops tick."""

    def why_not_ready(self) -> list[str]:
        """What is missing until work can be taken; empty when ready."""


class HTTPFace:
    """/metrics, /livez and /readyz on a thread of its own.

    Parameters
    ----------
    host : str
    port : int
        0 takes a free one; `port` tells which.
    registry : CollectorRegistry
    health : Health

    Raises
    ------
    ConfigError
        The address cannot be listened on.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, health: Health) -> None:
        self._server = _http_server(host, port, registry, health)
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="http", daemon=True
        )

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and close the port."""
        self._server.should_exit = True
        self._thread.join(timeout=5)
        self._socket.close()


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens already; the server's own would end the process on a taken port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"telemetry: {host}:{port} cannot be listened on ({os.strerror(error.errno or 0)}); "
            "change telemetry.host or telemetry.port"
        ) from error


def _http_server(
    host: str, port: int, registry: CollectorRegistry, health: Health
) -> uvicorn.Server:
    import uvicorn
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def livez(_: Request) -> Response:
        alive = health.is_alive()
        return PlainTextResponse("alive\n" if alive else "stuck\n", 200 if alive else 503)

    def readyz(_: Request) -> Response:
        missing = health.why_not_ready()
        return PlainTextResponse("\n".join(missing or ["ready"]) + "\n", 503 if missing else 200)

    app = Starlette(
        routes=[Route("/metrics", metrics), Route("/livez", livez), Route("/readyz", readyz)]
    )
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, lifespan="off"
    )
    return uvicorn.Server(config)

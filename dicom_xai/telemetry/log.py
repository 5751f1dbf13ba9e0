"""Every log event, and the only fields that one may have.

One JSON object a line, an event from `Event` with fields from `FIELDS`. A field outside that set is
refused, so that a name, an identifier or a birth date has no way in.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TextIO

import structlog

from dicom_xai.errors import DicomXaiError, InvariantError


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
    BACK_PRESSURE = "back-pressure"
    INSTANCE_STORED = "instance-stored"
    INSTANCE_REFUSED = "instance-refused"
    UNIT_READY = "unit-ready"
    UNIT_HELD = "unit-held"
    JOB_STARTED = "job-started"
    JOB_DONE = "job-done"
    JOB_DEGRADED = "job-degraded"
    PATIENT_REFORMATTED = "patient-reformatted"  #: images of a unit write its patient differently
    JOB_FAILED = "job-failed"
    JOB_RETRIED = "job-retried"
    LEASE_LOST = "lease-lost"
    RUN_NOT_SHARED = "run-not-shared"  #: it failed, and each of its jobs runs alone
    WORKER_WEDGED = "worker-wedged"
    LEDGER_BUSY = "ledger-busy"
    DECODER_DIED = "decoder-died"
    BUDGET_EXCEEDED = "budget-exceeded"
    MODEL_LOADED = "model-loaded"
    METHODS_TRIED = "methods-tried"  #: at load: which do not apply to a model
    MODEL_FILE_CHANGED = "model-file-changed"
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
    role pid port host listener ae_title destination route model device version config
    study_instance_uid series_instance_uid sop_instance_uid sop_class_uid transfer_syntax_uid
    unit job purpose generation stage trigger kind ordinal reason outcome status attempts delay_s
    elapsed_s budget_s latency_s stages count size_bytes explainer method layer file error backward
    instances priority use difference gradient_error does_not_apply
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
            structlog.WriteLogger(self._stream),
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

"""What the service says about itself: metrics, log events, and the HTTP face that shows them."""

from __future__ import annotations

from dicom_xai.telemetry.face import HTTPFace
from dicom_xai.telemetry.gathered import Gathered
from dicom_xai.telemetry.log import (
    FIELDS,
    Event,
    Log,
    describe,
    quiet_libraries,
    take_over_logging,
)
from dicom_xai.telemetry.metrics import (
    MULTIPROCESS_VARIABLE,
    STAGE_BUCKETS,
    TRIAGE_BUCKETS,
    Metrics,
    Registry,
)
from dicom_xai.telemetry.scraped import (
    BuildCollector,
    LedgerCollector,
    LedgerState,
    ProcessesCollector,
)

__all__ = [
    "FIELDS",
    "MULTIPROCESS_VARIABLE",
    "STAGE_BUCKETS",
    "TRIAGE_BUCKETS",
    "BuildCollector",
    "Event",
    "Gathered",
    "HTTPFace",
    "LedgerCollector",
    "LedgerState",
    "Log",
    "Metrics",
    "ProcessesCollector",
    "Registry",
    "describe",
    "quiet_libraries",
    "take_over_logging",
]

"""What is observed: its names, its labels, its buckets."""

from __future__ import annotations

import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dicom_xai.stages import Stage
from dicom_xai.telemetry import STAGE_BUCKETS, TRIAGE_BUCKETS, Metrics


@pytest.mark.parametrize("buckets", [STAGE_BUCKETS, TRIAGE_BUCKETS])
def test_buckets_rise_and_hold_the_budget_itself(buckets: tuple[float, ...]) -> None:
    assert 2.0 in buckets
    assert list(buckets) == sorted(set(buckets))
    assert len([bound for bound in buckets if 0.5 <= bound <= 5]) >= 5


def test_the_budgets_boundary_stands_in_the_exposition_as_2_0() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.triage_seconds.labels("chest", "routine").observe(2.0)
    text = generate_latest(registry).decode()
    line = 'dicom_xai_triage_seconds_bucket{le="2.0",priority="routine",route="chest"} 1.0'
    assert line in text


def test_every_metric_is_ours_and_named_after_noun_and_unit(registry: CollectorRegistry) -> None:
    names = set()
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        names.add(family.name)
        assert family.documentation.endswith(".") or ":" in family.documentation
    units = re.compile(r"dicom_xai_[a-z_]+_(seconds|bytes|count|info|total)|dicom_xai_[a-z_]+")
    assert all(units.fullmatch(name) for name in names)
    promised = {
        "dicom_xai_stage_seconds",
        "dicom_xai_triage_seconds",
        "dicom_xai_budget_exceeded",
        "dicom_xai_instances_received",
        "dicom_xai_instances_refused",
        "dicom_xai_studies",
        "dicom_xai_results",
        "dicom_xai_deliveries",
        "dicom_xai_queue_depth_rows",
        "dicom_xai_oldest_waiting_seconds",
        "dicom_xai_device_info",
    }
    assert promised <= names


@pytest.mark.promise("K5")
def test_no_label_can_hold_what_a_sender_says(registry: CollectorRegistry) -> None:
    metrics = vars(Metrics(CollectorRegistry())).values()
    labels = {label for metric in metrics for label in getattr(metric, "_labelnames", ())}
    closed = {"stage", "model", "route", "priority", "how", "outcome", "reason", "kind", "use"}
    assert labels <= closed | {"destination", "role", "device", "provider", "explainer"}


def test_stages_in_metrics_are_the_stages_of_the_flow_in_their_order() -> None:
    assert [str(stage) for stage in Stage] == (
        "receive route queue decode infer explain encode outbox deliver".split()
    )

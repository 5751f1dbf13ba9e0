"""What we owe to who asked us for storage commitment, and what a report says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dicom_xai.ledger import Disposition, Ledger, Recorded
from dicom_xai.study import Reference
from tests.make.ledger import CT, LEASE_S, OVER, a_request, an_instance, change, receive, rows

pytestmark = pytest.mark.promise("P4")


def test_a_report_says_what_is_here_with_its_bytes(ledger: Ledger, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        receive(ledger, an_instance(number), disposition=Disposition.UNROUTED)
    change(tmp_path, "UPDATE instance SET spool_key = NULL WHERE sop_instance_uid = '1.2.1.1.2'")
    change(tmp_path, "UPDATE instance SET sop_class_uid = '1.2' WHERE id = 3")
    a_request(ledger, *(f"1.2.1.1.{number}" for number in (1, 2, 3, 4)))
    owed = ledger.reports.claim(LEASE_S, ae_title="MODALITY")
    assert owed is not None
    assert (owed.called_ae_title, owed.report.transaction_uid) == ("DICOM_XAI", "2.25.1")
    assert owed.report.committed == (Reference(CT, "1.2.1.1.1"),)
    assert [(each.reference.sop_instance_uid[-1], each.reason) for each in owed.report.failed] == [
        ("2", 0x0112),
        ("3", 0x0119),
        ("4", 0x0112),
    ]


def test_what_was_deleted_and_came_again_is_here_and_promised(
    ledger: Ledger, tmp_path: Path
) -> None:
    first = an_instance(1)
    receive(ledger, first, disposition=Disposition.UNROUTED)
    old = "'2020-01-01T00:00:00.000000+00:00'"
    change(tmp_path, f"UPDATE instance SET received_utc = {old}")
    assert ledger.upkeep.expire(1.0, 2.0).spool_keys == [first.spool_key]
    again = replace(first, spool_key="f" * 32)
    assert receive(ledger, again, disposition=Disposition.UNROUTED) is Recorded.RESTORED
    a_request(ledger)
    owed = ledger.reports.claim(LEASE_S, ae_title="MODALITY")
    assert owed is not None
    assert owed.report.event_type == 1
    assert ledger.upkeep.is_known_key(again.spool_key)
    assert ledger.upkeep.expire(1.0, 2.0).spool_keys == []


def test_content_that_was_quarantined_is_not_promised(ledger: Ledger) -> None:
    receive(ledger, an_instance(1), disposition=Disposition.QUARANTINED)
    a_request(ledger)
    owed = ledger.reports.claim(LEASE_S, ae_title="MODALITY")
    assert owed is not None
    assert owed.report.event_type == 2


def test_a_report_is_the_receivers_first_and_then_the_senders(ledger: Ledger) -> None:
    number = a_request(ledger, hold_s=60.0)
    assert ledger.reports.claim(LEASE_S, ae_title="MODALITY") is None
    here = ledger.reports.claim(LEASE_S, report_id=number)
    assert here is not None
    assert ledger.reports.claim(LEASE_S, report_id=number) is None
    ledger.reports.retry_later(here, 0.0, "the association ended")
    there = ledger.reports.claim(LEASE_S, ae_title="MODALITY")
    assert there is not None
    assert not ledger.reports.reported(here)  # a stale claim
    assert ledger.reports.reported(there)
    assert ledger.reports.next_at("MODALITY") is None


def test_a_report_of_an_association_that_ended_is_due_at_once(ledger: Ledger) -> None:
    number = a_request(ledger, hold_s=60.0)
    ledger.reports.hand_over([number])
    assert ledger.reports.claim(LEASE_S, ae_title="MODALITY") is not None


def test_a_report_whose_sender_died_is_sent_by_another(ledger: Ledger, tmp_path: Path) -> None:
    a_request(ledger)
    assert ledger.reports.claim(OVER, ae_title="MODALITY") is not None
    again = ledger.reports.claim(LEASE_S, ae_title="MODALITY")
    assert again is not None
    assert again.attempts == 2
    change(tmp_path, "UPDATE commitment_report SET owner = '1.1.nobody'")
    assert ledger.upkeep.release_dead() == 1
    assert ledger.reports.claim(LEASE_S, ae_title="MODALITY") is not None


def test_the_same_request_again_is_reported_again(ledger: Ledger, tmp_path: Path) -> None:
    a_request(ledger)
    owed = ledger.reports.claim(LEASE_S, ae_title="MODALITY")
    assert owed is not None
    ledger.reports.reported(owed)
    a_request(ledger)
    assert ledger.reports.claim(LEASE_S, ae_title="MODALITY") is not None
    assert rows(tmp_path, "SELECT count(*) FROM commitment_report") == [(1,)]


def test_a_report_that_nobody_can_be_told_is_given_up(ledger: Ledger, tmp_path: Path) -> None:
    a_request(ledger)
    assert ledger.reports.give_up_but_to(["MODALITY"], "no address") == []
    assert ledger.reports.give_up_but_to([], "no address") == ["MODALITY"]
    assert rows(tmp_path, "SELECT state, reason FROM commitment_report") == [("dead", "no address")]


def test_a_request_of_somebody_is_forgotten_after_its_days_once_it_is_answered_or_given_up(
    ledger: Ledger, tmp_path: Path
) -> None:
    def aged() -> list[object]:
        old = "'2020-01-01T00:00:00.000000+00:00'"
        change(tmp_path, f"UPDATE commitment_report SET requested_utc = {old}")
        ledger.upkeep.expire(1.0, 2.0)
        return [state for (state,) in rows(tmp_path, "SELECT state FROM commitment_report")]

    a_request(ledger)
    assert aged() == ["owed"]
    owed = ledger.reports.claim(LEASE_S, ae_title="MODALITY")
    assert owed is not None
    assert aged() == ["reporting"]
    ledger.reports.reported(owed)
    assert aged() == []
    a_request(ledger)
    again = ledger.reports.claim(LEASE_S, ae_title="MODALITY")
    assert again is not None
    ledger.reports.give_up(again, "no such host")
    ledger.upkeep.expire(1.0, 2.0)
    assert rows(tmp_path, "SELECT state FROM commitment_report") == [("dead",)]  # of today
    assert aged() == []

"""Objects on their way: order, tokens, the moment of triage, dead letters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dicom_xai.ledger import Ledger
from dicom_xai.study import ObjectKind, Priority
from tests.make.ledger import (
    LEASE_S,
    OVER,
    a_job,
    a_result,
    claimed,
    outgoing,
    rows,
)


def test_stat_goes_first_then_the_order_of_the_results(ledger: Ledger) -> None:
    routine = a_job(ledger, 1)
    ledger.jobs.finish(routine, [a_result(routine, 0), a_result(routine, 1)])
    stat = a_job(ledger, 2, priority=Priority.STAT)
    ledger.jobs.finish(stat, [a_result(stat, 0)])
    sent = [outgoing(ledger).sop_instance_uid for _ in range(3)]
    made = [a_result(stat, 0), a_result(routine, 0), a_result(routine, 1)]
    assert sent == [item.sop_instance_uid for item in made]
    assert ledger.deliveries.claim("pacs", LEASE_S) is None


def test_each_destination_has_its_own_queue(ledger: Ledger) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job, to=["pacs", "archive"])])
    assert ledger.deliveries.claim("elsewhere", LEASE_S) is None
    assert outgoing(ledger, "archive").delivery_id != outgoing(ledger, "pacs").delivery_id


def test_what_is_claimed_tells_the_sender_all_it_needs(ledger: Ledger) -> None:
    job = a_job(ledger)
    made = a_result(job)
    ledger.jobs.finish(job, [made])
    item = outgoing(ledger)
    assert (item.spool_key, item.sha256, item.sop_class_uid) == (
        made.spool_key,
        made.sha256,
        made.sop_class_uid,
    )
    assert item.source == job.instances[0]
    assert (item.route, item.model, item.kind) == (job.route, job.model, "sc")
    assert item.outbox_s >= 0


def test_a_stale_token_changes_nothing(ledger: Ledger, tmp_path: Path) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    stale = outgoing(ledger, lease_s=OVER)
    fresh = outgoing(ledger)
    assert (stale.token, fresh.token, fresh.attempts) == (1, 2, 2)
    before = rows(tmp_path, "SELECT * FROM delivery")
    assert ledger.deliveries.sent(stale, 0) is None
    assert not ledger.deliveries.give_up(stale, "refused")
    assert not ledger.deliveries.retry_later(stale, 0, "down")
    assert rows(tmp_path, "SELECT * FROM delivery") == before
    assert ledger.deliveries.sent(fresh, 0) is not None


@pytest.mark.parametrize(("size_bytes", "longer_s"), [(400_000, 0), (400_000_000, 800)])
def test_a_large_object_is_its_senders_for_as_long_as_its_bytes_may_take(
    ledger: Ledger, tmp_path: Path, size_bytes: int, longer_s: float
) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [replace(a_result(job), size_bytes=size_bytes)])
    claimed_at = ledger.now()
    assert ledger.deliveries.claim("pacs", LEASE_S, 2.0) is not None
    [(until,)] = rows(tmp_path, "SELECT lease_until FROM delivery")
    assert float(str(until)) - claimed_at == pytest.approx(LEASE_S + longer_s, abs=5.0)
    assert ledger.deliveries.claim("pacs", LEASE_S) is None


def test_a_unit_is_triaged_with_its_last_object_and_only_once(ledger: Ledger) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job), a_result(job, kind=ObjectKind.SEG)])
    assert ledger.deliveries.sent(outgoing(ledger), 0) is None
    triaged = ledger.deliveries.sent(outgoing(ledger), 0)
    assert triaged is not None
    assert (triaged.job_id, triaged.purpose, triaged.priority) == (job.job_id, "triage", "routine")
    assert triaged.is_within_budget
    assert 0 < triaged.latency_s <= triaged.last_byte_s + 1e-6
    assert triaged.last_byte_s <= triaged.first_byte_s


def test_the_first_destination_that_has_all_objects_ends_triage(ledger: Ledger) -> None:
    job = a_job(ledger)
    both = ["archive", "pacs"]
    ledger.jobs.finish(job, [a_result(job, to=both), a_result(job, kind=ObjectKind.SEG, to=both)])
    assert ledger.deliveries.sent(outgoing(ledger, "archive"), 0) is None
    assert ledger.deliveries.sent(outgoing(ledger, "pacs"), 0) is None
    assert ledger.deliveries.sent(outgoing(ledger, "pacs"), 0) is not None
    assert ledger.deliveries.sent(outgoing(ledger, "archive"), 0) is None


def test_triage_after_the_deadline_says_so(ledger: Ledger) -> None:
    job = a_job(ledger, budget_s=0.000001)
    ledger.jobs.finish(job, [a_result(job)])
    triaged = ledger.deliveries.sent(outgoing(ledger), 0)
    assert triaged is not None
    assert not triaged.is_within_budget


def test_a_transient_answer_puts_the_object_off(ledger: Ledger, tmp_path: Path) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    assert ledger.deliveries.retry_later(outgoing(ledger), 30, "refused the association")
    assert ledger.deliveries.claim("pacs", LEASE_S) is None
    at = ledger.deliveries.next_at("pacs")
    assert at is not None
    assert ledger.now() < at <= ledger.now() + 30
    reason = [("pending", "refused the association")]
    assert rows(tmp_path, "SELECT state, reason FROM delivery") == reason


def test_next_at_is_none_when_nothing_waits(ledger: Ledger) -> None:
    assert ledger.deliveries.next_at("pacs") is None
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    at = ledger.deliveries.next_at("pacs")
    assert at is not None
    assert at <= ledger.now()
    ledger.deliveries.sent(outgoing(ledger), 0)
    assert ledger.deliveries.next_at("pacs") is None


def test_a_permanent_answer_ends_that_object_while_the_others_go_on(ledger: Ledger) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job), a_result(job, kind=ObjectKind.SEG)])
    assert ledger.deliveries.give_up(outgoing(ledger), "no presentation context", 0x0122)
    assert ledger.upkeep.depths().dead == {"pacs": 1}
    assert outgoing(ledger).kind == "seg"
    event = ledger.views.events()[0]
    assert (event["kind"], event["detail"]) == ("delivery-dead", "pacs: no presentation context")


def test_a_sender_that_comes_back_late_cannot_undo_a_forced_retry(ledger: Ledger) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    late = outgoing(ledger)
    ledger.admin.retry(job.job_id)
    ledger.jobs.finish(claimed(ledger), [a_result(job)])
    assert ledger.deliveries.sent(late, 0) is None
    assert outgoing(ledger).token > late.token

"""An admin's retry, requeue and skip: what they change, and what they refuse."""

from __future__ import annotations

from pathlib import Path

from dicom_xai.ledger import Ledger
from dicom_xai.study import ObjectKind
from tests.make.ledger import LEASE_S, a_job, a_result, claimed, outgoing, rows


def test_a_forced_retry_keeps_one_result_for_each_uid_and_sends_it_again(
    ledger: Ledger, tmp_path: Path
) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    ledger.deliveries.sent(outgoing(ledger), 0)
    assert ledger.admin.retry(job.job_id)
    again = claimed(ledger)
    assert ledger.jobs.finish(again, [a_result(again, key="f" * 32)])
    assert rows(tmp_path, "SELECT spool_key FROM result") == [("f" * 32,)]
    # attempts go on counting: 0x0111 to a resend means that the destination holds it
    assert rows(tmp_path, "SELECT state, attempts FROM delivery") == [("pending", 1)]
    assert ledger.deliveries.sent(outgoing(ledger), 0) is None  # it was triaged once


def test_a_retry_of_a_failed_job_amends_its_note(ledger: Ledger, tmp_path: Path) -> None:
    job = a_job(ledger)
    note = a_result(job, kind=ObjectKind.NOTE)
    ledger.jobs.finish(job, [note], "no geometry", is_failure=True)
    assert ledger.admin.retry(job.job_id)
    assert not ledger.admin.retry(job.job_id)  # it is under way
    again = claimed(ledger)
    assert (again.purpose, again.generation) == ("amendment", 1)
    assert [each.sop_instance_uid for each in again.predecessors] == [note.sop_instance_uid]
    assert rows(tmp_path, "SELECT state FROM job") == [("failed",), ("running",)]


def test_only_an_ended_job_is_retried(ledger: Ledger) -> None:
    job = a_job(ledger)
    assert not ledger.admin.retry(job.job_id)
    assert not ledger.admin.retry(12345)
    ledger.jobs.finish(job, [], "reason", is_failure=True)
    assert ledger.admin.retry(job.job_id)
    assert not ledger.admin.retry(job.job_id)


def test_a_retry_beside_a_live_job_of_the_same_unit_is_refused(ledger: Ledger) -> None:
    first = a_job(ledger)
    ledger.jobs.finish(first, [a_result(first)], amend_because="no time")
    second = claimed(ledger)
    ledger.jobs.finish(second, [a_result(second)], amend_because="no time again")
    assert claimed(ledger).generation == 2
    assert not ledger.admin.retry(second.job_id)
    assert ledger.admin.retry(first.job_id)


def test_a_dead_letter_is_sent_again_when_asked(ledger: Ledger) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    dead = outgoing(ledger)
    ledger.deliveries.give_up(dead, "refused")
    assert ledger.deliveries.claim("pacs", LEASE_S) is None
    assert ledger.admin.requeue(dead.delivery_id)
    again = outgoing(ledger)
    # attempts go on counting: 0x0111 may say that it had arrived after all
    assert (again.delivery_id, again.attempts) == (dead.delivery_id, 2)
    assert again.token > dead.token


def test_a_skipped_dead_letter_is_never_sent(ledger: Ledger) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    dead = outgoing(ledger)
    ledger.deliveries.give_up(dead, "refused")
    assert ledger.admin.skip(dead.delivery_id)
    assert ledger.deliveries.claim("pacs", LEASE_S) is None
    assert ledger.upkeep.depths().dead == {}
    assert not ledger.admin.requeue(dead.delivery_id)


def test_a_delivery_that_waits_for_a_destination_that_is_gone_can_be_skipped(
    ledger: Ledger,
) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    item = outgoing(ledger)
    ledger.deliveries.retry_later(item, 60, "no route to host")
    assert ledger.admin.skip(item.delivery_id)
    assert ledger.deliveries.next_at("pacs") is None


def test_a_skip_ends_triage_when_the_destination_holds_the_others(
    ledger: Ledger, tmp_path: Path
) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job), a_result(job, kind=ObjectKind.SEG)])
    ledger.deliveries.sent(outgoing(ledger), 0)
    dead = outgoing(ledger)
    ledger.deliveries.give_up(dead, "no presentation context", 0x0122)
    assert rows(tmp_path, "SELECT triaged_at FROM job") == [(None,)]
    ledger.admin.skip(dead.delivery_id)
    # since the other object came, not since somebody looked
    assert rows(tmp_path, "SELECT triaged_at FROM job") == rows(
        tmp_path, "SELECT max(sent_at) FROM delivery"
    )


def test_a_unit_of_which_everything_was_skipped_is_not_triaged(
    ledger: Ledger, tmp_path: Path
) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    dead = outgoing(ledger)
    ledger.deliveries.give_up(dead, "refused")
    ledger.admin.skip(dead.delivery_id)
    assert rows(tmp_path, "SELECT triaged_at FROM job") == [(None,)]


def test_only_a_dead_letter_is_requeued_or_skipped(ledger: Ledger) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    item = outgoing(ledger)
    for verb in (ledger.admin.requeue, ledger.admin.skip):
        assert not verb(item.delivery_id)
        assert not verb(12345)
    assert ledger.deliveries.sent(item, 0) is not None

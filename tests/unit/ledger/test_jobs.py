"""Claims with leases and tokens, finishing in one transaction, retries, deadlines."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from dicom_xai.ledger import Ledger
from dicom_xai.study import ObjectKind, Per, Priority, Purpose
from tests.make.ledger import (
    LEASE_S,
    OVER,
    a_job,
    a_result,
    an_instance,
    change,
    claimed,
    make_ready,
    outgoing,
    receive,
    rows,
    url_in,
    waiting,
    wanted,
)


def queue(ledger: Ledger, number: int, **wants: object) -> None:
    instance = an_instance(number)
    receive(ledger, instance, wanted(instance, Per.INSTANCE, **wants))  # type: ignore[arg-type]


def test_stat_goes_first_then_the_earliest_deadline(ledger: Ledger) -> None:
    queue(ledger, 1, budget_s=50)
    queue(ledger, 2, budget_s=5)
    queue(ledger, 3, budget_s=500, priority=Priority.STAT)
    queue(ledger, 4, budget_s=100, priority=Priority.STAT)
    order = [claimed(ledger).instances[0] for _ in range(4)]
    assert order == [an_instance(number) for number in (4, 3, 2, 1)]
    assert ledger.jobs.claim(LEASE_S) is None


@pytest.mark.promise("P6")
def test_what_was_tried_before_waits_for_what_was_not(ledger: Ledger) -> None:
    queue(ledger, 1, budget_s=1)
    tried = claimed(ledger, OVER)
    queue(ledger, 2, budget_s=1000)
    assert claimed(ledger).instances == (an_instance(2),)
    assert claimed(ledger).job_id == tried.job_id


def test_a_claimed_job_is_nobody_elses_until_its_lease_runs_out(ledger: Ledger) -> None:
    queue(ledger, 1)
    first = claimed(ledger, OVER)
    second = claimed(ledger)
    assert second.job_id == first.job_id
    assert (first.token, second.token) == (1, 2)
    assert (first.attempts, second.attempts) == (1, 2)
    assert ledger.jobs.claim(LEASE_S) is None


def test_jobs_are_claimed_once_by_many_threads(ledger: Ledger) -> None:
    for number in range(20):
        queue(ledger, number)
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: ledger.jobs.claim(LEASE_S), range(30)))
    ids = [job.job_id for job in taken if job is not None]
    assert len(ids) == len(set(ids)) == 20


def test_a_stale_token_changes_nothing(ledger: Ledger, tmp_path: Path) -> None:
    stale = a_job(ledger, lease_s=OVER)
    fresh = claimed(ledger)
    before = rows(tmp_path, "SELECT * FROM job")
    assert not ledger.jobs.finish(stale, [a_result(stale)])
    assert not ledger.jobs.finish(stale, [a_result(stale)], "note", is_failure=True)
    assert not ledger.jobs.renew(stale, LEASE_S)
    assert not ledger.jobs.retry_later(stale, 0, "reason")
    assert not ledger.jobs.fix_explainer(stale, "grad-cam")
    assert not ledger.jobs.use_model(stale, "other")
    assert rows(tmp_path, "SELECT * FROM job") == before
    assert rows(tmp_path, "SELECT * FROM result") == []
    assert ledger.jobs.finish(fresh, [a_result(fresh)])


def test_a_renewed_claim_is_kept(ledger: Ledger) -> None:
    job = a_job(ledger, lease_s=OVER)
    assert ledger.jobs.renew(job, LEASE_S)
    assert ledger.jobs.claim(LEASE_S) is None


def test_claims_of_a_dead_process_are_free_at_once(ledger: Ledger, tmp_path: Path) -> None:
    script = """
import sys
from dicom_xai.ledger import Ledger
from tests.make.ledger import a_job, a_result, outgoing
ledger = Ledger(sys.argv[1])
job = a_job(ledger)
ledger.jobs.finish(job, [a_result(job)])
outgoing(ledger)
a_job(ledger, 2)
"""
    subprocess.run([sys.executable, "-c", script, url_in(tmp_path)], check=True)
    ours = a_job(ledger, 3)
    assert ledger.jobs.claim(LEASE_S) is None
    assert ledger.upkeep.release_dead() == 4  # two associations, a job, a delivery
    assert claimed(ledger).instances == (an_instance(2),)
    assert outgoing(ledger).attempts == 2
    assert ledger.jobs.renew(ours, LEASE_S)


def test_next_at_is_when_something_can_be_claimed(ledger: Ledger) -> None:
    assert ledger.jobs.next_at() is None
    job = a_job(ledger)
    leased = ledger.jobs.next_at()
    assert leased is not None
    assert leased > ledger.now() + LEASE_S / 2
    ledger.jobs.retry_later(job, 20, "later")
    later = ledger.jobs.next_at()
    assert later is not None
    assert ledger.now() < later <= ledger.now() + 20
    assert ledger.jobs.claim(LEASE_S) is None


def test_results_deliveries_and_the_end_are_one_transaction(ledger: Ledger, tmp_path: Path) -> None:
    job = a_job(ledger)
    sc = a_result(job, to=["pacs", "archive"])
    seg = a_result(job, kind=ObjectKind.SEG)
    assert ledger.jobs.finish(job, [sc, seg], findings='[{"name": "nodule"}]', stages='{"infer":1}')
    assert rows(tmp_path, "SELECT kind FROM result ORDER BY id") == [("sc",), ("seg",)]
    found = rows(tmp_path, "SELECT destination, state FROM delivery ORDER BY destination, id")
    assert found == [("archive", "pending"), ("pacs", "pending"), ("pacs", "pending")]
    assert rows(tmp_path, "SELECT state, lease_until FROM job") == [("done", None)]


def test_a_result_that_cannot_be_written_leaves_nothing_of_the_others(
    ledger: Ledger, tmp_path: Path
) -> None:
    job = a_job(ledger)
    orphan = replace(a_result(job, 1), source=an_instance(99))
    with pytest.raises(IntegrityError):
        ledger.jobs.finish(job, [a_result(job), orphan])
    assert rows(tmp_path, "SELECT * FROM result") == []
    assert rows(tmp_path, "SELECT * FROM delivery") == []
    assert rows(tmp_path, "SELECT state, token FROM job") == [("running", 1)]
    assert ledger.jobs.finish(job, [a_result(job)])


def test_two_results_of_one_kind_and_ordinal_are_refused(ledger: Ledger, tmp_path: Path) -> None:
    job = a_job(ledger)
    with pytest.raises(IntegrityError):
        ledger.jobs.finish(job, [a_result(job), a_result(job, uid="2.25.9", key="9" * 32)])
    assert rows(tmp_path, "SELECT * FROM result") == []


def test_a_failure_keeps_its_reason_and_its_note_object(ledger: Ledger, tmp_path: Path) -> None:
    job = a_job(ledger)
    note = a_result(job, kind=ObjectKind.NOTE)
    assert ledger.jobs.finish(job, [note], "no pixels", is_failure=True)
    assert rows(tmp_path, "SELECT state, note FROM job") == [("failed", "no pixels")]
    assert outgoing(ledger).kind == "note"
    assert ledger.views.events()[0]["detail"] == "no pixels"


def test_a_quick_answer_queues_its_amendment_with_it(ledger: Ledger) -> None:
    job = a_job(ledger, budget_s=7)
    ledger.jobs.finish(job, [a_result(job)], amend_because="no time for grad-cam")
    amendment = claimed(ledger)
    assert (amendment.purpose, amendment.generation) == (Purpose.AMENDMENT, 1)
    assert amendment.instances == job.instances
    assert amendment.priority is Priority.ROUTINE
    assert amendment.deadline_at - amendment.ready_at == pytest.approx(7, abs=1e-6)
    assert amendment.explainer == ""
    assert [item.kind for item in amendment.predecessors] == ["sc"]


def test_a_job_with_nothing_to_send_is_triaged_when_done_and_never_overdue(
    ledger: Ledger,
) -> None:
    job = a_job(ledger, budget_s=0.001)
    assert ledger.jobs.finish(job, [])
    while ledger.now() <= job.deadline_at:
        pass
    assert ledger.upkeep.overdue() == []


def test_a_transient_error_gives_the_job_back_and_the_attempt_counts(ledger: Ledger) -> None:
    job = a_job(ledger)
    assert ledger.jobs.retry_later(job, 0, "device busy")
    again = claimed(ledger)
    assert (again.job_id, again.attempts, again.note) == (job.job_id, 2, "device busy")


def test_what_a_job_is_not_to_blame_for_takes_back_the_attempt_of_its_holder_alone(
    ledger: Ledger, tmp_path: Path
) -> None:
    queue(ledger, 1)
    for _ in range(10):
        job = claimed(ledger)
        assert job.attempts == 1
        assert ledger.jobs.retry_later(job, 0, "no room", is_counted=False)
        assert not ledger.jobs.retry_later(job, 0, "no room", is_counted=False)
    assert job.token == 10
    overtaken, _ = claimed(ledger, OVER), claimed(ledger)
    assert not ledger.jobs.retry_later(overtaken, 0, "no room", is_counted=False)
    assert rows(tmp_path, "SELECT attempts FROM job") == [(2,)]


def test_what_was_given_back_waits_for_what_was_not_tried(ledger: Ledger) -> None:
    queue(ledger, 1, budget_s=1)
    ledger.jobs.retry_later(claimed(ledger), 0, "no room", is_counted=False)
    queue(ledger, 2, budget_s=1000)
    assert claimed(ledger).instances == (an_instance(2),)


def test_a_claim_without_an_end_leaves_that_as_its_reason(ledger: Ledger) -> None:
    ledger.jobs.retry_later(a_job(ledger), 0, "no room", is_counted=False)
    assert claimed(ledger, OVER).note == "no room"
    assert claimed(ledger).note == "its worker ended without a word"


def test_what_was_chosen_first_is_kept_by_every_retry(ledger: Ledger) -> None:
    job = a_job(ledger)
    ledger.jobs.fix_explainer(job, "grad-cam")
    ledger.jobs.retry_later(job, 0, "device busy")
    second = claimed(ledger)
    ledger.jobs.finish(second, [a_result(second)])
    assert ledger.admin.retry(job.job_id)
    third = claimed(ledger)
    for again in (second, third):
        assert again.created_at == job.created_at
        assert again.explainer == "grad-cam"
        assert again.deadline_at == job.deadline_at
        assert again.route_json == job.route_json
    assert third.attempts == 1


def test_a_claim_tells_which_files_an_earlier_try_made(ledger: Ledger) -> None:
    job = a_job(ledger)
    assert job.earlier_files == {}
    made = a_result(job)
    ledger.jobs.finish(job, [made])
    ledger.admin.retry(job.job_id)
    assert claimed(ledger).earlier_files == {made.sop_instance_uid: made.spool_key}


def test_a_job_can_move_to_the_model_that_is_live(ledger: Ledger) -> None:
    job = a_job(ledger, digest="gone")
    assert ledger.jobs.live_model_digests() == {"gone"}
    assert ledger.jobs.use_model(job, "here")
    assert ledger.jobs.live_model_digests() == {"here"}
    ledger.jobs.finish(job, [])
    assert ledger.jobs.live_model_digests() == set()


def passed(tmp_path: Path, deadline_at: float = 0.0) -> None:
    """As if the deadline of every job had gone by."""
    change(tmp_path, "UPDATE job SET deadline_at = ?", deadline_at)


def test_a_deadline_that_passes_is_reported_once_with_its_stage(
    ledger: Ledger, tmp_path: Path
) -> None:
    queue(ledger, 1)
    assert ledger.upkeep.overdue() == []
    passed(tmp_path)
    (overdue,) = ledger.upkeep.overdue()
    assert (overdue.route, overdue.stage) == ("head-ct", "queue")
    assert ledger.upkeep.overdue() == []


def test_the_deadline_of_a_running_job_is_left_to_its_worker(
    ledger: Ledger, tmp_path: Path
) -> None:
    job = a_job(ledger)
    passed(tmp_path)
    assert ledger.upkeep.overdue() == []
    assert ledger.jobs.note_overdue(job)
    assert not ledger.jobs.note_overdue(job)


def test_the_deadline_of_a_job_whose_worker_died_is_reported(
    ledger: Ledger, tmp_path: Path
) -> None:
    a_job(ledger, lease_s=OVER)
    passed(tmp_path)
    assert [item.stage for item in ledger.upkeep.overdue()] == ["queue"]


@pytest.mark.parametrize("is_failure", [False, True])
def test_a_dead_destination_does_not_look_fast(
    ledger: Ledger, tmp_path: Path, is_failure: bool
) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)], is_failure=is_failure)
    passed(tmp_path)
    assert [item.stage for item in ledger.upkeep.overdue()] == ["outbox"]


def test_amendments_have_no_triage_deadline(ledger: Ledger, tmp_path: Path) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)], amend_because="no time")
    ledger.deliveries.sent(outgoing(ledger), 0)
    assert ledger.upkeep.next_deadline_at() is None
    passed(tmp_path)
    assert ledger.upkeep.overdue() == []


def test_the_next_deadline_is_that_of_the_most_urgent_unanswered_unit(ledger: Ledger) -> None:
    assert ledger.upkeep.next_deadline_at() is None
    queue(ledger, 1, budget_s=50)
    queue(ledger, 2, budget_s=5)
    first = claimed(ledger)
    assert ledger.upkeep.next_deadline_at() == first.deadline_at
    ledger.jobs.finish(first, [a_result(first)])
    ledger.deliveries.sent(outgoing(ledger), 0)
    assert ledger.upkeep.next_deadline_at() == claimed(ledger).deadline_at


def another_process(ledger: Ledger, folder: Path) -> None:
    """Give every held unit and job to a process that is not this one."""
    change(folder, "UPDATE candidate SET holder = '1-1' WHERE holder <> ''")
    change(folder, "UPDATE job SET holder = '1-1' WHERE holder <> ''")


def test_incoming_gives_each_instance_of_a_waiting_unit_once_and_in_order(ledger: Ledger) -> None:
    arrivals = [an_instance(number) for number in (1, 2, 3)]
    for instance in arrivals[:2]:
        receive(ledger, instance, wanted(instance))
    first = ledger.jobs.incoming(0, 10)
    assert [incoming.instance for incoming in first] == arrivals[:2]
    receive(ledger, arrivals[2], wanted(arrivals[2]))
    later = ledger.jobs.incoming(first[-1].number, 10)
    assert [incoming.instance for incoming in later] == arrivals[2:]


def test_incoming_leaves_out_units_that_are_ready_or_held_by_another(
    ledger: Ledger, tmp_path: Path
) -> None:
    queue(ledger, 1)  # fires at once
    waiting_one = an_instance(2, series=2)
    receive(ledger, waiting_one, wanted(waiting_one))
    assert [incoming.instance for incoming in ledger.jobs.incoming(0, 10)] == [waiting_one]
    another_process(ledger, tmp_path)
    assert ledger.jobs.incoming(0, 10) == []


def test_incoming_says_which_instances_an_urgent_route_wants(ledger: Ledger) -> None:
    instance = an_instance(1)
    stat = replace(wanted(instance, route="stat"), route_json='{"priority": "stat"}')
    receive(ledger, instance, wanted(instance, route="calm"), stat)
    calm = an_instance(2, series=2)
    receive(ledger, calm, wanted(calm, route="calm"))
    found = {item.instance: item.priority for item in ledger.jobs.incoming(0, 10)}
    assert found == {instance: Priority.STAT, calm: Priority.ROUTINE}


def test_a_job_is_left_to_its_holder_for_a_moment_and_then_taken(
    ledger: Ledger, tmp_path: Path
) -> None:
    instance = an_instance(1)
    receive(ledger, instance, wanted(instance, max_wait_s=0))
    ledger.jobs.incoming(0, 10)
    [ready] = waiting(ledger)
    assert make_ready(ledger, ready)
    another_process(ledger, tmp_path)
    change(tmp_path, "UPDATE job SET ready_at = ready_at + 100")  # no test waits for a clock
    assert ledger.jobs.claim(LEASE_S) is None
    at = ledger.jobs.next_at()
    assert at is not None
    assert at > ledger.now()
    change(tmp_path, "UPDATE job SET ready_at = ready_at - 101")
    assert claimed(ledger).instances == (instance,)


def test_only_jobs_of_the_asked_priority_are_claimed(ledger: Ledger) -> None:
    queue(ledger, 1)
    assert ledger.jobs.claim(LEASE_S, only=Priority.STAT) is None
    assert ledger.jobs.next_at(only=Priority.STAT) is None
    queue(ledger, 2, priority=Priority.STAT)
    at = ledger.jobs.next_at(only=Priority.STAT)
    assert at is not None
    assert at <= ledger.now()
    job = ledger.jobs.claim(LEASE_S, only=Priority.STAT)
    assert job is not None
    assert job.instances == (an_instance(2),)


def test_a_job_like_another_has_its_route_model_and_level(ledger: Ledger) -> None:
    queue(ledger, 1, route="a")
    queue(ledger, 2, route="b")
    queue(ledger, 3, route="a", digest="m2")
    queue(ledger, 4, route="a")
    first = claimed(ledger)
    assert (first.route, first.model_digest) == ("a", "m1")
    alike = ledger.jobs.claim(LEASE_S, like=first)
    assert alike is not None
    assert alike.instances == (an_instance(4),)
    assert ledger.jobs.claim(LEASE_S, like=first) is None


def test_a_job_that_was_tried_before_keeps_no_other_company(ledger: Ledger, tmp_path: Path) -> None:
    queue(ledger, 1, route="a")
    claimed(ledger)
    change(tmp_path, "UPDATE job SET lease_until = 0")
    queue(ledger, 2, route="a")
    first = claimed(ledger)
    assert first.instances == (an_instance(2),)
    assert ledger.jobs.claim(LEASE_S, like=first) is None

"""Retention, the numbers for metrics, and that no verb reads ended rows."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from dicom_xai.ledger import Disposition, Ledger
from dicom_xai.study import Instance, ObjectKind, Priority
from tests.make.ledger import (
    LEASE_S,
    OVER,
    SENDER,
    a_job,
    a_result,
    an_instance,
    change,
    claimed,
    make_ready,
    outgoing,
    receive,
    rows,
    waiting,
    wanted,
)

KEEP_DAYS = 2.0


def age(folder: Path) -> None:
    """As if all that is here had come three days ago."""
    change(folder, "UPDATE instance SET received_utc = '2020-01-01T00:00:00.000000+00:00'")
    change(folder, "UPDATE result SET created_utc = '2020-01-01T00:00:00.000000+00:00'")


def expired(ledger: Ledger, keep_failed_days: float = 100_000.0) -> list[str]:
    return ledger.upkeep.expire(KEEP_DAYS, keep_failed_days).spool_keys


def test_a_delivered_study_leaves_the_spool_after_its_days_and_its_hashes_stay(
    ledger: Ledger, tmp_path: Path
) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    ledger.deliveries.sent(outgoing(ledger), 0)
    assert expired(ledger) == []
    age(tmp_path)
    keys = expired(ledger)
    assert sorted(keys) == sorted([an_instance().spool_key, a_result(job).spool_key])
    assert expired(ledger) == []
    assert rows(tmp_path, "SELECT sha256 FROM instance") == [(an_instance().sha256,)]
    assert rows(tmp_path, "SELECT sha256 FROM result") == [(a_result(job).sha256,)]
    assert receive(ledger, an_instance()).value == "restored"  # known, and kept again
    assert receive(ledger, an_instance()).value == "duplicate"


def waits(ledger: Ledger) -> Instance:
    receive(ledger, an_instance(), wanted(an_instance()))
    return an_instance()


def is_held(ledger: Ledger) -> Instance:
    receive(ledger, an_instance(), wanted(an_instance(), max_wait_s=0))
    ledger.arrivals.hold(waiting(ledger)[0], "max_wait_s")
    return an_instance()


def is_queued(ledger: Ledger) -> Instance:
    ledger.jobs.retry_later(a_job(ledger), 60, "busy")
    return an_instance()


def runs(ledger: Ledger) -> Instance:
    a_job(ledger)
    return an_instance()


def has_lost_its_worker(ledger: Ledger) -> Instance:
    a_job(ledger, lease_s=OVER)
    return an_instance()


def failed(ledger: Ledger) -> Instance:
    ledger.jobs.finish(a_job(ledger), [], "reason", is_failure=True)
    return an_instance()


def is_in_the_outbox(ledger: Ledger) -> Instance:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    return an_instance()


def is_being_sent(ledger: Ledger) -> Instance:
    is_in_the_outbox(ledger)
    outgoing(ledger)
    return an_instance()


def is_a_dead_letter(ledger: Ledger) -> Instance:
    is_in_the_outbox(ledger)
    ledger.deliveries.give_up(outgoing(ledger), "refused")
    return an_instance()


def is_with_one_of_two_destinations(ledger: Ledger) -> Instance:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job, to=["pacs", "archive"])])
    ledger.deliveries.sent(outgoing(ledger), 0)
    return an_instance()


def awaits_its_amendment(ledger: Ledger) -> Instance:
    job = a_job(ledger)
    ledger.jobs.finish(job, [], amend_because="no time")
    return an_instance()


def is_wanted_by_a_second_route(ledger: Ledger) -> Instance:
    from dicom_xai.study import Per

    instance = an_instance()
    receive(ledger, instance, wanted(instance, Per.INSTANCE), wanted(instance, route="slow"))
    ledger.jobs.finish(claimed(ledger), [])
    return instance


@pytest.mark.parametrize(
    "state",
    [
        waits,
        is_held,
        is_queued,
        runs,
        has_lost_its_worker,
        failed,
        is_in_the_outbox,
        is_being_sent,
        is_a_dead_letter,
        is_with_one_of_two_destinations,
        awaits_its_amendment,
        is_wanted_by_a_second_route,
    ],
    ids=lambda state: state.__name__.replace("_", " "),
)
def test_nothing_is_forgotten_whose_unit(ledger: Ledger, tmp_path: Path, state: object) -> None:
    assert callable(state)
    needed = state(ledger)
    age(tmp_path)
    assert expired(ledger) == []
    assert ledger.upkeep.is_known_key(needed.spool_key)


@pytest.mark.parametrize("state", [is_held, failed], ids=["held", "failed"])
def test_a_unit_without_an_answer_stays_longer_and_its_end_is_counted(
    ledger: Ledger, tmp_path: Path, state: object
) -> None:
    assert callable(state)
    key = state(ledger).spool_key
    age(tmp_path)
    assert expired(ledger) == []
    gone = ledger.upkeep.expire(KEEP_DAYS, 30.0)
    assert (gone.spool_keys, gone.unanswered_units) == ([key], 1)
    assert ledger.upkeep.expire(KEEP_DAYS, 30.0).unanswered_units == 0


def test_a_failed_unit_stays_for_ever_while_its_note_is_not_delivered(
    ledger: Ledger, tmp_path: Path
) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job, kind=ObjectKind.NOTE)], "reason", is_failure=True)
    ledger.deliveries.give_up(outgoing(ledger), "refused")
    age(tmp_path)
    assert expired(ledger, 30.0) == []


def test_a_skipped_dead_letter_holds_nothing_back(ledger: Ledger, tmp_path: Path) -> None:
    is_in_the_outbox(ledger)
    dead = outgoing(ledger)
    ledger.deliveries.give_up(dead, "refused")
    ledger.admin.skip(dead.delivery_id)
    age(tmp_path)
    assert len(expired(ledger)) == 2


@pytest.mark.parametrize(
    "disposition", [Disposition.UNROUTED, Disposition.IGNORED, Disposition.OWN]
)
def test_what_no_route_wanted_is_kept_for_its_days_only(
    ledger: Ledger, tmp_path: Path, disposition: Disposition
) -> None:
    receive(ledger, an_instance(), disposition=disposition)
    assert expired(ledger) == []
    age(tmp_path)
    assert expired(ledger) == [an_instance().spool_key]


def test_a_key_is_known_while_an_instance_or_a_result_owns_it(
    ledger: Ledger, tmp_path: Path
) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    assert ledger.upkeep.is_known_key(an_instance().spool_key)
    assert ledger.upkeep.is_known_key(a_result(job).spool_key)
    assert not ledger.upkeep.is_known_key("0" * 32)
    ledger.deliveries.sent(outgoing(ledger), 0)
    age(tmp_path)
    for key in expired(ledger):
        assert not ledger.upkeep.is_known_key(key)


def test_depths_count_each_unit_where_it_waits(ledger: Ledger) -> None:
    empty = ledger.upkeep.depths()
    assert set(empty.rows.values()) == {0}
    assert all(age_s == pytest.approx(0.0, abs=1e-6) for age_s in empty.oldest_s.values())
    receive(ledger, an_instance(1, series=9), wanted(an_instance(1, series=9)))
    ledger.jobs.finish(a_job(ledger, 2), [], "reason", is_failure=True)
    job = a_job(ledger, 3)
    ledger.jobs.finish(job, [a_result(job, 0, to=["pacs", "archive"]), a_result(job, 1)])
    outgoing(ledger)
    a_job(ledger, 4)
    ledger.jobs.retry_later(a_job(ledger, 5), 60, "busy")
    depths = ledger.upkeep.depths()
    assert depths.rows == {
        "waiting": 1,
        "held": 0,
        "queued": 1,
        "running": 1,
        "failed": 1,
        "outbox": 3,
    }
    assert depths.outbox == {"pacs": 2, "archive": 1}
    assert all(age_s > 0 for age_s in depths.oldest_s.values())
    assert depths.oldest_s["waiting"] >= depths.oldest_s["outbox"] >= depths.oldest_s["running"]


GROWING = frozenset(
    """
    instance candidate candidate_instance job result delivery event
    commitment commitment_delivery commitment_report
    """.split()
)


def a_day(ledger: Ledger) -> None:
    """Every verb of the flow, once."""
    arrivals, jobs, deliveries = ledger.arrivals, ledger.jobs, ledger.deliveries
    admin, upkeep = ledger.admin, ledger.upkeep
    transfer = arrivals.open_transfer(SENDER, LEASE_S)
    arrivals.renew_transfers([transfer], LEASE_S)
    want = wanted(an_instance(), max_wait_s=0)
    for content in ("", "", "other"):
        receive(ledger, an_instance(content=content), want, transfer=transfer)
    arrivals.next_due_at()
    (unit,) = waiting(ledger)
    arrivals.look_again(unit, 0.0)
    arrivals.close_transfer(transfer, is_released=True)
    arrivals.open_transfer(SENDER, OVER)
    arrivals.lose_transfers()
    arrivals.hold(unit, "reason")
    receive(ledger, an_instance(2), want, transfer=transfer)
    make_ready(ledger, waiting(ledger)[0])
    jobs.incoming(0, 10)
    jobs.next_at()
    jobs.next_at(only=Priority.STAT)
    job = claimed(ledger)
    jobs.renew(job, LEASE_S)
    jobs.fix_explainer(job, "grad-cam")
    jobs.use_model(job, "m2")
    jobs.live_model_digests()
    jobs.note_overdue(job)
    jobs.finish(job, [a_result(job)], "note", amend_because="no time")
    deliveries.next_at("pacs")
    deliveries.retry_later(outgoing(ledger), 0.0, "down")
    dead = outgoing(ledger)
    deliveries.give_up(dead, "refused")
    admin.requeue(dead.delivery_id)
    deliveries.sent(outgoing(ledger), 0)
    admin.retry(job.job_id)
    jobs.retry_later(claimed(ledger), 0.0, "busy")
    upkeep.tick()
    upkeep.overdue()
    upkeep.next_deadline_at()
    upkeep.depths()
    upkeep.stored_bytes()
    upkeep.release_dead()
    upkeep.expire(0.0, 0.0)
    upkeep.is_known_key("0" * 32)


def test_no_verb_of_the_flow_reads_a_whole_table_that_only_grows(
    ledger: Ledger, tmp_path: Path
) -> None:
    """Rows stay for ever: a plan without an index is a service that slows down with the years."""
    statements: dict[str, object] = {}

    def note(_c: object, _d: object, sql: str, values: object, *_: object) -> None:
        statements.setdefault(sql, values)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        a_day(ledger)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    connection = sqlite3.connect(tmp_path / "ledger.db")
    scans = []
    for sql, values in statements.items():
        if sql.split()[0] in ("SELECT", "UPDATE", "DELETE"):
            plan = connection.execute(f"EXPLAIN QUERY PLAN {sql}", values).fetchall()  # type: ignore[arg-type]
            steps = [str(step[3]).split() for step in plan]
            scans += [
                (" ".join(step), sql)
                for step in steps
                if step[0] == "SCAN" and step[1] in GROWING and "USING" not in step
            ]
    connection.close()
    assert len(statements) > 40
    assert scans == []


def test_the_growth_test_leaves_out_no_verb_but_what_others_call(ledger: Ledger) -> None:
    used = set(a_day.__code__.co_names)
    verbs = {
        name
        for verbs in (ledger.arrivals, ledger.jobs, ledger.deliveries, ledger.admin, ledger.upkeep)
        for name in dir(verbs)
        if not name.startswith("_")
    }
    indirect = {"record", "due", "make_ready", "claim", "skip"}  # skip: the same as requeue
    assert verbs - used - indirect == set()

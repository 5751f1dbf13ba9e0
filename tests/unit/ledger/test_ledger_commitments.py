"""Storage commitment in the ledger: each state, each kind of report, and a death between steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dicom_xai.commitment import CommitmentReport, Failure
from dicom_xai.ledger import Asking, Ledger, Reconciled
from dicom_xai.ledger.commitments import RESENDS_AT_MOST
from dicom_xai.study import ObjectKind, Reference
from tests.make.ledger import (
    CT,
    a_job,
    a_result,
    change,
    outgoing,
    rows,
    url_in,
)

pytestmark = pytest.mark.promise("P4")


def sent(ledger: Ledger, *, count: int = 2, number: int = 1) -> None:
    """A unit whose objects a destination has got, and shall commit to."""
    job = a_job(ledger, number)
    kinds = (ObjectKind.SC, ObjectKind.SEG)[:count]
    ledger.jobs.finish(job, [a_result(job, kind=kind) for kind in kinds])
    for _ in kinds:
        ledger.deliveries.sent(outgoing(ledger), 0, wants_commitment=True)


def asked(ledger: Ledger, wait_s: float = 60.0) -> Asking:
    asking = ledger.commitments.ask("pacs", lambda _: wait_s)
    assert asking is not None
    return asking


def reported(
    ledger: Ledger, asking: Asking, lost: Sequence[int] = (), reason: int = 0x0112
) -> Reconciled:
    """The destination holds all but the objects with these indices."""
    references = asking.request.references
    done = ledger.commitments.reconcile(
        CommitmentReport(
            asking.request.transaction_uid,
            tuple(each for index, each in enumerate(references) if index not in lost),
            tuple(Failure(references[index], reason) for index in lost),
        ),
        ["pacs"],
        resend_s=0.0,
    )
    assert done is not None
    return done


def states(folder: Path) -> list[tuple[object, ...]]:
    return rows(folder, "SELECT state, commitment FROM delivery ORDER BY id")


def test_a_unit_is_asked_about_in_one_transaction_when_all_of_it_is_sent(
    ledger: Ledger, tmp_path: Path
) -> None:
    job = a_job(ledger)
    made = [a_result(job), a_result(job, kind=ObjectKind.SEG)]
    ledger.jobs.finish(job, made)
    ledger.deliveries.sent(outgoing(ledger), 0, wants_commitment=True)
    assert ledger.commitments.ask("pacs", lambda _: 1.0) is None
    assert ledger.commitments.next_ask_at("pacs") is None
    triaged = ledger.deliveries.sent(outgoing(ledger), 0, wants_commitment=True)
    assert triaged is not None  # it does not wait for a promise
    asking = asked(ledger)
    assert [each.sop_instance_uid for each in asking.request.references] == [
        each.sop_instance_uid for each in made
    ]
    # durable before anybody sends it
    assert rows(tmp_path, "SELECT transaction_uid, state FROM commitment") == [
        (asking.request.transaction_uid, "asked")
    ]
    assert ledger.commitments.ask("pacs", lambda _: 1.0) is None


def test_what_is_not_to_be_committed_is_not_asked_about(ledger: Ledger, tmp_path: Path) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    ledger.deliveries.sent(outgoing(ledger), 0)
    assert ledger.commitments.ask("pacs", lambda _: 1.0) is None
    assert states(tmp_path) == [("sent", "none")]


def test_a_positive_report_commits_and_the_same_again_changes_nothing(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger)
    asking = asked(ledger)
    assert len(reported(ledger, asking).committed) == 2
    assert states(tmp_path) == [("sent", "committed")] * 2
    assert ledger.upkeep.depths().uncommitted == {}
    repeated = reported(ledger, asking, lost=[0])
    assert repeated.is_repeated
    assert not repeated.resent
    assert states(tmp_path) == [("sent", "committed")] * 2


def test_what_a_destination_lost_is_sent_again_under_its_uid_and_asked_about_anew(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger)
    first = asked(ledger)
    done = reported(ledger, first, lost=[1])
    uid = first.request.references[1].sop_instance_uid
    assert done.resent == ((uid, 0x0112),)
    assert states(tmp_path) == [("sent", "committed"), ("pending", "none")]
    again = outgoing(ledger)
    assert (again.sop_instance_uid, again.attempts) == (uid, 2)
    assert ledger.deliveries.sent(again, 0x0111, wants_commitment=True) is None
    second = asked(ledger)
    assert second.request.references == first.request.references[1:]
    assert second.request.transaction_uid != first.request.transaction_uid
    reported(ledger, second)
    assert states(tmp_path) == [("sent", "committed")] * 2


def test_what_is_lost_again_and_again_is_a_dead_letter_with_its_reason(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger, count=1)
    for _ in range(RESENDS_AT_MOST):
        assert reported(ledger, asked(ledger), lost=[0]).resent
        ledger.deliveries.sent(outgoing(ledger), 0, wants_commitment=True)
    assert reported(ledger, asked(ledger), lost=[0]).dead
    assert rows(tmp_path, "SELECT state, commitment, reason FROM delivery") == [
        ("dead", "refused", "not committed: 0x0112")
    ]
    # a person may begin anew
    [(number,)] = rows(tmp_path, "SELECT id FROM delivery")
    assert ledger.admin.requeue(number)
    ledger.deliveries.sent(outgoing(ledger), 0, wants_commitment=True)
    assert reported(ledger, asked(ledger), lost=[0]).resent


@pytest.mark.parametrize("reason", [0x0119, 0x0122])
def test_what_no_resend_could_mend_is_not_sent_again(
    ledger: Ledger, tmp_path: Path, reason: int
) -> None:
    sent(ledger, count=1)
    assert reported(ledger, asked(ledger), lost=[0], reason=reason).dead
    assert states(tmp_path) == [("dead", "refused")]


def test_a_used_transaction_uid_costs_another_request_and_no_resend(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger, count=1)
    reported(ledger, asked(ledger, wait_s=0.0), lost=[0], reason=0x0131)
    assert states(tmp_path) == [("sent", "wanted")]
    reported(ledger, asked(ledger))
    assert states(tmp_path) == [("sent", "committed")]


def test_without_a_report_it_is_asked_again_later_and_longer(ledger: Ledger) -> None:
    sent(ledger)
    waits: list[int] = []
    uids = set()
    for _ in range(3):
        asking = ledger.commitments.ask("pacs", lambda asks: waits.append(asks) or 0.0)
        assert asking is not None
        uids.add(asking.request.transaction_uid)
    assert waits == [1, 2, 3]
    assert len(uids) == 3


def test_a_late_report_to_an_earlier_request_counts_where_it_is_good(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger)
    early, late = asked(ledger, wait_s=0.0), asked(ledger)
    # what was missing then may be there now: the newest request decides
    assert not reported(ledger, early, lost=[1]).resent
    assert states(tmp_path) == [("sent", "committed"), ("sent", "wanted")]
    assert reported(ledger, late).committed == (late.request.references[1].sop_instance_uid,)
    assert states(tmp_path) == [("sent", "committed")] * 2


def test_what_nobody_reports_about_is_given_up_and_a_report_after_that_still_counts(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger)
    asking = asked(ledger, wait_s=0.0)
    assert ledger.commitments.give_up("pacs", 2) == []
    assert len(ledger.commitments.give_up("pacs", 1)) == 2
    assert states(tmp_path) == [("dead", "wanted")] * 2
    reported(ledger, asking)
    assert states(tmp_path) == [("sent", "committed")] * 2


def test_a_report_of_somebody_else_or_about_nothing_is_unknown(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger)
    asking = asked(ledger)
    uid = asking.request.transaction_uid
    report = CommitmentReport(uid, asking.request.references, ())
    assert ledger.commitments.reconcile(report, ["archive"], 0.0) is None
    unknown = CommitmentReport("1.2.3", asking.request.references, ())
    assert ledger.commitments.reconcile(unknown, ["pacs"], 0.0) is None
    assert states(tmp_path) == [("sent", "wanted")] * 2


def test_a_report_speaks_for_the_objects_of_its_request_alone(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger, count=1, number=1)
    first = asked(ledger)
    sent(ledger, count=1, number=2)
    second = asked(ledger)
    strange = (Reference(CT, "1.9.9"), *second.request.references)
    done = ledger.commitments.reconcile(
        CommitmentReport(first.request.transaction_uid, strange, ()), ["pacs"], 0.0
    )
    assert done is not None
    assert done.committed == ()
    assert states(tmp_path) == [("sent", "wanted")] * 2


def test_a_request_that_was_not_taken_is_made_again_after_its_pause(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger)
    asking = asked(ledger)
    ledger.commitments.not_taken(asking, "refused the connection", 0.0)
    assert rows(tmp_path, "SELECT state, reason FROM commitment") == [
        ("failed", "refused the connection")
    ]
    assert asked(ledger).asks == 2


def test_a_death_between_the_row_and_the_request_costs_one_wait(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger)
    lost = asked(ledger, wait_s=0.0)
    ledger.close()
    reopened = Ledger(url_in(tmp_path))
    again = asked(reopened)
    assert again.request.references == lost.request.references
    reported(reopened, again)
    # the first had been sent after all
    assert reported(reopened, lost).committed == ()
    reopened.close()
    assert states(tmp_path) == [("sent", "committed")] * 2


LONG_AGO = "2020-01-01T00:00:00.000000+00:00"


def age_requests(folder: Path) -> None:
    change(folder, "UPDATE commitment SET asked_utc = ?", LONG_AGO)


def kept_requests(folder: Path) -> list[object]:
    found = [state for (state,) in rows(folder, "SELECT state FROM commitment ORDER BY id")]
    named = "SELECT DISTINCT commitment_id FROM commitment_delivery"
    assert len(rows(folder, named)) == len(found)
    return found


def test_a_request_is_forgotten_after_its_days_when_nothing_of_it_waits(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger)
    asked(ledger, wait_s=0.0)  # never reported
    second = asked(ledger, wait_s=0.0)
    ledger.commitments.not_taken(second, "refused the connection", 0.0)
    third = asked(ledger)
    reported(ledger, third, lost=[1])  # one comes again, and waits
    ledger.deliveries.sent(outgoing(ledger), 0, wants_commitment=True)
    last = asked(ledger)
    age_requests(tmp_path)
    ledger.upkeep.expire(1.0, 2.0)
    assert kept_requests(tmp_path) == ["overdue", "failed", "reported", "asked"]
    reported(ledger, last)
    ledger.upkeep.expire(1.0, 2.0)
    assert kept_requests(tmp_path) == []
    assert (
        rows(tmp_path, "SELECT commitment, commitment_id FROM delivery")
        == [("committed", None)] * 2
    )


def test_a_request_of_today_is_kept(ledger: Ledger, tmp_path: Path) -> None:
    sent(ledger)
    reported(ledger, asked(ledger))
    ledger.upkeep.expire(1.0, 2.0)
    assert kept_requests(tmp_path) == ["reported"]


def test_a_request_without_a_report_is_kept_while_the_dead_letter_could_be_promised(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger)
    asking = asked(ledger, wait_s=0.0)
    assert len(ledger.commitments.give_up("pacs", 1)) == 2
    age_requests(tmp_path)
    ledger.upkeep.expire(1.0, 2.0)
    assert len(reported(ledger, asking).committed) == 2  # late, and still known


def test_bytes_stay_until_they_are_committed_to(ledger: Ledger, tmp_path: Path) -> None:
    sent(ledger)
    for table, column in (("result", "created_utc"), ("instance", "received_utc")):
        change(tmp_path, f"UPDATE {table} SET {column} = '2020-01-01T00:00:00.000000+00:00'")
    assert ledger.upkeep.expire(1.0, 2.0).spool_keys == []
    reported(ledger, asked(ledger))
    assert len(ledger.upkeep.expire(1.0, 2.0).spool_keys) == 3


def test_a_destination_that_need_not_commit_any_more_keeps_no_bytes(
    ledger: Ledger, tmp_path: Path
) -> None:
    sent(ledger)
    assert ledger.commitments.release("archive") == 0
    assert ledger.commitments.release("pacs") == 2
    assert states(tmp_path) == [("sent", "none")] * 2

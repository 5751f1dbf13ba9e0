"""What the receiver tells the ledger: one content per UID, candidates, associations that end."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_xai.ledger import Disposition, Ledger, Recorded
from dicom_xai.study import Per, Priority, Purpose
from tests.make.ledger import (
    LEASE_S,
    OVER,
    SENDER,
    a_job,
    a_result,
    an_instance,
    claimed,
    make_ready,
    receive,
    rows,
    waiting,
    wanted,
)


def dispositions(folder: Path) -> list[tuple[object, ...]]:
    return rows(folder, "SELECT disposition, duplicates FROM instance ORDER BY id")


def test_a_duplicate_is_counted_and_makes_no_new_job(ledger: Ledger, tmp_path: Path) -> None:
    first = an_instance()
    want = wanted(first, Per.INSTANCE)
    assert receive(ledger, first, want) is Recorded.STORED
    assert receive(ledger, first, want) is Recorded.DUPLICATE
    assert receive(ledger, first, want) is Recorded.DUPLICATE
    assert dispositions(tmp_path) == [("routed", 2)]
    assert rows(tmp_path, "SELECT count(*) FROM job") == [(1,)]


@pytest.mark.promise("D8")
def test_other_content_under_a_known_uid_is_quarantined_and_never_routed(
    ledger: Ledger, tmp_path: Path
) -> None:
    first, other = an_instance(), an_instance(content="changed")
    receive(ledger, first, wanted(first, Per.INSTANCE))
    assert receive(ledger, other, wanted(other, Per.INSTANCE)) is Recorded.CONFLICT
    assert dispositions(tmp_path) == [("routed", 0), ("quarantined", 0)]
    assert claimed(ledger).instances == (first,)
    assert ledger.jobs.claim(LEASE_S) is None
    assert ledger.upkeep.depths().quarantined == 1


def test_the_same_wrong_content_again_is_a_conflict_again_and_kept_once(
    ledger: Ledger, tmp_path: Path
) -> None:
    receive(ledger, an_instance())
    assert receive(ledger, an_instance(content="changed")) is Recorded.CONFLICT
    assert receive(ledger, an_instance(content="changed")) is Recorded.KNOWN_CONFLICT
    assert receive(ledger, an_instance(content="third")) is Recorded.CONFLICT
    assert receive(ledger, an_instance()) is Recorded.DUPLICATE
    assert dispositions(tmp_path) == [("routed", 1), ("quarantined", 1), ("quarantined", 0)]


def test_a_conflict_leaves_an_event_for_the_alert(ledger: Ledger) -> None:
    receive(ledger, an_instance())
    receive(ledger, an_instance(content="changed"))
    (event,) = (row for row in ledger.views.events() if row["kind"] == "instance-conflict")
    assert event["subject"] == an_instance().sop_instance_uid


def test_our_own_result_come_back_is_never_routed(ledger: Ledger, tmp_path: Path) -> None:
    job = a_job(ledger)
    uid = "1.2.1.1.77"
    assert ledger.jobs.finish(job, [a_result(job, uid=uid)])
    returned = an_instance(77)
    assert returned.sop_instance_uid == uid
    assert receive(ledger, returned, wanted(returned, Per.INSTANCE)) is Recorded.OWN
    assert dispositions(tmp_path)[-1] == ("own", 0)
    assert ledger.jobs.claim(LEASE_S) is None


@pytest.mark.parametrize(
    "disposition", [Disposition.IGNORED, Disposition.UNROUTED, Disposition.OWN]
)
def test_what_is_not_routed_joins_no_unit(
    ledger: Ledger, tmp_path: Path, disposition: Disposition
) -> None:
    instance = an_instance()
    answer = receive(ledger, instance, wanted(instance), disposition=disposition)
    assert answer is (Recorded.OWN if disposition is Disposition.OWN else Recorded.STORED)
    assert rows(tmp_path, "SELECT count(*) FROM candidate") == [(0,)]


def test_the_trace_is_kept_with_the_instance(ledger: Ledger) -> None:
    instance = an_instance()
    transfer = ledger.arrivals.open_transfer(SENDER, LEASE_S)
    ledger.arrivals.record(instance, Disposition.UNROUTED, transfer, [], '{"r": "no: x"}')
    assert ledger.views.why(instance.study_instance_uid)[0]["trace"] == '{"r": "no: x"}'


def test_instances_of_a_series_gather_in_one_unit_in_order_of_arrival(ledger: Ledger) -> None:
    transfer = ledger.arrivals.open_transfer(SENDER, LEASE_S)
    for number in (3, 1, 2):
        instance = an_instance(number)
        receive(ledger, instance, wanted(instance, max_wait_s=0), transfer=transfer)
    (unit,) = waiting(ledger)
    assert make_ready(ledger, unit)
    job = claimed(ledger)
    assert job.instances == (an_instance(3), an_instance(1), an_instance(2))
    assert job.purpose is Purpose.TRIAGE


def test_two_routes_hold_the_same_instance_each_with_its_own_unit(ledger: Ledger) -> None:
    instance = an_instance()
    receive(
        ledger,
        instance,
        wanted(instance, max_wait_s=0, route="slow"),
        wanted(instance, Per.INSTANCE, route="fast"),
    )
    assert claimed(ledger).route == "fast"
    (unit,) = waiting(ledger)
    assert unit.route == "slow"


def test_a_unit_complete_with_its_instance_is_a_job_in_the_same_transaction(
    ledger: Ledger, tmp_path: Path
) -> None:
    instance = an_instance()
    receive(ledger, instance, wanted(instance, Per.INSTANCE, priority=Priority.STAT, budget_s=5))
    job = claimed(ledger)
    assert job.priority is Priority.STAT
    assert job.deadline_at - job.ready_at == pytest.approx(5, abs=1e-6)
    assert rows(tmp_path, "SELECT state, fired FROM candidate") == [("ready", "instance")]


def test_a_late_instance_opens_an_amendment_about_the_whole_unit(ledger: Ledger) -> None:
    first, late = an_instance(1), an_instance(2)
    receive(ledger, first, wanted(first, max_wait_s=0))
    make_ready(ledger, waiting(ledger)[0])
    triage = claimed(ledger)
    ledger.jobs.finish(triage, [a_result(triage)])
    receive(ledger, late, wanted(late, max_wait_s=0))
    (unit,) = waiting(ledger)
    assert unit.generation == 1
    assert make_ready(ledger, unit)
    amendment = claimed(ledger)
    assert (amendment.purpose, amendment.generation) == (Purpose.AMENDMENT, 1)
    assert amendment.instances == (first, late)
    assert [item.sop_instance_uid for item in amendment.predecessors] == [
        a_result(triage).sop_instance_uid
    ]


def test_the_second_amendment_references_the_first(ledger: Ledger) -> None:
    results = []
    for number in (1, 2, 3):
        instance = an_instance(number)
        receive(ledger, instance, wanted(instance, max_wait_s=0))
        make_ready(ledger, waiting(ledger)[0])
        job = claimed(ledger)
        assert job.generation == number - 1
        assert [item.sop_instance_uid for item in job.predecessors] == results[-1:]
        results.append(a_result(job).sop_instance_uid)
        ledger.jobs.finish(job, [a_result(job)])


def test_an_amendment_waits_for_the_answer_that_it_amends(ledger: Ledger) -> None:
    first, late = an_instance(1), an_instance(2)
    receive(ledger, first, wanted(first, max_wait_s=0))
    assert make_ready(ledger, waiting(ledger)[0])
    receive(ledger, late, wanted(late, max_wait_s=0, digest="another model since"))
    (unit,) = waiting(ledger)
    assert not make_ready(ledger, unit)
    triage = claimed(ledger)
    assert not make_ready(ledger, unit)
    ledger.jobs.finish(triage, [a_result(triage)])
    assert make_ready(ledger, unit)
    assert claimed(ledger).predecessors


def test_instances_that_come_while_an_amendment_waits_join_it(ledger: Ledger) -> None:
    first, *late = (an_instance(number) for number in (1, 2, 3))
    receive(ledger, first, wanted(first, max_wait_s=0))
    make_ready(ledger, waiting(ledger)[0])
    for instance in late:
        receive(ledger, instance, wanted(instance, max_wait_s=0))
    (unit,) = waiting(ledger)
    ledger.jobs.finish(claimed(ledger), [])
    make_ready(ledger, unit)
    assert claimed(ledger).instances == (first, *late)


def test_make_ready_is_refused_when_an_instance_came_meanwhile(ledger: Ledger) -> None:
    first, second = an_instance(1), an_instance(2)
    receive(ledger, first, wanted(first, max_wait_s=0))
    (seen,) = waiting(ledger)
    receive(ledger, second, wanted(second, max_wait_s=0))
    assert not make_ready(ledger, seen)
    assert ledger.jobs.claim(LEASE_S) is None
    (fresh,) = waiting(ledger)
    assert make_ready(ledger, fresh)
    assert len(claimed(ledger).instances) == 2


def test_make_ready_twice_makes_one_job(ledger: Ledger, tmp_path: Path) -> None:
    instance = an_instance()
    receive(ledger, instance, wanted(instance, max_wait_s=0))
    (unit,) = waiting(ledger)
    assert make_ready(ledger, unit)
    assert not make_ready(ledger, unit)
    assert rows(tmp_path, "SELECT count(*) FROM job") == [(1,)]


def test_a_held_unit_waits_for_nothing_until_another_instance_comes(ledger: Ledger) -> None:
    first, second = an_instance(1), an_instance(2)
    receive(ledger, first, wanted(first, max_wait_s=0))
    (unit,) = waiting(ledger)
    assert ledger.arrivals.hold(unit, "max_wait_s")
    assert not ledger.arrivals.hold(unit, "max_wait_s")
    assert waiting(ledger) == []
    assert ledger.arrivals.next_due_at() is None
    assert ledger.upkeep.depths().rows["held"] == 1
    receive(ledger, second, wanted(second, max_wait_s=0))
    (resumed,) = waiting(ledger)
    assert resumed.candidate_id == unit.candidate_id
    assert resumed.generation == 0
    assert resumed.first_at == resumed.last_at > unit.first_at  # its longest wait starts anew
    assert make_ready(ledger, resumed)
    assert claimed(ledger).purpose is Purpose.TRIAGE


def test_hold_is_refused_when_an_instance_came_meanwhile(ledger: Ledger) -> None:
    first, second = an_instance(1), an_instance(2)
    receive(ledger, first, wanted(first, max_wait_s=0))
    (unit,) = waiting(ledger)
    receive(ledger, second, wanted(second, max_wait_s=0))
    assert not ledger.arrivals.hold(unit, "max_wait_s")
    assert len(waiting(ledger)) == 1


@pytest.mark.parametrize(
    ("quiet_s", "max_wait_s", "sooner_s"), [(10, 60, 10), (None, 30, 30), (40, 20, 20)]
)
def test_silence_or_the_longest_wait_says_when_to_look_whichever_is_sooner(
    ledger: Ledger, quiet_s: float | None, max_wait_s: float, sooner_s: float
) -> None:
    instance = an_instance()
    before = ledger.now()
    receive(ledger, instance, wanted(instance, quiet_s=quiet_s, max_wait_s=max_wait_s))
    due = ledger.arrivals.next_due_at()
    assert due is not None
    assert before + sooner_s <= due <= ledger.now() + sooner_s


def test_each_instance_moves_the_end_of_the_silence_and_not_of_the_longest_wait(
    ledger: Ledger, tmp_path: Path
) -> None:
    for number in (1, 2):
        instance = an_instance(number)
        receive(ledger, instance, wanted(instance, quiet_s=10, max_wait_s=60))
        receive(ledger, instance, wanted(instance, quiet_s=10, max_wait_s=60))  # a duplicate: no
    ((first_at, last_at, fire_at),) = rows(
        tmp_path, "SELECT first_at, last_at, fire_at FROM candidate"
    )
    assert isinstance(first_at, float)
    assert isinstance(last_at, float)
    assert first_at < last_at
    assert fire_at == last_at + 10


def test_look_again_puts_a_unit_off(ledger: Ledger) -> None:
    instance = an_instance()
    receive(ledger, instance, wanted(instance, max_wait_s=0))
    (unit,) = waiting(ledger)
    at = ledger.now() + 1000
    ledger.arrivals.look_again(unit, at)
    assert waiting(ledger) == []
    assert ledger.arrivals.next_due_at() == at


def test_a_released_association_gives_the_units_that_it_held(ledger: Ledger) -> None:
    transfer = ledger.arrivals.open_transfer(SENDER, LEASE_S)
    for series in (1, 2):
        instance = an_instance(series=series)
        receive(ledger, instance, wanted(instance), transfer=transfer)
    before = ledger.now()
    units = ledger.arrivals.close_transfer(transfer, is_released=True)
    assert [unit.unit.series_instance_uid for unit in units] == ["1.2.1.1", "1.2.1.2"]
    for unit in units:
        assert unit.open_transfers == 0
        assert not unit.has_abnormal_end
        assert unit.last_end_at is not None
        assert before <= unit.last_end_at <= ledger.now()


def test_units_of_an_ended_association_go_on_even_if_the_receiver_dies_at_once(
    ledger: Ledger,
) -> None:
    transfer = ledger.arrivals.open_transfer(SENDER, LEASE_S)
    instance = an_instance()
    receive(ledger, instance, wanted(instance, max_wait_s=3600), transfer=transfer)
    assert waiting(ledger) == []
    ledger.arrivals.close_transfer(transfer, is_released=True)
    # whoever looks next finds them due; nobody waits for max_wait_s
    assert len(waiting(ledger)) == 1


def test_another_open_association_still_holds_the_unit(ledger: Ledger) -> None:
    one, two = (ledger.arrivals.open_transfer(SENDER, LEASE_S) for _ in range(2))
    for number, transfer in ((1, one), (2, two)):
        instance = an_instance(number)
        receive(ledger, instance, wanted(instance), transfer=transfer)
    (unit,) = ledger.arrivals.close_transfer(one, is_released=True)
    assert unit.open_transfers == 1
    (unit,) = ledger.arrivals.close_transfer(two, is_released=True)
    assert unit.open_transfers == 0


def test_an_abort_is_told_and_is_not_turned_into_a_release(ledger: Ledger, tmp_path: Path) -> None:
    transfer = ledger.arrivals.open_transfer(SENDER, LEASE_S)
    instance = an_instance()
    receive(ledger, instance, wanted(instance), transfer=transfer)
    (unit,) = ledger.arrivals.close_transfer(transfer, is_released=False)
    assert unit.has_abnormal_end
    ledger.arrivals.close_transfer(transfer, is_released=True)
    assert rows(tmp_path, "SELECT state FROM transfer") == [("aborted",)]


def test_associations_of_a_dead_receiver_are_lost_and_their_units_looked_at(
    ledger: Ledger, tmp_path: Path
) -> None:
    dead = ledger.arrivals.open_transfer(SENDER, OVER)
    alive = ledger.arrivals.open_transfer(SENDER, LEASE_S)
    for number, transfer in ((1, dead), (2, alive)):
        instance = an_instance(number, series=number)
        receive(ledger, instance, wanted(instance), transfer=transfer)
    assert ledger.arrivals.lose_transfers() == 1
    (unit,) = waiting(ledger)
    assert (unit.open_transfers, unit.has_abnormal_end) == (0, True)
    assert rows(tmp_path, "SELECT state FROM transfer") == [("lost",), ("open",)]
    assert ledger.arrivals.lose_transfers() == 0


def test_a_renewed_association_is_not_lost(ledger: Ledger) -> None:
    transfer = ledger.arrivals.open_transfer(SENDER, OVER)
    ledger.arrivals.renew_transfers([transfer], LEASE_S)
    ledger.arrivals.renew_transfers([], LEASE_S)
    assert ledger.arrivals.lose_transfers() == 0


def test_a_lost_association_is_not_renewed_back_to_life(ledger: Ledger, tmp_path: Path) -> None:
    transfer = ledger.arrivals.open_transfer(SENDER, OVER)
    ledger.arrivals.lose_transfers()
    ledger.arrivals.renew_transfers([transfer], LEASE_S)
    assert rows(tmp_path, "SELECT state FROM transfer") == [("lost",)]

"""What the ledger shows to people."""

from __future__ import annotations

from dataclasses import replace

from dicom_xai.ledger import Ledger
from tests.make.ledger import SENDER, a_job, a_request, a_result, an_instance, outgoing, receive


def test_a_study_can_be_asked_for_by_any_of_its_uids(ledger: Ledger) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)], "half done")
    instance = an_instance()
    for uid in (
        instance.study_instance_uid,
        instance.series_instance_uid,
        instance.sop_instance_uid,
    ):
        found, unit, delivery = ledger.views.why(uid)
        assert found["disposition"] == "routed"
        assert (unit["job_state"], unit["note"], unit["fired"]) == ("done", "half done", "instance")
        assert (delivery["destination"], delivery["state"]) == ("pacs", "pending")
    (delivery,) = ledger.views.why(a_result(job).sop_instance_uid)
    assert delivery["kind"] == "sc"
    assert ledger.views.why("1.2.999") == []


def test_views_list_the_newest_first_and_by_state(ledger: Ledger) -> None:
    done, running = a_job(ledger, 1), a_job(ledger, 2)
    ledger.jobs.finish(done, [a_result(done)])
    assert [row["id"] for row in ledger.views.jobs()] == [running.job_id, done.job_id]
    assert [row["id"] for row in ledger.views.jobs(("done",))] == [done.job_id]
    assert ledger.views.deliveries(("dead",)) == []
    assert [row["kind"] for row in ledger.views.deliveries(("pending",))] == ["sc"]
    assert [row["state"] for row in ledger.views.study("1.2.1")] == ["done", "running"]


def test_promises_are_shown_in_both_directions(ledger: Ledger) -> None:
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    ledger.deliveries.sent(outgoing(ledger), 0, wants_commitment=True)
    ledger.commitments.ask("pacs", lambda _: 60.0)
    a_request(ledger)
    assert [(row["asked"], row["peer"], row["state"]) for row in ledger.views.commitments()] == [
        ("by us", "pacs", "asked"),
        ("of us", "MODALITY", "owed"),
    ]


def test_what_is_quarantined_is_shown_with_what_it_contradicts(ledger: Ledger) -> None:
    for number in (1, 2):
        receive(ledger, an_instance(number))
    assert ledger.views.quarantined() == []
    later = replace(SENDER, calling_ae_title="SHIP")
    for content in ("other", "a third"):
        receive(ledger, replace(an_instance(1, content=content), sender=later))
    found = ledger.views.quarantined()
    assert ledger.upkeep.depths().quarantined == len(found) == 2
    for row in found:
        assert row["sop_instance_uid"] == an_instance(1).sop_instance_uid
        assert (row["calling_ae_title"], row["first_calling_ae_title"]) == ("SHIP", "PACS")
        assert str(row["first_received_utc"]) < str(row["received_utc"])
    assert found[0]["received_utc"] > found[1]["received_utc"]  # type: ignore[operator]

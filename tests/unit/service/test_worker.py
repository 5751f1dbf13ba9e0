"""The worker goes on when the end of a job cannot be written down, and so does the job."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from dicom_xai.encode.objects import Encoded
from dicom_xai.errors import (
    DeviceBusyError,
    LedgerBusyError,
    OutOfResourcesError,
    StudyError,
    TransientError,
)
from dicom_xai.ledger import Ledger, engine
from dicom_xai.service import answers
from dicom_xai.service.role import Context
from dicom_xai.service.worker import MAX_ATTEMPTS, Worker
from dicom_xai.study import ObjectKind, Per
from tests.make.books import rows, wait_until
from tests.make.config_files import Folder
from tests.make.ledger import LEASE_S, OVER, an_instance, change, receive, url_in, wanted
from tests.make.studies import a_radiograph

#: More than any disk has.
ALL_OF_IT = 10**18
NO_ROOM = TransientError("no room")


@pytest.fixture
def files(files: Folder) -> Folder:
    """With its one route off, so that no model is loaded."""
    files.spoil("routes.yaml", "trigger: instance", "trigger: instance\n    enabled: false")
    return files


@pytest.mark.promise("D5")
def test_a_note_that_finds_no_room_is_made_later_and_the_worker_goes_on(
    context: Context, tmp_path: Path
) -> None:
    receive_for(context, context.config.routes.routes[0].name)
    context.spool.keep_free(ALL_OF_IT)
    worker = Worker(context, "cpu")
    worker.start()
    try:
        wait_until(lambda: "no room" in str(the_job(tmp_path)["note"]), "given back")
        worker.tick()
        assert the_job(tmp_path)["state"] == "queued"
        context.spool.keep_free(0)
        wait_until(lambda: the_job(tmp_path)["state"] == "failed", "answered")
    finally:
        worker.stop(10.0)
    assert [row["kind"] for row in rows(tmp_path, "SELECT kind FROM result")] == ["note"]


@pytest.mark.promise("P6")
def test_a_job_whose_note_cannot_be_made_either_ends_after_as_many_attempts_as_any(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "RETRY_S", 0.0)
    receive_for(context, "a-route")
    # neither model nor image are to be had, and nobody expected that there is no image
    change(tmp_path, "DELETE FROM candidate_instance")
    worker = Worker(context, "cpu")
    worker.start()
    try:
        wait_until(lambda: the_job(tmp_path)["state"] == "failed", "answered")
        worker.tick()
    finally:
        worker.stop(10.0)
    [job] = rows(tmp_path, "SELECT attempts, note FROM job")
    assert job["attempts"] == MAX_ATTEMPTS + 1  # the last one is there to say so
    assert str(job["note"]).startswith(f"{MAX_ATTEMPTS} attempts ended without a result")
    assert "IndexError" in str(job["note"])
    assert rows(tmp_path, "SELECT kind FROM result") == []
    counted = context.metrics.registry.get_sample_value
    name = {"route": "a-route"}
    assert counted("dicom_xai_studies_total", {**name, "outcome": "StudyError"}) == 1
    assert counted("dicom_xai_results_skipped_total", {**name, "kind": "note"}) == 1


def test_a_job_whose_route_another_version_wrote_ends_at_once_with_a_reason(
    context: Context, tmp_path: Path
) -> None:
    instance = an_instance()
    receive(context.ledger, instance, wanted(instance, Per.INSTANCE))
    worker = Worker(context, "cpu")
    worker.start()
    try:
        wait_until(lambda: the_job(tmp_path)["state"] == "failed", "answered")
    finally:
        worker.stop(10.0)
    assert rows(tmp_path, "SELECT attempts FROM job") == [{"attempts": 1}]


@pytest.mark.promise("D5")
def test_what_waits_for_room_for_days_is_tried_again_within_a_minute_of_it(
    context: Context, tmp_path: Path
) -> None:
    instance = an_instance()
    receive(context.ledger, instance, wanted(instance, Per.INSTANCE))
    job = context.ledger.jobs.claim(LEASE_S)
    assert job is not None
    change(tmp_path, "UPDATE job SET token = 5000")
    answers.Answers(context).later(replace(job, token=5_000), NO_ROOM)
    waits_until = context.ledger.jobs.next_at()
    assert waits_until is not None
    assert 59.0 < waits_until - context.ledger.now() <= 60.0  # a second for a busy machine


@pytest.mark.promise("D5")
def test_hours_without_room_use_up_no_attempt_and_the_pause_grows_to_a_minute(
    context: Context, tmp_path: Path
) -> None:
    told = answers.Answers(context)
    pauses = [given_back(context, told, tmp_path, NO_ROOM) for _ in range(120)]  # two hours
    assert pauses[:7] == pytest.approx([0.5, 1, 2, 4, 8, 16, 32], abs=0.4)
    assert pauses[7:] == pytest.approx([60.0] * 113, abs=1.0)
    [job] = rows(tmp_path, "SELECT attempts, state, note FROM job")
    assert job == {"attempts": 0, "state": "queued", "note": "no room"}


@pytest.mark.promise("P6")
def test_what_nobody_foresaw_uses_up_attempts_and_so_does_a_device_that_is_full_for_an_hour(
    context: Context, tmp_path: Path
) -> None:
    told = answers.Answers(context)
    full = DeviceBusyError("cuda:0 has no memory for 1 images")
    for error, attempts in ((full, 0), (KeyError("x"), 1), (full, 1)):
        given_back(context, told, tmp_path, error)
        assert rows(tmp_path, "SELECT attempts FROM job") == [{"attempts": attempts}]
    change(tmp_path, f"UPDATE job SET token = {answers.DEVICE_TRIES}")
    for error, attempts in ((NO_ROOM, 1), (full, 2)):
        given_back(context, told, tmp_path, error)
        assert rows(tmp_path, "SELECT attempts FROM job") == [{"attempts": attempts}]


@pytest.mark.promise("D5")
def test_a_job_that_waited_for_room_often_ends_as_it_would_have_at_first(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "RETRY_S", 0.0)
    receive_for(context, context.config.routes.routes[0].name)
    context.spool.keep_free(ALL_OF_IT)
    worker = Worker(context, "cpu")
    worker.start()
    try:
        wait_until(lambda: tries(tmp_path) > 3 * MAX_ATTEMPTS, "tried often")
        context.spool.keep_free(0)
        wait_until(lambda: the_job(tmp_path)["state"] == "failed", "answered")
    finally:
        worker.stop(10.0)
    assert "attempts" not in str(the_job(tmp_path)["note"])
    assert "not loaded" in str(the_job(tmp_path)["note"])


@pytest.mark.promise("D5")
def test_a_spool_at_its_floor_refuses_images_and_still_answers_for_those_it_has(
    context: Context, tmp_path: Path
) -> None:
    receive_for(context, context.config.routes.routes[0].name)
    context.spool.keep_free(context.spool.free_bytes * 3 // 2)
    with pytest.raises(OutOfResourcesError):
        context.spool.check_room(0)
    worker = Worker(context, "cpu")
    worker.start()
    try:
        wait_until(lambda: the_job(tmp_path)["state"] == "failed", "answered")
    finally:
        worker.stop(10.0)
    assert [row["kind"] for row in rows(tmp_path, "SELECT kind FROM result")] == ["note"]
    assert tries(tmp_path) == 1


def test_a_busy_ledger_is_told_later_that_a_job_was_given_back(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive_for(context, "a-route")
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.05)
    with closing(Ledger(url_in(tmp_path))) as ledger:
        give_back_while_busy(replace(context, ledger=ledger), tmp_path)


def give_back_while_busy(context: Context, tmp_path: Path) -> None:
    job = context.ledger.jobs.claim(OVER)
    assert job is not None
    told = answers.Answers(context)
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as somebody:
        somebody.execute("BEGIN EXCLUSIVE")
        told.later(job, NO_ROOM)
        with pytest.raises(LedgerBusyError):
            told.settle()
    assert the_job(tmp_path)["state"] == "running"
    told.settle()
    told.settle()
    [row] = rows(tmp_path, "SELECT state, attempts FROM job")
    assert row == {"state": "queued", "attempts": 0}


class Huge(bytes):
    """As long as no disk is."""

    def __len__(self) -> int:
        return ALL_OF_IT


def test_results_of_which_one_finds_no_room_leave_no_file(context: Context) -> None:
    receive_for(context, "a-route")
    job = context.ledger.jobs.claim(LEASE_S)
    assert job is not None
    before = list(context.spool.entries())
    uids = ("1.2.3", "1.2.3.4", "1.2.3.5", "1.2.3.6", "1.2.840.10008.1.2.1")
    notes = [
        Encoded(ObjectKind.NOTE, ordinal, *uids, file, job.instances[0], (), ())
        for ordinal, file in enumerate((b"small", Huge()))
    ]
    with pytest.raises(TransientError, match="no room"):
        answers.Answers(context).failed(job, notes, StudyError("no model"))
    assert list(context.spool.entries()) == before


def the_job(folder: Path) -> dict[str, object]:
    [job] = rows(folder, "SELECT state, note FROM job")
    return job


def tries(folder: Path) -> int:
    """How often the only job was claimed."""
    [job] = rows(folder, "SELECT token FROM job")
    return int(str(job["token"]))


def given_back(context: Context, told: answers.Answers, folder: Path, error: Exception) -> float:
    """Claim the only job as if its time had come, and give it back; seconds until it may be."""
    if not rows(folder, "SELECT id FROM job"):
        receive_for(context, "a-route")
    change(folder, "UPDATE job SET not_before = 0")
    job = context.ledger.jobs.claim(LEASE_S)
    assert job is not None
    told.later(job, error)
    waits_until = context.ledger.jobs.next_at()
    assert waits_until is not None
    return waits_until - context.ledger.now()


def receive_for(context: Context, route: str) -> None:
    """An image that a route wants whose model is not loaded any more."""
    file = a_radiograph().files[0]
    stored = replace(an_instance(), spool_key=context.spool.put([file]), size_bytes=len(file))
    want = wanted(stored, Per.INSTANCE, route=route, digest="not loaded any more")
    written = context.config.routes.routes[0].model_dump_json(by_alias=True, exclude_none=True)
    receive(context.ledger, stored, replace(want, route_json=written))

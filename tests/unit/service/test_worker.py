"""The worker goes on when the end of a job cannot be written down, and so does the job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dicom_xai.service import answers
from dicom_xai.service.role import Context
from dicom_xai.service.worker import MAX_ATTEMPTS, Worker
from dicom_xai.study import Per
from tests.make.books import rows, wait_until
from tests.make.config_files import Folder
from tests.make.ledger import LEASE_S, an_instance, change, receive, wanted
from tests.make.studies import a_radiograph

#: More than any disk has.
ALL_OF_IT = 10**18


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
    answers.Answers(context).later(replace(job, attempts=5_000), "no room")
    waits_until = context.ledger.jobs.next_at()
    assert waits_until is not None
    assert 59.0 < waits_until - context.ledger.now() <= 60.0  # a second for a busy machine


def the_job(folder: Path) -> dict[str, object]:
    [job] = rows(folder, "SELECT state, note FROM job")
    return job


def receive_for(context: Context, route: str) -> None:
    """An image that a route wants whose model is not loaded any more."""
    file = a_radiograph().files[0]
    stored = replace(an_instance(), spool_key=context.spool.put([file]), size_bytes=len(file))
    want = wanted(stored, Per.INSTANCE, route=route, digest="not loaded any more")
    written = context.config.routes.routes[0].model_dump_json(by_alias=True, exclude_none=True)
    receive(context.ledger, stored, replace(want, route_json=written))

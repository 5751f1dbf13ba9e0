"""A disk that takes writes and does not keep them: fsync fails below a whole service."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dicom_xai.demo.site import Site
from dicom_xai.errors import DestinationUnavailableError
from tests.make.books import (
    check_nothing_lost_or_doubled,
    metric,
    rows,
    wait_for_jobs,
    wait_until,
    wait_until_idle,
)
from tests.make.command import Running
from tests.make.disk import build_shim, failing_syncs, watching
from tests.make.studies import a_radiograph, study_of


@pytest.fixture
def watched(new_site: Callable[..., Site], tmp_path: Path) -> Iterator[tuple[Site, Running]]:
    """A service whose disk can be told to fail."""
    site = new_site()
    site.pacs.start()
    site.write_config()
    environment = watching(build_shim(tmp_path), site.folder)
    running = Running(site, environment=environment).wait_until_ready()
    yield site, running
    running.stop()


def answer(site: Site, file: bytes) -> int:
    """The status of one C-STORE; 0xA700 where nobody answered it with success."""
    try:
        return site.send([file])[0]
    except DestinationUnavailableError:  # a role that begins again listens a moment later
        return 0xA700


@pytest.mark.promise("D4")
@pytest.mark.peers("cc")
@pytest.mark.parametrize("reason", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize(
    ("word", "metric_reason"),
    [("/spool/", "spool-broken"), ("ledger.db", "not-durable")],
    ids=["spool", "ledger"],
)
def test_what_cannot_be_synced_is_refused_and_afterwards_taken_without_a_human(
    watched: tuple[Site, Running], word: str, metric_reason: str, reason: int
) -> None:
    site, running = watched
    acknowledged = {}
    first, lost, last = a_radiograph(), a_radiograph(), a_radiograph()
    assert site.send(first.files) == [0x0000]
    acknowledged[str(first.datasets[0].SOPInstanceUID)] = first.files[0]
    wait_for_jobs(site, study_of(first))
    before = running.role_process("receiver")
    with failing_syncs(site.folder, word, reason):
        assert [answer(site, lost.files[0]) for _ in range(3)] == [0xA700] * 3
        missing = "receiver" if word == "/spool/" else "ledger: the ledger did not take a write"
        wait_until(lambda: missing in site.http("readyz")[1], "it is not ready, and says why")
        assert not rows(
            site.folder,
            "SELECT id FROM instance WHERE study_instance_uid = ?",
            study_of(lost),
        )  # no row, so no success could have been answered
        refused = "dicom_xai_instances_refused_total"
        wait_until(lambda: metric(site, refused, reason=metric_reason) >= 1, "the metric says why")
        if word == "/spool/":
            wait_until(
                lambda: metric(site, "dicom_xai_role_restarts_total", role="receiver") >= 1,
                "the role that cannot trust its disk begins again",
            )
    for phantom in (lost, last):
        wait_until(lambda p=phantom: answer(site, p.files[0]) == 0x0000, "it is taken again")
        acknowledged[str(phantom.datasets[0].SOPInstanceUID)] = phantom.files[0]
    wait_until(lambda: site.http("readyz")[0] == 200, "it is ready again")
    wait_until_idle(site.folder)
    units = {study_of(phantom) for phantom in (first, lost, last)}
    after = running.role_process("receiver")
    assert (after == before) is (word != "/spool/")
    check_nothing_lost_or_doubled(site.folder, site.pacs, acknowledged, units)

"""Kill -9 at every arrow: nothing acknowledged is lost, made twice or left lying.

A role dies at an exact system call, which strace's fault injection does without touching the code;
the call itself is not made. Counted for each thread: an association's own thread writes the spool,
commits and answers. What was written and not synced outlives the process, not the
machine: a death before a commit's sync is one after the commit, before anybody is told.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.phantom import Phantom
from dicom_xai.demo.site import Site
from dicom_xai.errors import DestinationUnavailableError
from tests.make.books import (
    check_nothing_lost_or_doubled,
    rows,
    wait_until,
    wait_until_idle,
)
from tests.make.command import DeathAt, Running
from tests.make.studies import a_head, a_radiograph, study_of

#: Far below the 60 s after which a waiting unit would go on by itself.
RECOVERY_S = 30.0


class Ward:
    """Three roles, each started alone, and what their sender was told."""

    def __init__(self, site: Site) -> None:
        self.site = site
        site.pacs.start()
        site.write_config()
        self.roles = {role: Running(site, role) for role in ("receiver", "worker", "sender")}
        for role in self.roles.values():
            role.wait_until_ready()
        self.acknowledged: dict[str, bytes] = {}
        self.units: set[str] = set()

    def send(self, phantom: Phantom) -> None:
        """Send a study; a receiver that dies leaves the rest unsent."""
        note_answers(self.site, phantom, self.acknowledged, self.units)

    def kill_at(self, role: str, calls: str, when: int, folder: Path, study: Phantom) -> None:
        """Send a study while a role dies at that call, start the role again, wait until idle."""
        process = self.roles[role].process
        death = DeathAt(process.pid, calls, when, folder)
        try:
            self.send(study)
            wait_until(
                lambda: process.poll() is not None, f"{role} reaches {calls} {when}", RECOVERY_S
            )
        finally:
            death.let_go()
        assert process.returncode == -9
        self.roles[role] = Running(self.site, role).wait_until_ready()
        # an object whose answer never came is sent again, as every sender does, and no other
        self.send(study)
        wait_until_idle(self.site.folder, RECOVERY_S)

    def check(self) -> None:
        check_nothing_lost_or_doubled(
            self.site.folder, self.site.pacs, self.acknowledged, self.units
        )

    def stop(self) -> None:
        for role in self.roles.values():
            role.stop()


def note_answers(
    site: Site, phantom: Phantom, acknowledged: dict[str, bytes], units: set[str]
) -> None:
    """Send what of a study is not acknowledged yet, and write down what is now."""
    scu = StorageSCU("service", site.address())
    try:
        for ds, file in zip(phantom.datasets, phantom.files, strict=True):
            uid = str(ds.SOPInstanceUID)
            if uid not in acknowledged and scu.send(file).status == 0x0000:
                acknowledged[uid] = file
                units.add(study_of(phantom))
    except DestinationUnavailableError:
        return  # it died; the rest is for another time
    finally:
        scu.close()


@pytest.fixture(scope="module")
def ward(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    from tests.flow.conftest import ROUTES_TO_PACS

    folder = tmp_path_factory.mktemp("ward")
    site = Site(folder / "site", models=models, routes=ROUTES_TO_PACS)
    made = Ward(site)
    yield made
    made.stop()
    site.pacs.stop()


@pytest.mark.promise("D2")
@pytest.mark.peers("strace")
@pytest.mark.parametrize(
    ("calls", "when"),
    [
        pytest.param("rename", 1, id="before the file has its name"),
        pytest.param("fsync", 1, id="before the file is synced"),
        pytest.param("fsync", 2, id="before the folder is synced"),
        pytest.param("fdatasync", 1, id="before the transfer is known"),
        pytest.param("fdatasync", 2, id="before the instance is known"),
        pytest.param("fdatasync", 3, id="before the second instance is known"),
        pytest.param("sendto", 2, id="before the answer"),
        pytest.param("sendto", 3, id="before the second answer"),
        pytest.param("fdatasync", 6, id="before the release is known"),
        pytest.param("fdatasync", 7, id="before the unit is ready"),
    ],
)
def test_receiver_killed(ward: Ward, tmp_path: Path, calls: str, when: int) -> None:
    ward.kill_at("receiver", calls, when, tmp_path, a_head(4))
    ward.check()


@pytest.mark.promise("D2")
@pytest.mark.promise("G3")
@pytest.mark.peers("strace")
@pytest.mark.parametrize(
    ("calls", "when"),
    [
        pytest.param("fdatasync", 1, id="before the claim is known"),
        pytest.param("fdatasync", 2, id="before the explainer is fixed"),
        pytest.param("fsync", 1, id="before the first result is synced"),
        pytest.param("rename", 2, id="before the second result has its name"),
        pytest.param("fdatasync", 3, id="before the job is done"),
    ],
)
def test_worker_killed(ward: Ward, tmp_path: Path, calls: str, when: int) -> None:
    ward.kill_at("worker", calls, when, tmp_path, a_radiograph())
    ward.check()


@pytest.mark.promise("D2")
@pytest.mark.promise("D3")
@pytest.mark.peers("strace")
@pytest.mark.parametrize(
    ("calls", "when"),
    [
        pytest.param("sendto", 1, id="before the association is asked for"),
        pytest.param("fdatasync", 1, id="before the claim is known"),
        pytest.param("sendto", 2, id="in the middle of the first object"),
        pytest.param("fdatasync", 2, id="after the send, before it is known"),
        pytest.param("fdatasync", 4, id="after the second send, before it is known"),
    ],
)
def test_sender_killed(ward: Ward, tmp_path: Path, calls: str, when: int) -> None:
    received, held = ward.site.pacs.received, len(ward.site.pacs.kept)
    ward.kill_at("sender", calls, when, tmp_path, a_radiograph())
    ward.check()
    resent = (ward.site.pacs.received - received) - (len(ward.site.pacs.kept) - held)
    # the PACS had it already, and got the same bytes again
    assert resent == (1 if calls == "fdatasync" and when in (2, 4) else 0)


@pytest.mark.promise("D2")
def test_supervisor_killed_takes_its_roles_along_and_a_new_one_recovers(
    new_site: Callable[..., Site],
) -> None:
    site = new_site()
    site.pacs.start()
    site.write_config()
    first = Running(site).wait_until_ready()
    kin = first.family()[1:]
    # three roles, and below the worker its decoding processes
    assert len([each for each in kin if each.ppid() == first.process.pid]) == 3
    acknowledged: dict[str, bytes] = {}
    units: set[str] = set()
    studies = [a_radiograph("CR", ("PA",) * 4), a_head(6), a_radiograph()]
    for phantom in studies:
        note_answers(site, phantom, acknowledged, units)
    first.kill()
    wait_until(lambda: not any(each.is_running() for each in kin), "all go by themselves")
    second = Running(site).wait_until_ready()
    try:
        note_answers(site, a_radiograph(), acknowledged, units)
        wait_until_idle(site.folder)
        check_nothing_lost_or_doubled(site.folder, site.pacs, acknowledged, units)
        assert len(units) == 4

        # and all at once, while work is under way
        for phantom in (a_radiograph("CR", ("PA",) * 4), a_head(6)):
            note_answers(site, phantom, acknowledged, units)
        for process in second.family():
            process.kill()
        second.process.wait()
        third = Running(site).wait_until_ready()
        try:
            wait_until_idle(site.folder)
            check_nothing_lost_or_doubled(site.folder, site.pacs, acknowledged, units)
            assert len(units) == 6
        finally:
            assert third.stop() == 0
    finally:
        second.stop()


@pytest.mark.promise("D2")
@pytest.mark.promise("D3")
def test_roles_killed_at_random_moments_lose_nothing(new_site: Callable[..., Site]) -> None:
    site = new_site()
    site.pacs.start()
    site.write_config()
    service = Running(site).wait_until_ready()
    rng = random.Random(20261123)
    acknowledged: dict[str, bytes] = {}
    units: set[str] = set()
    studies = [a_radiograph() if rng.random() < 0.7 else a_head(4) for _ in range(12)]
    try:
        for number, phantom in enumerate(studies):
            note_answers(site, phantom, acknowledged, units)
            if number % 4 == 3:
                role = ("receiver", "sender", "worker")[number // 4]
                process = service.role_process(role)
                assert process is not None
                process.kill()
        # what was refused or lost with its association is sent again, as senders do
        for phantom in studies:
            wait_until(
                lambda each=phantom: _is_taken(site, each, acknowledged, units),
                "every study is acknowledged",
            )
        wait_until_idle(site.folder)
        check_nothing_lost_or_doubled(site.folder, site.pacs, acknowledged, units)
        assert len(units) == len(studies)
        assert rows(site.folder, "SELECT * FROM job WHERE state = 'failed'") == []
    finally:
        assert service.stop() == 0


def _is_taken(
    site: Site, phantom: Phantom, acknowledged: dict[str, bytes], units: set[str]
) -> bool:
    note_answers(site, phantom, acknowledged, units)
    return all(str(ds.SOPInstanceUID) in acknowledged for ds in phantom.datasets)

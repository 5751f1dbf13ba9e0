"""Somebody sets the wall clock by an hour while a study comes, is worked on, waits to be sent.

The clock is a shim of our own (`tests/make/clock.c`) and not Debian's libfaketime 0.9.10. Told to
leave the monotonic clocks alone, as a clock that is set does, that lets clock_nanosleep fail with
EINVAL, so Python's `time.sleep` raises; without, `threading.Event.wait` with a timeout never ends.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.site import Site
from tests.chaos.account import Counts, check_round, check_site, sends_of
from tests.flow.conftest import ROUTES_TO_PACS
from tests.make.books import rows, wait_until, wait_until_idle
from tests.make.command import Running
from tests.make.disk import build_shim, clock_of, watching
from tests.make.scripted_peer import ScriptedPeer
from tests.make.studies import a_head


@pytest.mark.promise("N8")
@pytest.mark.peers("cc")
def test_jumps_of_an_hour_either_way_break_nothing(
    new_site: Callable[..., Site], tmp_path: Path
) -> None:
    with ScriptedPeer() as pacs:
        site = new_site(destinations={"pacs": f"PACS@127.0.0.1:{pacs.port}"})
        site.write_config()
        shim = build_shim(tmp_path)
        service = Running(site, environment=watching(shim, site.folder)).wait_until_ready()
        pacs.stop()
        told = []
        for jump in ("3600", "-3600"):
            phantom = a_head(4)
            scu = StorageSCU("service", site.address())
            assert scu.send(phantom.files[0]).status == 0x0000
            clock_of(site.folder).write_text(jump)
            # on the association that stood when the clock was set
            assert [scu.send(file).status for file in phantom.files[1:]] == [0x0000] * 3
            assert scu.is_open
            scu.close()
            uids = [str(ds.SOPInstanceUID) for ds in phantom.datasets]
            told.append(dict(zip(uids, phantom.files, strict=True)))
        tried = "SELECT id FROM delivery WHERE attempts > 1 AND state = 'pending'"
        wait_until(lambda: rows(site.folder, tried), "results wait for their next try")
        clock_of(site.folder).write_text("0")
        pacs.start()
        wait_until_idle(site.folder)
        counts = Counts()
        check_round(site.folder, {"pacs": pacs}, told, sends_of(ROUTES_TO_PACS), counts)
        check_site(site.folder, {"pacs": pacs}, counts)
        # two series, one answer each: no timer fired early, no claim was lost
        assert len(rows(site.folder, "SELECT id FROM job WHERE attempts = 1")) == 2
        assert service.stop() == 0

"""A modality loses its power in the middle of a series, and so does the PACS before its answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dicom_xai.config import parse_address
from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.site import ROUTINE, Site
from tests.chaos.account import Counts, check_round, check_site, sends_of
from tests.flow.conftest import ROUTES_TO_PACS
from tests.make.books import deliveries_of, rows, wait_for_jobs, wait_until, wait_until_idle
from tests.make.cable import Cable
from tests.make.command import Running
from tests.make.scripted_peer import ScriptedPeer
from tests.make.studies import a_head, study_of


@pytest.mark.slow
@pytest.mark.promise("N6")
@pytest.mark.promise("D3")
def test_a_unit_is_decided_and_a_result_delivered_once_though_nobody_hangs_up(
    new_site: Callable[..., Site],
) -> None:
    phantom = a_head(6)
    uids = [str(ds.SOPInstanceUID) for ds in phantom.datasets]
    told = dict(zip(uids, phantom.files, strict=True))
    with ScriptedPeer() as pacs, Cable(pacs.port) as to_pacs:
        site = new_site(
            destinations={"pacs": f"PACS@127.0.0.1:{to_pacs.port}"},
            receive="  network_timeout_s: 1.0\n  max_associations: 1",
        )
        site.write_config()
        service = Running(site).wait_until_ready()
        with Cable(site.port) as to_us:
            modality = StorageSCU(
                "service", parse_address(f"{ROUTINE}@127.0.0.1:{to_us.port}", "MODALITY")
            )
            for file in phantom.files[:3]:
                assert modality.send(file).status == 0x0000
            to_us.cut()
            ended = "SELECT id FROM transfer WHERE state = 'aborted'"
            wait_until(lambda: rows(site.folder, ended), "the transfer is over")
            wait_for_jobs(site, study_of(phantom))
            # its power is back; the only place is free again
            to_pacs.cut_after(0, of_answers=True)
            assert site.send(phantom.files) == [0x0000] * 6
            wait_until(lambda: to_pacs.is_cut, "the PACS has the object and cannot answer")
            tried = [("pending", 1), ("sending", 2)]
            wait_until(
                lambda: any(
                    (row["state"], row["attempts"]) in tried
                    for row in deliveries_of(site, study_of(phantom))
                ),
                "the sender gave the attempt up",
            )
            to_pacs.mend()
            wait_for_jobs(site, study_of(phantom), 2)
            modality.close()
        wait_until_idle(site.folder)
        counts = Counts()
        check_round(site.folder, {"pacs": pacs}, [told], sends_of(ROUTES_TO_PACS), counts)
        check_site(site.folder, {"pacs": pacs}, counts)
        assert counts.duplicated == counts.lost == 0
        assert counts.resends >= 1
        assert service.stop() == 0

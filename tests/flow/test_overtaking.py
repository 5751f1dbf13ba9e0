"""STAT overtakes the routine unit in hand, between two batches on the device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from dicom_xai.demo.site import STAT, Site
from tests.make.books import jobs_of, wait_until, wait_until_idle
from tests.make.models import write_costly_model
from tests.make.studies import a_head, a_radiograph, study_of

#: Each costs the costly model many times what a radiograph costs from its first byte to its end.
_SLICES = 96
_ROUTES = """
routes:
  - name: slow
    when: {Modality: {equals: CT}}
    trigger: association_release
    model: costly-ct
    explain: [grad-cam]
    findings: 3
    send: [{object: sc, to: [pacs]}]
    budget_s: 3600
  - name: urgent
    when: {Modality: {in: [CR, DX]}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    priority: stat
    send: [{object: sc, to: [pacs]}]
    budget_s: 3600
"""


def test_a_stat_radiograph_is_done_before_the_routine_series_that_was_started_first(
    models: Path, tmp_path: Path, new_site: Callable[..., Site]
) -> None:
    own = tmp_path / "models"
    shutil.copytree(models, own)
    site = new_site(models=write_costly_model(own), routes=_ROUTES)
    site.start()
    head, chest = a_head(_SLICES), a_radiograph()
    site.send(head.files)
    wait_until(lambda: _lines(site, "job-started", "slow") == 1, "the series is in hand")
    site.send(chest.files, STAT)
    wait_until_idle(site.folder)
    [slow], [urgent] = jobs_of(site, study_of(head)), jobs_of(site, study_of(chest))
    assert (slow["state"], urgent["state"]) == ("done", "done")
    assert slow["attempts"] == urgent["attempts"] == 1
    done = [line["route"] for line in _log(site) if line["event"] == "job-done"]
    assert done == ["urgent", "slow"]


def _log(site: Site) -> list[dict[str, object]]:
    return [json.loads(line) for line in site.log.read_text().splitlines() if line[:1] == "{"]


def _lines(site: Site, event: str, route: str) -> int:
    return sum(line["event"] == event and line.get("route") == route for line in _log(site))

"""A study that will not make its deadline gets its prediction in time, and its map afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from dicom_xai.demo.site import Site
from tests.make.books import answers, jobs_of, metric, wait_until, wait_until_idle
from tests.make.models import write_costly_model
from tests.make.studies import a_head, study_of

_SLICES = 48
#: Budgets, as parts of what explaining all slices was measured to cost at start. Those that leave
#: time for the prediction and not for the map span nine tenths of that cost, since the prediction
#: costs about a tenth of it; where the span begins depends on how long everything else takes. Steps
#: of less than half the span meet it, whatever else the machine does.
_PARTS = tuple(0.4 * step for step in range(1, 25))
_ROUTE = """
  - name: part{number}
    when: {{calling_ae_title: {{equals: PART{number}}}}}
    trigger: association_release
    model: costly-ct
    explain: [grad-cam]
    findings: 3
    send: [{{object: sc, to: [pacs], slices: 2}}, {{object: seg, to: [pacs]}}]
    budget_s: {budget_s}
"""


def test_without_time_for_the_map_the_prediction_goes_first_and_one_amendment_follows(
    models: Path, tmp_path: Path, new_site: Callable[..., Site]
) -> None:
    own = tmp_path / "models"
    shutil.copytree(models, own)
    site = new_site(models=write_costly_model(own), routes=_routes([30.0 for _ in _PARTS]))
    site.start()
    whole_s = _SLICES * metric(site, "dicom_xai_model_cost_seconds", model="costly-ct")
    (site.folder / "routes.yaml").write_text(_routes([whole_s * part for part in _PARTS]))
    loaded = _loads(site)
    site.reload()
    wait_until(lambda: _loads(site) == loaded + 4, "supervisor and roles have reloaded")

    for number in range(len(_PARTS)):
        phantom = a_head(_SLICES)
        site.send(phantom.files, calling=f"PART{number}")
        wait_until_idle(site.folder)
        first, *more = jobs_of(site, study_of(phantom))
        assert first["state"] == "done"
        if first["explainer"] == "none":
            break
        assert more == []
    else:
        raise AssertionError("no budget was between the prediction's cost and the map's")
    assert "prediction first" in str(first["note"])
    [amendment] = more
    assert (amendment["purpose"], amendment["explainer"]) == ("amendment", "grad-cam")
    quick, full = _kinds(site, study_of(phantom))
    assert quick == ["sc", "sc"]  # no map, hence nothing to segment yet
    assert full == ["sc", "sc", "seg"]
    assert metric(site, "dicom_xai_degraded_total", how="prediction-first") == 1
    assert metric(site, "dicom_xai_degraded_total") == 1


def _routes(budgets_s: list[float]) -> str:
    return "routes:" + "".join(
        _ROUTE.format(number=number, budget_s=budget_s) for number, budget_s in enumerate(budgets_s)
    )


def _loads(site: Site) -> int:
    return site.log.read_text().count('"config-loaded"')


def _kinds(site: Site, study: str) -> tuple[list[str], list[str]]:
    """What came first, and what came as the amendment."""
    kinds: dict[bool, list[str]] = {False: [], True: []}
    for answer in answers(site.pacs, study):
        is_amended = "AMENDED 1" in answer.ds.SeriesDescription
        kinds[is_amended].append("seg" if answer.is_seg else "sc")
    return sorted(kinds[False]), sorted(kinds[True])

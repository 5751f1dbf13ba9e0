"""A run that never ends costs its study and some tries, never the service."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from dicom_xai.demo.phantom import to_bytes
from dicom_xai.demo.site import Site
from tests.make.books import jobs_of, metric, wait_until, wait_until_idle
from tests.make.models import write_hanging_model
from tests.make.studies import a_radiograph, study_of

_WAIT_S = 240.0
_ROUTES = """
routes:
  - name: hanging
    when: {Modality: {in: [CR, DX]}}
    trigger: instance
    model: hanging-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}]
    budget_s: 3600
"""


def nearly_white(file: bytes) -> bytes:
    ds = dcmread(BytesIO(file))
    shape, top = (ds.Rows, ds.Columns), 2**ds.BitsStored - 1
    white = np.full(shape, top if ds.PhotometricInterpretation == "MONOCHROME2" else 0, np.uint16)
    white[: ds.Rows // 50] = top - white[0, 0]
    ds.PixelData = white.tobytes()
    for keyword in ("WindowCenter", "WindowWidth"):
        if keyword in ds:
            delattr(ds, keyword)
    return to_bytes(ds)


@pytest.mark.slow
@pytest.mark.promise("G4")
@pytest.mark.promise("P6")
def test_a_run_that_never_ends_is_given_up_with_its_reason_and_the_next_study_is_done(
    models: Path, tmp_path: Path, new_site: Callable[..., Site]
) -> None:
    own = tmp_path / "models"
    shutil.copytree(models, own)
    site = new_site(
        models=write_hanging_model(own), routes=_ROUTES, settings={"work": "  hang_s: 2"}
    )
    site.start()
    bad, good = a_radiograph(), a_radiograph()
    site.send([nearly_white(file) for file in bad.files])
    wait_until(lambda: '"worker-wedged"' in site.log.read_text(), "the worker was ended", _WAIT_S)
    site.send(good.files)
    wait_until_idle(site.folder, _WAIT_S)
    [job] = jobs_of(site, study_of(bad))
    assert job["state"] == "failed"
    assert "attempts ended without a result" in str(job["note"])
    [job] = jobs_of(site, study_of(good))
    assert (job["state"], job["attempts"]) == ("done", 1)
    lines = site.log.read_text().splitlines()
    ended = [line for line in lines if "job-done" in line or "job-failed" in line]
    assert '"job-done"' in ended[0]  # it did not wait for the last try of the other
    assert metric(site, "dicom_xai_role_restarts_total", role="worker") >= 1

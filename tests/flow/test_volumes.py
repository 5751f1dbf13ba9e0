"""A volume goes in by C-STORE as a PACS sends it; what comes out lies on the right slices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydicom.uid import SecondaryCaptureImageStorage, SegmentationStorage

from dicom_xai.demo.site import Site
from tests.flow.conftest import ONE_THREAD
from tests.make.books import Answer, answers, wait_for_jobs
from tests.make.models import SEGMENTERS, write_segmenters
from tests.make.studies import BallStudy, a_ball_study

ROUTE = """
  - name: {model}
    when: {{Modality: {{equals: CT}}, calling_ae_title: {{equals: {sender}}}}}
    per: study
    trigger: association_release
    quiet_s: 0.5
    model: {model}
    explain: [grad-cam]
    send: [{{object: sc, to: [pacs], slices: 3}}, {{object: seg, to: [pacs]}}]
    budget_s: 30
"""
SENDERS = {"brighter-3d": "SOLID", "brighter-slices": "SLICES"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("volumes")
    models = write_segmenters(folder / "models")
    routes = "routes:" + "".join(
        ROUTE.format(model=name, sender=SENDERS[name]) for name in SEGMENTERS
    )
    with Site(folder / "site", routes=routes, models=models, environment=ONE_THREAD) as site:
        yield site


@pytest.mark.parametrize("model", list(SEGMENTERS))
def test_an_oblique_stack_in_reverse_comes_back_on_its_own_slices(site: Site, model: str) -> None:
    study = a_ball_study()
    assert set(site.send(study.files, calling=SENDERS[model])) == {0x0000}
    [job] = wait_for_jobs(site, study.study_instance_uid)
    assert job["state"] == "done", job["note"]
    assert "1 image of 1 other stack(s) left out; kept the one of 25" in str(job["note"])
    assert "1 image at the position of another left out" in str(job["note"])
    found = answers(site.pacs, study.study_instance_uid)
    pictures = [each for each in found if each.ds.SOPClassUID == SecondaryCaptureImageStorage]
    [region] = [each for each in found if each.ds.SOPClassUID == SegmentationStorage]
    areas = {uid: int(mask.sum()) for uid, mask in study.truth.items()}
    assert len(pictures) == 3
    for picture in pictures:
        [source] = picture.ds.SourceImageSequence
        assert areas[str(source.ReferencedSOPInstanceUID)] > 0.8 * max(areas.values())
    check_region(region, study)


def check_region(region: Answer, study: BallStudy) -> None:
    """Each frame refers to the slice that it lies on, and covers what the ball covers there."""
    masks = region.ds.pixel_array.astype(bool)
    seen = set()
    overlap = total = 0
    for mask, item in zip(masks, region.ds.PerFrameFunctionalGroupsSequence, strict=True):
        [derivation] = item.DerivationImageSequence
        [source] = derivation.SourceImageSequence
        uid = str(source.ReferencedSOPInstanceUID)
        assert uid not in study.strays
        truth = study.truth[uid]
        overlap += int((mask & truth).sum())
        total += int(mask.sum()) + int(truth.sum())
        seen.add(uid)
    missed = sum(int(mask.sum()) for uid, mask in study.truth.items() if uid not in seen)
    # the model's cells are 5 to 6 mm wide, the ball's radius is 25 mm
    assert 2 * overlap / (total + missed) > 0.85


def test_a_study_with_a_localizer_alone_fails_with_its_reason(site: Site) -> None:
    study = a_ball_study()
    [localizer] = [file for file in study.files if b"LOCALIZER" in file]
    site.send([localizer], calling=SENDERS["brighter-3d"])
    [job] = wait_for_jobs(site, study.study_instance_uid)
    assert job["state"] == "failed"
    assert "at least 2" in str(job["note"])

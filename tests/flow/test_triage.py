"""A study goes in by C-STORE; Secondary Capture and Segmentation come out at the PACS."""

from __future__ import annotations

from collections import Counter

from pydicom.uid import SecondaryCaptureImageStorage, SegmentationStorage

from dicom_xai import identity
from dicom_xai.demo.site import STAT, Site
from tests.make.books import Answer, answers, deliveries_of, jobs_of, metric, wait_for_jobs
from tests.make.studies import a_head, a_radiograph, study_of


def test_a_radiograph_comes_back_as_picture_and_segmentation_of_the_same_patient(
    site: Site,
) -> None:
    phantom = a_radiograph()
    [source] = phantom.files
    assert site.send([source]) == [0x0000]
    [job] = wait_for_jobs(site, study_of(phantom))
    found = answers(site.pacs, study_of(phantom))
    assert job["state"] == "done"
    assert _kinds(found) == {SecondaryCaptureImageStorage: 1, SegmentationStorage: 1}
    for answer in found:
        identity.compare(identity.read_block(source), identity.read_block(answer.file))
    sc, seg = sorted(found, key=lambda answer: answer.is_seg)
    assert sc.ds.SeriesInstanceUID != seg.ds.SeriesInstanceUID
    assert phantom.datasets[0].SeriesInstanceUID not in (
        sc.ds.SeriesInstanceUID,
        seg.ds.SeriesInstanceUID,
    )
    [referenced] = seg.ds.ReferencedSeriesSequence
    [instance] = referenced.ReferencedInstanceSequence
    assert instance.ReferencedSOPInstanceUID == phantom.datasets[0].SOPInstanceUID


def test_metrics_show_each_stage_and_no_budget_exceeded(site: Site) -> None:
    before = metric(site, "dicom_xai_triage_seconds_count", route="chest")
    stages = ("receive", "route", "queue", "decode", "infer", "explain", "encode", "outbox")
    counted = [metric(site, "dicom_xai_stage_seconds_count", stage=stage) for stage in stages]
    phantom = a_radiograph()
    site.send(phantom.files)
    wait_for_jobs(site, study_of(phantom))
    assert metric(site, "dicom_xai_triage_seconds_count", route="chest") == before + 1
    for stage, count in zip(stages, counted, strict=True):
        more = metric(site, "dicom_xai_stage_seconds_count", stage=stage)
        assert more > count, stage
    assert metric(site, "dicom_xai_budget_exceeded_total", route="chest") == 0
    text = site.http("metrics")[1]
    assert 'dicom_xai_triage_seconds_bucket{le="2.0",priority="routine",route="chest"}' in text


def test_a_negative_study_gets_a_picture_that_says_so_and_no_segmentation(site: Site) -> None:
    phantom = a_radiograph()
    site.send(phantom.files, calling="BLIND")
    [job] = wait_for_jobs(site, study_of(phantom))
    [answer] = answers(site.pacs, study_of(phantom))
    assert job["state"] == "done"
    assert answer.ds.SOPClassUID == SecondaryCaptureImageStorage
    assert "seg not made" in str(job["note"])


def test_two_views_on_one_association_are_two_jobs(site: Site) -> None:
    phantom = a_radiograph("CR", ("PA", "AP"))
    assert site.send(phantom.files) == [0x0000, 0x0000]
    jobs = wait_for_jobs(site, study_of(phantom), 2)
    assert len({job["unit_key"] for job in jobs}) == 2
    found = answers(site.pacs, study_of(phantom))
    assert _kinds(found) == {SecondaryCaptureImageStorage: 2, SegmentationStorage: 2}
    views = {str(ds.SOPInstanceUID) for ds in phantom.datasets}
    assert {_source_of(answer) for answer in found if not answer.is_seg} == views
    segs = [answer.ds.SeriesInstanceUID for answer in found if answer.is_seg]
    assert len(set(segs)) == 2  # one series each: viewers show one segmentation a series


def test_a_series_gets_its_best_slices_and_one_segmentation_of_its_frames(site: Site) -> None:
    phantom = a_head(20)
    assert set(site.send(phantom.files)) == {0x0000}
    [job] = wait_for_jobs(site, study_of(phantom))
    found = answers(site.pacs, study_of(phantom))
    assert job["state"] == "done"
    assert _kinds(found) == {SecondaryCaptureImageStorage: 3, SegmentationStorage: 1}
    slices = {str(ds.SOPInstanceUID) for ds in phantom.datasets}
    assert len({_source_of(answer) for answer in found if not answer.is_seg} & slices) == 3
    [seg] = [answer for answer in found if answer.is_seg]
    [series] = seg.ds.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == phantom.datasets[0].SeriesInstanceUID
    referenced = {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence}
    assert referenced <= slices
    assert seg.ds.NumberOfFrames <= len(slices)


def test_an_emergency_overtakes_what_waits(site: Site) -> None:
    routine = [a_radiograph("CR", ("PA",) * 6) for _ in range(2)]
    urgent = a_radiograph()
    for phantom in routine:
        site.send(phantom.files)
    site.send(urgent.files, STAT)
    wait_for_jobs(site, study_of(urgent))
    for phantom in routine:
        wait_for_jobs(site, study_of(phantom), 6)
    last_sent = max(float(str(row["sent_at"])) for row in deliveries_of(site, study_of(urgent)))
    waited = [job for each in routine for job in jobs_of(site, study_of(each))]
    later = [job for job in waited if float(str(job["triaged_at"])) > last_sent]
    # it came last of thirteen; what was under way before it may have ended before it
    assert len(later) >= 6
    assert jobs_of(site, study_of(urgent))[0]["priority"] == "stat"


def _kinds(found: list[Answer]) -> Counter[str]:
    uids = [str(answer.ds.SOPInstanceUID) for answer in found]
    assert len(set(uids)) == len(uids)
    return Counter(str(answer.ds.SOPClassUID) for answer in found)


def _source_of(answer: Answer) -> str:
    """The image that a picture was made of."""
    [source] = answer.ds.SourceImageSequence
    return str(source.ReferencedSOPInstanceUID)

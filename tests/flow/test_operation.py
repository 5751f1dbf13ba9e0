"""What ops and admins see and do: probes, reloads, shutdown."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.site import Site
from dicom_xai.explain.selftest import GRADIENT_TOLERANCE
from tests.flow.conftest import ROUTES_TO_PACS
from tests.make.books import answers, jobs_of, metric, rows, wait_for_jobs, wait_until
from tests.make.command import START_TIMEOUT_S, Running, command
from tests.make.studies import a_head, a_radiograph, study_of

#: Supervisor, receiver, worker and sender.
_WHO_RELOADS = 4


@pytest.fixture(scope="module")
def service(
    models_of_its_own: Callable[[], Site],
) -> Iterator[tuple[Site, Running, list[tuple[int, int, bool]]]]:
    """A running service, and the probes' answers while it started."""
    site = models_of_its_own()
    site.pacs.start()
    site.write_config()
    running = Running(site)
    seen: list[tuple[int, int, bool]] = []

    def is_ready() -> bool:
        ready, alive = site.http("readyz")[0], site.http("livez")[0]
        is_warm = any('"model-loaded"' in line for line in running.lines)
        seen.append((ready, alive, is_warm))
        return ready == 200

    wait_until(is_ready, "ready", START_TIMEOUT_S)
    yield site, running, seen
    running.stop()
    site.pacs.stop()


Service = tuple[Site, Running, list[tuple[int, int, bool]]]


def test_the_service_is_alive_at_once_and_ready_once_models_are_warm(service: Service) -> None:
    _, _, seen = service
    answered = [each for each in seen if each[0]]
    assert answered[0][0] == 503
    assert all(alive == 200 for _, alive, _ in answered)
    assert all(ready == 503 for ready, _, is_warm in answered if not is_warm)
    assert answered[-1] == (200, 200, True)


def test_the_log_tells_what_the_self_test_of_each_model_showed(service: Service) -> None:
    _, running, _ = service
    loaded = [json.loads(line) for line in running.lines if '"model-loaded"' in line]
    assert loaded
    for line in loaded:
        assert line["difference"] == 0
        assert 0 < line["gradient_error"] < GRADIENT_TOLERANCE
        assert line["reason"] == ""
    tried = [json.loads(line) for line in running.lines if '"methods-tried"' in line]
    assert {line["model"] for line in tried} == {line["model"] for line in loaded}
    for line in tried:
        assert list(line["does_not_apply"]) == ["gradient-attention-rollout"]


def test_each_series_is_shown_once(service: Service) -> None:
    site, _, _ = service
    lines = [line for line in site.http("metrics")[1].splitlines() if line]
    series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))
    families = [line for line in lines if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


def test_a_dead_pacs_does_not_make_the_service_unready(service: Service) -> None:
    site, _, _ = service
    phantom = a_radiograph()
    site.pacs.stop()
    try:
        assert site.send(phantom.files) == [0x0000]
        wait_until(
            lambda: metric(site, "dicom_xai_deliveries_total", outcome="transient") >= 1,
            "a failed delivery",
        )
        assert site.http("readyz")[0] == 200
        assert site.http("livez")[0] == 200
    finally:
        site.pacs.start()
    wait_for_jobs(site, study_of(phantom))
    assert len(answers(site.pacs, study_of(phantom))) == 2


@pytest.mark.promise("K5")
def test_a_role_that_was_killed_leaves_what_it_counted_and_nothing_that_it_was(
    service: Service,
) -> None:
    site, running, _ = service
    phantom = a_radiograph()
    assert site.send(phantom.files) == [0x0000]
    wait_for_jobs(site, study_of(phantom))
    devices, done = devices_of(site), metric(site, "dicom_xai_studies_total", outcome="done")
    assert done >= 1
    worker = running.role_process("worker")
    assert worker is not None
    restarts = metric(site, "dicom_xai_role_restarts_total", role="worker")
    worker.kill()
    wait_until(
        lambda: metric(site, "dicom_xai_role_restarts_total", role="worker") > restarts,
        "its end was seen",
    )
    assert devices_of(site) == []
    assert metric(site, "dicom_xai_studies_total", outcome="done") == done
    wait_until(lambda: site.http("readyz")[0] == 200, "ready", START_TIMEOUT_S)
    assert devices_of(site) == devices


def devices_of(site: Site) -> list[str]:
    page = site.http("metrics")[1].splitlines()
    return [line for line in page if line.startswith("dicom_xai_device_info")]


@pytest.mark.promise("K1")
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param("routes: [", id="no YAML"),
        pytest.param(ROUTES_TO_PACS.replace("phantom-cxr", "phantom-cxx"), id="no such model"),
        pytest.param(ROUTES_TO_PACS.replace("grad-cam", "grad-cat"), id="no such explainer"),
    ],
)
def test_a_bad_config_is_refused_and_the_old_one_goes_on(service: Service, broken: str) -> None:
    site, running, _ = service
    refused = metric(site, "dicom_xai_config_reloads_total", outcome="refused")
    routes = site.folder / "routes.yaml"
    good = routes.read_text()
    routes.write_text(broken)
    try:
        running.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: metric(site, "dicom_xai_config_reloads_total", outcome="refused") > refused,
            "refused",
        )
        phantom = a_radiograph()
        assert site.send(phantom.files) == [0x0000]
        [job] = wait_for_jobs(site, study_of(phantom))
        assert (job["route"], job["state"]) == ("chest", "done")
        assert site.http("readyz")[0] == 200
    finally:
        routes.write_text(good)


#: Files that an admin may leave behind: (file, what is changed, to what).
SPOILT = [
    *(("routes.yaml", key, f"{key}x") for key in ("when:", "trigger:", "model:", "explain:")),
    *(("routes.yaml", key, f"{key[:-1]}_:") for key in ("routes:", "send:", "- name:")),
    *(
        ("routes.yaml", "routes:", f"{line}\nroutes:")
        for line in ("match: last", "a: 1", "[", "routes: []", "tests: 1")
    ),
    *(("routes.yaml", "trigger: instance", f"trigger: {word}") for word in ("soon", "[]", "~")),
    *(("routes.yaml", "to: [pacs]", f"to: {word}") for word in ("[pasc]", "[]", "7", "{}")),
    *(("routes.yaml", "explain: [grad-cam]", f"explain: {word}") for word in ("[]", "{}", "3")),
    *(("dicom-xai.yaml", "min_free_bytes: 100000000", word) for word in ("min_free: 1", "- 1")),
    *(("dicom-xai.yaml", "devices: [auto]", f"devices: {word}") for word in ("[gpu]", "[]", "7")),
    *(
        ("dicom-xai.yaml", "ae_title: PACS", f"ae_title: {word}")
        for word in ("A_TITLE_THAT_IS_TOO_LONG", '""', "[]", '"A\\B"', "~")
    ),
    *(("dicom-xai.yaml", "type: dimse", f"type: {word}") for word in ("dicomweb", "~", "[dimse]")),
    *(("dicom-xai.yaml", "models:", word) for word in ("model:", "models: 7\nmodels:", "\tm:")),
    ("dicom-xai.yaml", "network: 127.0.0.0/8", "network: everywhere"),
    ("dicom-xai.yaml", "routes: routes.yaml", "routes: rotes.yaml"),
]


@pytest.mark.slow
@pytest.mark.promise("K1")
def test_forty_bad_configs_disturb_none_of_four_senders(service: Service) -> None:
    site, running, _ = service
    assert len(SPOILT) >= 40
    over = threading.Event()

    def send_on() -> list[int]:
        statuses = []
        while not over.wait(2.0):
            statuses += site.send(a_radiograph().files)
        return statuses

    def refused() -> float:
        return metric(site, "dicom_xai_config_reloads_total", outcome="refused")

    before, accepted = refused(), "dicom_xai_config_reloads_total"
    taken = metric(site, accepted, outcome="accepted")
    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send_on) for _ in range(4)]
        try:
            for number, (name, old, new) in enumerate(SPOILT, 1):
                path = site.folder / name
                good = path.read_text()
                assert old in good, old
                path.write_text(good.replace(old, new, 1))
                try:
                    running.process.send_signal(signal.SIGHUP)
                    wait_until(lambda: refused() == before + number, f"{new!r} is refused")  # noqa: B023
                finally:
                    path.write_text(good)
        finally:
            over.set()
        statuses = [status for sender in senders for status in sender.result()]
    assert set(statuses) == {0x0000}
    assert metric(site, accepted, outcome="accepted") == taken
    assert site.http("readyz")[0] == 200


@pytest.mark.promise("G5")
def test_a_model_that_does_not_fit_its_card_is_refused_and_the_old_one_goes_on(
    service: Service,
) -> None:
    site, running, _ = service
    refused = metric(site, "dicom_xai_config_reloads_total", outcome="refused")
    card = site.folder.parent / "models" / "phantom-cxr.yaml"
    good = card.read_text()
    card.write_text(good.replace('"version": "1.0"', '"version": "2.0"').replace("256", "128"))
    [before] = _digests(site)
    try:
        running.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: metric(site, "dicom_xai_config_reloads_total", outcome="refused") > refused,
            "refused",
        )
        phantom = a_radiograph()
        assert site.send(phantom.files) == [0x0000]
        [job] = wait_for_jobs(site, study_of(phantom))
        assert (job["model_digest"], job["state"]) == (before, "done")
    finally:
        card.write_text(good)
    _reload(site, running)


@pytest.mark.promise("K2")
def test_a_study_keeps_the_config_it_started_with_and_the_next_one_has_the_new(
    service: Service,
) -> None:
    site, running, _ = service
    old, new = a_head(5), a_head(5)
    scu = StorageSCU("service", site.address())
    try:
        assert scu.send(old.files[0]).status == 0x0000
        text = (site.folder / "routes.yaml").read_text()
        assert "slices: 3" in text
        (site.folder / "routes.yaml").write_text(text.replace("slices: 3", "slices: 1"))
        _reload(site, running)
        for file in old.files[1:]:
            assert scu.send(file).status == 0x0000
    finally:
        scu.close()
    site.send(new.files)
    for phantom, pictures in ((old, 3), (new, 1)):
        wait_for_jobs(site, study_of(phantom))
        found = answers(site.pacs, study_of(phantom))
        assert sum(not answer.is_seg for answer in found) == pictures


def test_a_retry_under_a_newer_model_amends_and_leaves_the_first_answer_alone(
    service: Service,
) -> None:
    site, running, _ = service
    phantom = a_radiograph()
    site.send(phantom.files)
    [job] = wait_for_jobs(site, study_of(phantom))
    first = [answer.file for answer in answers(site.pacs, study_of(phantom))]
    card = site.folder.parent / "models" / "phantom-cxr.yaml"
    card.write_text(card.read_text().replace('"version": "1.0"', '"version": "2.0"'))
    _reload(site, running)
    assert command(site, "ledger", "retry", str(job["id"])).returncode == 0
    wait_until(lambda: len(jobs_of(site, study_of(phantom))) == 2, "an amendment is queued")
    jobs = wait_for_jobs(site, study_of(phantom), 2)
    assert [each["state"] for each in jobs] == ["done", "done"]
    assert [each["purpose"] for each in jobs] == ["triage", "amendment"]
    assert jobs[1]["model_digest"] != job["model_digest"]
    both = answers(site.pacs, study_of(phantom))
    assert [answer.file for answer in both[:2]] == first
    assert ["AMENDED 1" in answer.ds.SeriesDescription for answer in both] == [
        *(False, False),
        *(True, True),
    ]


@pytest.mark.promise("N9")
def test_sigterm_ends_everything_with_status_0_and_frees_the_ports(service: Service) -> None:
    site, running, _ = service
    family = running.family()
    assert len(family) >= 4  # the worker has decoding processes too
    assert running.stop() == 0
    assert not any(process.is_running() for process in family)
    for port in (site.port, site.stat_port, site.http_port):
        with socket.socket() as each:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", port))


def _reload(site: Site, running: Running) -> None:
    """Ask for a reload and wait until supervisor and roles have done it."""

    def loaded() -> int:
        return sum('"config-loaded"' in line for line in running.lines)

    before = loaded()
    counted = metric(site, "dicom_xai_config_reloads_total", outcome="accepted")
    running.process.send_signal(signal.SIGHUP)
    wait_until(lambda: loaded() == before + _WHO_RELOADS, "reloaded by all")
    assert metric(site, "dicom_xai_config_reloads_total", outcome="accepted") == counted + 1


def _digests(site: Site) -> list[object]:
    """Which models chest radiographs have met."""
    query = "SELECT DISTINCT model_digest FROM job WHERE model = 'phantom-cxr'"
    return [row["model_digest"] for row in rows(site.folder, query)]

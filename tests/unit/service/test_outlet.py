"""One destination's outbox, over hours that a fake clock tells, to a real peer that was away."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from dicom_xai.config import parse_address
from dicom_xai.service.outlet import Outlet
from dicom_xai.service.role import Context, ledger_state
from dicom_xai.study import ObjectKind, Per
from dicom_xai.telemetry import LedgerCollector
from tests.make.books import wait_until
from tests.make.committing_peer import running
from tests.make.ledger import a_result, an_instance, claimed, receive, rows, wanted
from tests.make.results import as_file, header
from tests.make.scripted_peer import ScriptedPeer

STUDIES, EACH = 50, 10
HOURS = 3
RULES = Path(__file__).parents[3] / "deploy/prometheus/rules.yaml"


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass on the ledger's clock."""
    real, ahead = time.clock_gettime, [0.0]
    monkeypatch.setattr(
        time, "clock_gettime", lambda which: real(which) + ahead[0] * (which == time.CLOCK_BOOTTIME)
    )

    def go_on(seconds: float) -> None:
        ahead[0] += seconds

    return go_on


def fill(context: Context, studies: int, each: int) -> dict[str, list[str]]:
    """Results of so many studies wait for `pacs`; gives each study's, in the order of making."""
    source = context.spool.put([as_file(header())])
    made: dict[str, list[str]] = {}
    for study in range(1, studies + 1):
        arrived = replace(an_instance(study=study), spool_key=source)
        receive(context.ledger, arrived, wanted(arrived, Per.INSTANCE))
        job, results = claimed(context.ledger), []
        for ordinal in range(each):
            ds = header(number=1000 * study + ordinal)
            file, uid = as_file(ds), str(ds.SOPInstanceUID)
            result = a_result(job, ordinal, ObjectKind.SC, uid=uid, key=context.spool.put([file]))
            results.append(replace(result, sha256=hashlib.sha256(file).hexdigest()))
        context.ledger.jobs.finish(job, results)
        made[job.unit.study_instance_uid] = [result.sop_instance_uid for result in results]
    return made


def oldest_s(context: Context) -> float:
    """The outbox's age, as a scrape shows it."""
    registry = CollectorRegistry()
    registry.register(LedgerCollector(lambda: ledger_state(context.ledger, context.spool)))
    name = "dicom_xai_oldest_waiting_seconds"
    value = registry.get_sample_value(name, {"queue": "outbox"})
    assert value is not None
    return value


def alarming_s() -> float:
    """From which age on the bundled rule alerts."""
    found = re.search(r'oldest_waiting_seconds\{queue="outbox"\}\) > (\d+)', RULES.read_text())
    assert found is not None
    return float(found[1])


def put_back(folder: Path) -> int:
    """How many attempts have ended with nothing sent; the pause after each runs by then."""
    [(ended,)] = rows(folder, "SELECT sum(attempts) - sum(state = 'sending') FROM delivery")
    return int(str(ended))


@pytest.mark.slow
@pytest.mark.promise("P1")
def test_results_outlast_hours_without_a_pacs_and_go_once_each_study_in_its_order(
    context: Context, tmp_path: Path, pass_time: Callable[[float], None]
) -> None:
    made = fill(context, STUDIES, EACH)
    assert oldest_s(context) < alarming_s()
    peer = ScriptedPeer().start()
    peer.stop()
    place = parse_address(f"PACS@127.0.0.1:{peer.port}", "DICOM_XAI")
    began = context.ledger.now()
    with running(Outlet(context, "pacs", place, random.Random(1))):
        while context.ledger.now() - began < HOURS * 3600:
            before = put_back(tmp_path)
            pass_time(300.0)  # the longest pause
            context.ledger.ring("sender")
            wait_until(lambda seen=before: put_back(tmp_path) > seen, "tried again")
        assert context.ledger.upkeep.depths().outbox == {"pacs": STUDIES * EACH}
        assert oldest_s(context) >= HOURS * 3600 > alarming_s()
        peer.start()
        pass_time(300.0)
        wait_until(lambda: not context.ledger.upkeep.depths().outbox, "all are there")
    peer.stop()
    arrived = list(peer.kept)
    assert peer.received == len(arrived) == STUDIES * EACH
    for study in made.values():
        assert [uid for uid in arrived if uid in study] == study
    assert oldest_s(context) == 0


@pytest.mark.promise("P1")
def test_what_was_tried_while_a_pacs_was_away_still_goes_before_what_was_not(
    context: Context, tmp_path: Path
) -> None:
    made = fill(context, 1, 5)
    peer = ScriptedPeer().start()
    peer.stop()
    place = parse_address(f"PACS@127.0.0.1:{peer.port}", "DICOM_XAI")
    with running(Outlet(context, "pacs", place, random.Random(1))):
        wait_until(lambda: put_back(tmp_path) >= 2, "tried again")
        peer.start()
        wait_until(lambda: not context.ledger.upkeep.depths().outbox, "all are there")
    peer.stop()
    assert [list(peer.kept)] == list(made.values())

"""What is said of refusals: the first of a kind at once, few lines of a flood, none lost."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from threading import Thread

import pytest
from pydicom.uid import CTImageStorage

from dicom_xai.errors import OutOfResourcesError
from dicom_xai.service import refusals
from dicom_xai.service.refusals import Refusals
from dicom_xai.service.role import Context
from dicom_xai.study import Sender
from dicom_xai.telemetry.gathered import MOST_KINDS
from tests.make.associations import (
    Shelf,
    an_image,
    encoded,
    listening,
    negotiated,
    next_pdu,
    store_request,
    wait_until_all_have_ended,
)

SENDER = Sender("CT1", "DICOM_XAI", "10.0.0.5", 0, "127.0.0.1:11112")
FLOOD = 1_000


class Desk:
    """A receiver's refusals, with what they count and say."""

    def __init__(self, context: Context, words: io.StringIO) -> None:
        self.refusals = Refusals(context)
        self._context, self._words = context, words

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self._words.getvalue().splitlines()]

    def counts(self) -> list[int]:
        return [int(str(line["count"])) for line in self.lines()]

    def counted(self, reason: str) -> float | None:
        name = "dicom_xai_instances_refused_total"
        return self._context.metrics.registry.get_sample_value(name, {"reason": reason})


@pytest.fixture
def desk(context: Context, log: io.StringIO) -> Desk:
    return Desk(context, log)


@pytest.mark.promise("N7")
def test_a_flood_on_the_wire_is_two_lines_that_add_up_and_a_metric_that_counts_each(
    desk: Desk,
) -> None:
    class Full(Shelf):
        def refused(self, reason: str, sender: Sender, detail: str) -> None:
            desk.refusals.add(reason, sender, detail)

    ds = an_image(2, 2)
    request = store_request(encoded(ds), CTImageStorage, ds.SOPInstanceUID)
    with listening(Full(OutOfResourcesError("the spool is full"))) as scp:
        with negotiated(scp.ports[0]) as sock:
            for _ in range(FLOOD):
                sock.sendall(request)
                assert next_pdu(sock)
        wait_until_all_have_ended()
    desk.refusals.end()
    first, rest = desk.lines()
    assert (first["level"], first["event"], first["count"]) == ("warning", "instance-refused", 1)
    assert (first["reason"], first["error"]) == ("out-of-resources", "the spool is full")
    assert first["host"] == "127.0.0.1"
    assert desk.counts() == [1, FLOOD - 1]
    assert {key: rest[key] for key in ("host", "ae_title", "reason", "listener")} == {
        key: first[key] for key in ("host", "ae_title", "reason", "listener")
    }
    assert desk.counted("out-of-resources") == FLOOD


@pytest.mark.promise("N7")
def test_a_flood_from_everywhere_is_a_bounded_number_of_lines_that_add_up(desk: Desk) -> None:
    def probe(network: int) -> None:
        for number in range(FLOOD // 4):
            stranger = replace(SENDER, source_address=f"10.{network}.{number}.1")
            desk.refusals.add("not-allowed", stranger, "")

    threads = [Thread(target=probe, args=(network,)) for network in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    desk.refusals.end()
    assert sum(desk.counts()) == FLOOD
    assert len(desk.counts()) == MOST_KINDS + 2  # of the others the first, and how many more
    assert desk.lines()[-1]["host"] == "others"


def test_what_came_is_said_when_its_time_is_over_though_nothing_more_comes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        desk.refusals.add("tls", SENDER, "unknown ca")
    desk.refusals.tick()
    assert desk.counts() == [1]  # the rest is not due
    monkeypatch.setattr(refusals, "GATHER_S", 0.0)
    desk.refusals.tick()
    desk.refusals.tick()
    assert desk.counts() == [1, 2]
    desk.refusals.add("tls", SENDER, "certificate required")
    assert desk.lines()[-1]["error"] == "certificate required"


def test_kinds_differ_in_reason_and_in_who_is_refused(desk: Desk) -> None:
    for reason, sender in (
        ("not-allowed", SENDER),
        ("called-ae", SENDER),
        ("not-allowed", replace(SENDER, calling_ae_title="CT2")),
        ("not-allowed", replace(SENDER, source_address="10.0.0.6")),
    ):
        desk.refusals.add(reason, sender, "")
    assert desk.counts() == [1, 1, 1, 1]


@pytest.mark.parametrize("reason", ["not-durable", "failed", "duplicate-conflict"])
def test_where_a_person_must_act_it_is_an_error(desk: Desk, reason: str) -> None:
    for _ in range(2):
        desk.refusals.add(reason, SENDER, "what happened")
    desk.refusals.end()
    assert [line["level"] for line in desk.lines()] == ["error", "error"]


def test_what_comes_after_the_end_is_said_at_once(desk: Desk) -> None:
    desk.refusals.end()
    for _ in range(3):
        desk.refusals.add("stalled", SENDER, "")
    assert desk.counts() == [1, 1, 1]

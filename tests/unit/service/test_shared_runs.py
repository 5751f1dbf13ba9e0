"""Small routine studies share runs on the device, and none of them pays for another."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from pydicom import dcmread

from dicom_xai.explain import costs
from dicom_xai.infer.session import Device, Session
from dicom_xai.service import answers
from dicom_xai.service.role import Context
from dicom_xai.service.worker import Worker
from dicom_xai.study import Per, Priority
from tests.make.books import Row, rows, wait_until
from tests.make.config_files import MODEL, Folder
from tests.make.ledger import an_instance, change, receive, wanted
from tests.make.studies import a_radiograph, changed, header_of

Feeds = dict[str, torch.Tensor]

#: Images in one run at most, on the device of these tests.
TOGETHER = 4
#: Added to the score of a white image, where the table has a second value; else its run fails.
NOT_FINITE, NO_SUCH_ROW = (0.0, float("nan")), (0.0,)


def a_model(table: Sequence[float]) -> bytes:
    """A small classifier; a white image is looked up in the table's second row."""
    rng = np.random.default_rng(7)
    constants = {
        "kernel": rng.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "head": np.abs(rng.normal(size=(4, 1))).astype(np.float32),
        "white": np.float32(0.8),
        "table": np.array(table, np.float32),
        "column": np.array([-1, 1]),
    }
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["edges"]),
        helper.make_node("Relu", ["edges"], ["features"]),
        helper.make_node("GlobalAveragePool", ["features"], ["means"]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["calm"]),
        helper.make_node("GlobalAveragePool", ["image"], ["whiteness"]),
        helper.make_node("Greater", ["whiteness", "white"], ["is_white"]),
        helper.make_node("Cast", ["is_white"], ["row"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "row"], ["found"]),
        helper.make_node("Reshape", ["found", "column"], ["poison"]),
        helper.make_node("Add", ["calm", "poison"], ["logits"]),
    ]
    for node in nodes:
        node.name = node.output[0]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 64, 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


@dataclass
class Runs:
    """How many images each run of the worker's had; `before` is called with each one's number."""

    images: list[int] = field(default_factory=list)
    before: Callable[[int], object] = lambda number: None


class ServableFolder(Folder):
    """A config whose model can be loaded."""

    model = b""

    def write(self) -> Path:
        path = super().write()
        (self.path / "models/phantom-cxr.onnx").write_bytes(self.model)
        return path


@pytest.fixture
def files(files: Folder, request: pytest.FixtureRequest) -> Folder:
    """With a model whose runs pay when they are shared."""
    servable = ServableFolder(files.path, files.texts)
    servable.model = a_model(getattr(request, "param", NOT_FINITE))
    card = "models/phantom-cxr.yaml"
    digests = [hashlib.sha256(data).hexdigest() for data in (MODEL, servable.model)]
    servable.spoil(card, *digests)
    servable.spoil(card, "source: source", "source: fixed, center: 2048, width: 4096")
    return servable


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Counts what the worker runs on a device on which larger runs always pay."""
    monkeypatch.setattr(costs, "_SIZES", (1, TOGETHER))
    for never in ("_WORTH", "_WORTH_SHARING", "LONGEST_BATCH_S"):
        monkeypatch.setattr(costs, never, float("inf"))
    counted, run = Runs(), Session.run

    def counting(session: Session, feeds: Feeds, wanted: Sequence[str] = ()) -> Feeds:
        if threading.current_thread().name == "worker":  # not those of the load
            counted.images.append(next(iter(feeds.values())).shape[0])
            counted.before(len(counted.images))
        return run(session, feeds, wanted)

    monkeypatch.setattr(Session, "run", counting)
    return counted


def test_small_routine_studies_share_one_run(context: Context, tmp_path: Path, runs: Runs) -> None:
    for number in range(3):
        receive_image(context, number)
    with working(context):
        wait_until(lambda: states(tmp_path) == ["done"] * 3, "all are done")
    assert runs.images == [3]


@pytest.mark.promise("P6")
@pytest.mark.parametrize(
    ("files", "reason"),
    [(NOT_FINITE, "not finite"), (NO_SUCH_ROW, "4 attempts ended without a result")],
    indirect=["files"],
)
def test_a_bad_study_in_a_shared_run_spoils_none_of_the_others_and_gets_its_own_reason(
    context: Context,
    tmp_path: Path,
    log: io.StringIO,
    runs: Runs,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "RETRY_S", 0.0)
    for number in range(3):
        receive_image(context, number, is_white=number == 1)
    with working(context) as worker:
        wait_until(lambda: states(tmp_path) == ["done", "failed", "done"], "all are answered")
        worker.tick()
    assert runs.images[:4] == [3, 1, 1, 1]
    good, bad, another = jobs(tmp_path)
    assert (good["attempts"], another["attempts"]) == (1, 1)
    assert reason in str(bad["note"])
    [line] = [line for line in lines_of(log) if line["event"] == "run-not-shared"]
    assert (line["level"], line["model"], line["count"]) == ("warning", "phantom-cxr", 3)
    assert "served.py" in str(line["error"])


@pytest.mark.promise("C6")
@pytest.mark.parametrize(
    "files",
    [(0.0, float("nan")), (0.0, float("inf")), (0.0, float("-inf"))],
    ids=["NaN", "Inf", "-Inf"],
    indirect=True,
)
def test_a_score_that_is_no_number_fails_the_study_and_no_result_claims_a_finding(
    context: Context, tmp_path: Path
) -> None:
    receive_image(context, 0, is_white=True)
    with working(context):
        wait_until(lambda: states(tmp_path) == ["failed"], "answered")
    [job] = jobs(tmp_path)
    assert str(job["note"]) == "model phantom-cxr gave values that are not finite"
    assert rows(tmp_path, "SELECT findings FROM job") == [{"findings": "[]"}]
    [made] = rows(tmp_path, "SELECT kind, spool_key FROM result")
    assert made["kind"] == "note"
    said = dcmread(BytesIO(context.spool.read(str(made["spool_key"]))), stop_before_pixels=True)
    assert "not performed" in str(said)
    assert "Nodule" not in str(said)


@pytest.mark.parametrize("files", [NO_SUCH_ROW], indirect=True)
def test_a_run_that_loses_the_device_ends_the_worker_and_costs_no_other_job_its_answer(
    context: Context, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        receive_image(context, number, is_white=number == 1)
    monkeypatch.setattr(Device, "is_lost", property(lambda device: len(runs.images) >= 3))
    with working(context) as worker:
        with pytest.raises(RuntimeError, match="Gather"):
            wait_until(worker.tick, "the worker ends")
        assert states(tmp_path) == ["done", "queued", "running"]  # freed with its process
    assert runs.images == [3, 1, 1]


def test_a_stat_study_is_served_between_two_shared_runs(
    context: Context, tmp_path: Path, log: io.StringIO, runs: Runs
) -> None:
    for number in range(2):
        receive_image(context, number, frames=3)

    def urgent(number: int) -> None:
        if number == 1:
            receive_image(context, 2, priority=Priority.STAT)

    runs.before = urgent
    with working(context):
        wait_until(lambda: states(tmp_path) == ["done"] * 3, "all are done")
    assert runs.images == [TOGETHER, 1, 6 - TOGETHER]
    done = [line["job"] for line in lines_of(log) if line["event"] == "job-done"]
    assert done == [3, 1, 2]


@pytest.mark.promise("G4")
@pytest.mark.parametrize("priority", Priority)
def test_a_long_job_that_comes_on_is_not_taken_for_one_that_hangs(
    context: Context, tmp_path: Path, runs: Runs, priority: Priority
) -> None:
    moments: list[float] = []
    with working(context) as worker:
        runs.before = lambda _: moments.append(worker._watcher._watches[0].moved_at)
        receive_image(context, 0, frames=3 * TOGETHER, priority=priority)
        wait_until(lambda: states(tmp_path) == ["done"], "done")
    assert runs.images == [TOGETHER] * 3
    assert moments == sorted(set(moments))


def test_a_study_that_was_tried_before_runs_alone(
    context: Context, tmp_path: Path, runs: Runs
) -> None:
    for number in range(2):
        receive_image(context, number)
    change(tmp_path, "UPDATE job SET attempts = 1")
    with working(context):
        wait_until(lambda: states(tmp_path) == ["done"] * 2, "all are done")
    assert runs.images == [1, 1]


@contextmanager
def working(context: Context) -> Iterator[Worker]:
    worker = Worker(context, "cpu")
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(10.0)


def receive_image(
    context: Context,
    number: int,
    *,
    is_white: bool = False,
    frames: int = 1,
    priority: Priority = Priority.ROUTINE,
) -> None:
    """A radiograph for the only route, in whose order the jobs are claimed."""
    file = a_radiograph().files[0]
    pixels = dcmread(BytesIO(file)).pixel_array
    if is_white:
        pixels = np.full_like(pixels, 4095)
    file = changed(
        file,
        PhotometricInterpretation="MONOCHROME2",
        NumberOfFrames=frames,
        PixelData=pixels.tobytes() * frames,
    )
    header = header_of(file)
    stored = replace(
        an_instance(number),
        sop_instance_uid=header.SOPInstanceUID,
        sop_class_uid=header.SOPClassUID,
        series_instance_uid=header.SeriesInstanceUID,
        study_instance_uid=header.StudyInstanceUID,
        sha256=hashlib.sha256(file).hexdigest(),
        spool_key=context.spool.put([file]),
        size_bytes=len(file),
    )
    [route] = context.config.routes.routes
    card = context.config.cards[route.model]
    want = wanted(
        stored,
        Per.INSTANCE,
        route=route.name,
        digest=card.digest,
        priority=priority,
        budget_s=3600.0 + number,
    )
    written = route.model_dump_json(by_alias=True, exclude_none=True)
    receive(context.ledger, stored, replace(want, model=card.name, route_json=written))


def jobs(folder: Path) -> list[Row]:
    return rows(folder, "SELECT state, attempts, note FROM job ORDER BY id")


def states(folder: Path) -> list[object]:
    return [job["state"] for job in jobs(folder)]


def lines_of(log: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]

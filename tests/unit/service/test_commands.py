"""The commands as their users see them: what they print, and their exit codes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from pydicom import dcmread
from typer.testing import CliRunner

from dicom_xai.autodiff import ExpectedGradients, compile
from dicom_xai.cli import app, main
from dicom_xai.demo.pacs import StandInPACS
from dicom_xai.demo.phantom import chest, head_ct
from dicom_xai.infer.session import Device, Session
from tests.make.networks import ResNet, exported, image, seeded

CONFIG = """
receive:
  listeners: [{{ae_title: DICOM_XAI, host: 127.0.0.1, port: 0}}]
  allow: [{{ae_title: "*", network: 127.0.0.0/8}}]
spool: {{directory: spool, min_free_bytes: 1000}}
ledger: {{url: "sqlite:///ledger.db"}}
models: {{directory: {models}}}
devices: [cpu]
routes: routes.yaml
destinations:
  pacs: {{type: dimse, ae_title: PACS, host: 127.0.0.1, port: {port}}}
"""
ROUTES = """
routes:
  - name: chest
    when: {Modality: {in: [CR, DX]}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}]
tests:
  - name: a radiograph is triaged
    attributes: {Modality: DX}
    expect: [chest]
"""


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> Path:
    path = tmp_path / "dicom-xai.yaml"
    path.write_text(CONFIG.format(models=model_folder, port=9))
    (tmp_path / "routes.yaml").write_text(ROUTES)
    return path


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def edit(config: Path, before: str, after: str) -> None:
    path = config.with_name("routes.yaml")
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_help_loads_no_torch():
    code = (
        "import sys\n"
        "from dicom_xai.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'onnxruntime', 'highdicom'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("run", "check", "demo", "explain", "send", "doctor", "ledger"):
        assert command in done.stdout


def test_a_missing_config_is_one_clear_event(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dicom-xai", "run", "--config", str(tmp_path / "no.yaml")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = json.loads(capsys.readouterr().err)
    assert said["event"] == "config-refused"
    assert said["reason"].endswith("error: cannot be read: No such file or directory")


def test_check_proves_files_routes_and_models(config):
    done = run("check", "--config", str(config))
    assert done.exit_code == 0, done.output
    assert "bit-identical" in done.output
    assert done.output.rstrip().endswith("clean")


def test_check_says_warnings_with_exit_code_1(config):
    edit(config, "when: {Modality: {in: [CR, DX]}}", "when: {}")
    done = run("check", "--config", str(config))
    assert done.exit_code == 1
    assert "routes.yaml:4:5: warning: route 'chest': matches every image" in done.output


def test_check_runs_the_routes_tests_and_points_at_the_one_that_fails(config):
    edit(config, "Modality: DX}", "Modality: CT}")
    done = run("check", "--config", str(config))
    assert done.exit_code == 2
    assert "routes.yaml:10:5: error: test 'a radiograph is triaged'" in done.output
    assert "expected chest, found none" in done.output


def test_check_knows_the_explainers(config):
    edit(config, "grad-cam", "gradcam")
    done = run("check", "--config", str(config))
    assert done.exit_code == 2
    words = (
        "routes.yaml:7:15: error: route 'chest': no explainer 'gradcam'; did you mean 'grad-cam'?"
    )
    assert words in done.output


def test_check_speaks_json(config):
    edit(config, "when: {Modality: {in: [CR, DX]}}", "when: {}")
    done = run("check", "--json", "--config", str(config))
    found = json.loads(done.stdout)
    assert [problem["is_lint"] for problem in found["problems"]] == [True]
    assert found["models"][0]["is_bit_identical"] is True


def test_explain_writes_objects_and_pictures_without_network(tmp_path, model_folder):
    phantom = chest(np.random.default_rng(1), findings={"consolidation"}, matrix=(256, 220))
    source = tmp_path / "image.dcm"
    source.write_bytes(phantom.files[0])
    folder = tmp_path / "out"
    done = run(
        *("explain", str(source), "--model", "phantom-cxr", "--out", str(folder)),
        *("--models", str(model_folder), "--device", "cpu"),
    )
    assert done.exit_code == 0, done.output
    kinds = sorted(path.name.split("-")[0] + path.suffix for path in folder.iterdir())
    assert kinds == ["sc.dcm", "sc.png", "seg.dcm"]
    assert "PHANTOM" not in done.output


def test_explain_groups_a_series_and_pictures_its_best_slices(tmp_path, model_folder):
    phantom = head_ct(np.random.default_rng(2), slices=5, haemorrhage=True)
    for number, file in enumerate(phantom.files):
        (tmp_path / f"{number}.dcm").write_bytes(file)
    files = [str(path) for path in tmp_path.glob("*.dcm")]
    folder = tmp_path / "out"
    done = run(
        *("explain", *files, "--model", "phantom-ct-head", "--out", str(folder)),
        *("--models", str(model_folder), "--device", "cpu"),
    )
    assert done.exit_code == 0, done.output
    assert len(list(folder.glob("sc-*.dcm"))) == 3
    assert len(list(folder.glob("seg-*.dcm"))) == 1


def test_explain_says_why_a_file_cannot_be_done(tmp_path, model_folder):
    phantom = chest(np.random.default_rng(1), matrix=(256, 220))
    ds = dcmread(io.BytesIO(phantom.files[0]))
    del ds.Rows
    ds.save_as(tmp_path / "odd.dcm")
    done = run(
        *("explain", str(tmp_path / "odd.dcm"), "--model", "phantom-cxr"),
        *("--out", str(tmp_path / "out"), "--models", str(model_folder), "--device", "cpu"),
    )
    assert done.exit_code == 1
    assert "Rows" in done.output


def test_explain_names_the_nearest_model(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x"
    path.write_text("no image")
    arguments = ["explain", str(path), "--model", "phantom-cxrr", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["dicom-xai", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "did you mean 'phantom-cxr'?" in " ".join(capsys.readouterr().err.split())


def test_send_shows_each_answer(tmp_path):
    phantom = chest(np.random.default_rng(3), views=("PA", "AP"), matrix=(128, 110))
    for number, file in enumerate(phantom.files):
        (tmp_path / f"{number}.dcm").write_bytes(file)
    (tmp_path / "note.txt").write_text("no image")
    with StandInPACS(tmp_path / "pacs") as pacs:
        done = run("send", str(tmp_path), "--to", f"PACS@127.0.0.1:{pacs.port}")
        assert len(pacs.kept) == 2
    assert done.exit_code == 1  # one file was none
    assert done.output.count("0x0000 delivered") == 2
    assert "note.txt: not sent" in done.output


def test_doctor_finds_what_an_admin_would_look_for(config, tmp_path):
    with StandInPACS(tmp_path / "pacs") as pacs:
        config.write_text(config.read_text().replace("port: 9}", f"port: {pacs.port}}}"))
        done = run("doctor", "--json", "--config", str(config))
    found = {item["what"]: item for item in json.loads(done.stdout)}
    assert re.search(r"C-ECHO in \d+ ms$", found["destination pacs"]["found"])
    assert found["destination pacs"]["severity"] == 0
    assert found["device cpu"]["found"] == "is cpu"
    assert found["queues"]["found"] == "empty"
    assert done.exit_code == 1  # nobody listens: the service does not run


def test_doctor_names_a_destination_that_does_not_answer(config):
    done = run("doctor", "--json", "--config", str(config))
    found = {item["what"]: item for item in json.loads(done.stdout)}
    assert found["destination pacs"]["severity"] == 1
    assert "refused the connection" in found["destination pacs"]["found"]


def test_the_ledger_knows_nothing_of_a_study_that_never_came(config):
    done = run("ledger", "why", "1.2.3", "--config", str(config))
    assert done.exit_code == 1
    assert "nothing is known about 1.2.3" in done.output


def test_what_does_not_exist_cannot_be_retried(config):
    for verb in (("retry", "7"), ("requeue", "7"), ("skip", "7")):
        assert run("ledger", *verb, "--config", str(config)).exit_code == 1


def test_explain_model_writes_a_file_that_any_onnx_runtime_runs(tmp_path, cxr_card):
    path = tmp_path / "explained.onnx"
    done = run("explain-model", str(cxr_card.file), "-o", str(path), "--method", "grad-cam")
    assert done.exit_code == 0, done.output
    assert "none of the model's changed" in done.output
    session = Session(path.read_bytes(), Device("cpu"), 1)
    assert list(session.inputs) == ["image", "target"]
    assert list(session.outputs) == ["logits", "attribution"]
    image = torch.rand((2, 1, 256, 256), generator=torch.Generator().manual_seed(0))
    made = session.run({"image": image, "target": torch.tensor([-1, 2])})
    assert made["attribution"].shape == (2, 1, 32, 32)


def test_explain_model_names_the_nearest_method(tmp_path, cxr_card, capsys, monkeypatch):
    arguments = [
        "explain-model",
        str(cxr_card.file),
        "-o",
        str(tmp_path / "x"),
        "--method",
        "gradcam",
    ]
    monkeypatch.setattr(sys, "argv", ["dicom-xai", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "did you mean 'grad-cam'?" in capsys.readouterr().err


def refused(capsys, monkeypatch, *arguments: object) -> str:
    """What the command says on standard error as it refuses."""
    monkeypatch.setattr(sys, "argv", ["dicom-xai", "explain-model", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_explain_model_takes_typical_images_from_a_file(tmp_path, cxr_card):
    images = np.random.default_rng(7).random((3, 1, 256, 256), np.float32)
    source, path = tmp_path / "typical.npy", tmp_path / "explained.onnx"
    np.save(source, images.astype(np.float64))
    asked = ("--method", "expected-gradients", "--backgrounds", str(source))
    done = run("explain-model", str(cxr_card.file), "-o", str(path), *asked)
    assert done.exit_code == 0, done.output
    image = torch.rand((1, 1, 256, 256), generator=torch.Generator().manual_seed(0))
    feeds = {"image": image, "target": torch.tensor([1])}
    made = Session(path.read_bytes(), Device("cpu"), 1).run(feeds)
    model = compile(onnx.load(cxr_card.file), ExpectedGradients(images)).model
    wanted = Session(model.SerializeToString(), Device("cpu"), 1).run(feeds)
    assert made["attribution"].abs().max() > 0
    assert torch.equal(made["attribution"], wanted["attribution"])


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        (np.zeros((2, 3, 256, 256)), r"found backgrounds shaped \(2, 3, 256, 256\), wanted \(sam"),
        (np.zeros((256, 256)), r"found backgrounds shaped \(256, 256\), wanted \(samples, 1, 256"),
        (np.zeros((0, 1, 256, 256)), "with one sample or more"),
        (np.array(["a"]), "found <U1, wanted an array of real numbers"),
        (np.full((1, 1, 256, 256), 1e300), "found values that no float32 holds"),
        (np.array([{}]), "is no NumPy file of numbers"),
        (None, "--backgrounds and --method expected-gradients go together"),
    ],
)
def test_explain_model_says_what_is_wrong_with_typical_images(
    tmp_path, cxr_card, capsys, monkeypatch, stored, why
):
    source = tmp_path / "typical.npy"
    if stored is not None:
        np.save(source, stored)
    given = [] if stored is None else ["--backgrounds", source]
    method = ("--method", "expected-gradients", *given)
    said = refused(capsys, monkeypatch, cxr_card.file, "-o", tmp_path / "out.onnx", *method)
    assert re.search(why, " ".join(said.split()))


def test_explain_model_leaves_nothing_behind_when_the_file_is_no_model(
    tmp_path, capsys, monkeypatch
):
    source = tmp_path / "noise.onnx"
    source.write_bytes(b"\x00noise" * 20)
    said = refused(capsys, monkeypatch, source, "-o", tmp_path / "out.onnx")
    assert "is no valid ONNX model" in said
    assert [path.name for path in tmp_path.iterdir()] == ["noise.onnx"]


def test_explain_model_names_the_weights_that_are_missing_beside_the_model(
    tmp_path, cxr_card, capsys, monkeypatch
):
    source = tmp_path / "model.onnx"
    model = onnx.load(cxr_card.file)
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    said = refused(capsys, monkeypatch, source, "-o", tmp_path / "out.onnx")
    assert "weights.bin" in said
    assert "valid" not in said


def test_explain_model_says_that_it_cannot_write_where_there_is_no_folder(
    tmp_path, cxr_card, capsys, monkeypatch
):
    path = tmp_path / "nowhere" / "out.onnx"
    said = refused(capsys, monkeypatch, cxr_card.file, "-o", path)
    assert f"{path} cannot be written: No such file or directory" in said


def test_explain_model_explains_the_image_that_is_named(tmp_path):
    source, path = tmp_path / "two.onnx", tmp_path / "explained.onnx"
    onnx.save(two_views(), source)
    for option, view in (((), "front"), (("--image", "side"), "side")):
        done = run("explain-model", str(source), "-o", str(path), "--method", "saliency", *option)
        assert done.exit_code == 0, done.output
        assert f"map on the grid of {view} " in done.output


def test_explain_model_takes_the_range_of_the_image(tmp_path, capsys, monkeypatch):
    source, path = tmp_path / "net.onnx", tmp_path / "explained.onnx"
    x = image(2, 1, 12, 12)
    onnx.save(exported(seeded(ResNet()), x, "torchscript", 17), source)
    box = ("--method", "lrp-epsilon-gamma-box")
    done = run("explain-model", str(source), "-o", str(path), *box, "--low", "-1", "--high", "1")
    assert done.exit_code == 0, done.output
    for options, words in (
        (box, "explain-model: --low, --high"),
        ((*box, "--low", "-1"), "--low and --high go together"),
        ((*box, "--low", "1", "--high", "-1"), "got 1.0 and -1.0"),
        (("--low", "-1", "--high", "1"), "they are for lrp-epsilon-gamma-box, deep-taylor"),
    ):
        assert words in refused(capsys, monkeypatch, source, "-o", path, *options)


def two_views() -> onnx.ModelProto:
    """A score of two images."""
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                make("GlobalAveragePool", ["front"], ["one"]),
                make("GlobalAveragePool", ["side"], ["other"]),
                make("Add", ["one", "other"], ["sum"]),
                make("Flatten", ["sum"], ["scores"]),
            ],
            "two",
            [value(name, 1, ["batch", 2, 4, size]) for name, size in (("front", 4), ("side", 6))],
            [value("scores", 1, ["batch", 2])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=8,
    )


def test_the_help_of_explain_model_shows_the_shapes_of_what_is_added():
    shown = " ".join(run("explain-model", "--help").output.split())
    assert "int64 [batch]," in shown
    assert "float32 [batch, 1, ...spatial]" in shown

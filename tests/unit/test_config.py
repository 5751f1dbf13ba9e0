"""Config files: what is read, how problems are reported, what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from dicom_xai import config
from dicom_xai.config import (
    Clause,
    Config,
    ListenerTLS,
    Problem,
    ProblemsError,
    Route,
    RoutesConfig,
    RouteTest,
    ServiceConfig,
    load,
    nearest,
    parse,
    read_yaml,
)
from dicom_xai.errors import ConfigError
from dicom_xai.study import Per
from tests.make.certificates import Authority
from tests.make.config_files import CARD, HERE, ROUTES, SERVICE, Folder

REPO = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "config")


def problems_of(folder: Folder) -> list[Problem]:
    """The errors of a config that must have some."""
    with pytest.raises(ProblemsError) as caught:
        load(folder.write())
    return [problem for problem in caught.value.problems if not problem.is_lint]


def places(problems: list[Problem]) -> list[tuple[str, int, int]]:
    return [(problem.file.name, problem.line, problem.column) for problem in problems]


def loaded(folder: Folder) -> Config:
    return load(folder.write())[0]


def lint_of(folder: Folder) -> list[Problem]:
    return load(folder.write())[1]


def test_a_good_config_has_no_problem(folder: Folder) -> None:
    found, lint = load(folder.write())
    assert lint == []
    assert [route.name for route in found.routes.routes] == ["chest"]
    assert found.cards["phantom-cxr"].default_per is Per.INSTANCE


def test_the_service_file_in_the_repository_reads() -> None:
    service, _ = parse(REPO / "config/dicom-xai.yaml", ServiceConfig)
    assert [listener.ae_title for listener in service.receive.listeners] == [
        "DICOM_XAI",
        "DICOM_XAI_STAT",
    ]
    assert service.telemetry.port == 9464


def test_the_routes_file_in_the_repository_reads_and_its_names_are_known() -> None:
    service, _ = parse(REPO / "config/dicom-xai.yaml", ServiceConfig)
    routes, _ = parse(REPO / "config/routes.yaml", RoutesConfig)
    assert {route.name for route in routes.routes} >= {"chest-x-ray", "head-ct"}
    named = {name for route in routes.routes for rule in route.send for name in rule.to}
    assert named <= set(service.destinations)
    assert routes.tests


def test_relative_paths_are_relative_to_the_file_the_ledgers_too(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = folder.write()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found, _ = load(path)
    assert found.service.spool.directory == tmp_path / "var/spool"
    assert found.service.ledger.url == f"sqlite:///{tmp_path}/var/ledger.db"
    assert found.service.models.directory == tmp_path / "config/models"
    assert found.service.routes == tmp_path / "config/routes.yaml"
    assert found.cards["phantom-cxr"].file == tmp_path / "config/models/phantom-cxr.onnx"
    monkeypatch.chdir(path.parent)
    assert load(Path("dicom-xai.yaml"))[0] == found


def test_absolute_paths_stay(folder: Folder) -> None:
    folder.spoil("dicom-xai.yaml", "sqlite:///../var/ledger.db", "sqlite:////srv/ledger.db")
    folder.spoil("dicom-xai.yaml", "../var/spool", "/srv/spool")
    service = loaded(folder).service
    assert service.ledger.url == "sqlite:////srv/ledger.db"
    assert service.spool.directory == Path("/srv/spool")


def test_the_digest_tells_configs_apart_and_nothing_else(folder: Folder) -> None:
    before = loaded(folder).digest
    folder.texts["routes.yaml"] += "# a comment\n"
    assert loaded(folder).digest == before
    folder.spoil("routes.yaml", "model: phantom-cxr", "model: phantom-cxr\n    findings: 2")
    assert loaded(folder).digest != before


def test_a_cards_digest_follows_every_value_but_its_place(folder: Folder, tmp_path: Path) -> None:
    before = loaded(folder).cards["phantom-cxr"].digest
    assert loaded(Folder(tmp_path / "other")).cards["phantom-cxr"].digest == before
    folder.spoil("models/phantom-cxr.yaml", "full_scale: 2.0", "full_scale: 2.5")
    assert loaded(folder).cards["phantom-cxr"].digest != before


def test_a_route_goes_through_the_ledger_unchanged() -> None:
    routes, _ = parse(REPO / "config/routes.yaml", RoutesConfig)
    for route in routes.routes:
        text = route.model_dump_json(by_alias=True, exclude_none=True)
        assert Route.model_validate_json(text) == route


@pytest.mark.promise("K3")
@pytest.mark.parametrize(
    "word",
    [
        "NO",
        "no",
        "ON",
        "Yes",
        "0123",
        "0o17",
        "0x1F",
        "12:30",
        "1E5",
        "1_000",
        "2026-01-02",
        ".inf",
        "1.50",
        "true",
        "NULL",
        "Null",
    ],
)
def test_a_scalar_is_kept_letter_for_letter(folder: Folder, word: str) -> None:
    folder.spoil("dicom-xai.yaml", "ae_title: DICOM_XAI", f"ae_title: {word}")
    folder.spoil("routes.yaml", "equals: CHEST", f"equals: {word}")
    folder.spoil("routes.yaml", "BodyPartExamined: CHEST}", f"BodyPartExamined: {word}}}")
    found = loaded(folder)
    assert found.service.receive.listeners[0].ae_title == word
    assert found.routes.routes[0].when["BodyPartExamined"].equals == word
    assert found.routes.tests[0].attributes["BodyPartExamined"] == word


@pytest.mark.parametrize("quoted", ['"null"', "'~'", "!!str null"])
def test_a_quoted_null_is_a_word(folder: Folder, quoted: str) -> None:
    folder.spoil("dicom-xai.yaml", "ae_title: DICOM_XAI", f"ae_title: {quoted}")
    assert loaded(folder).service.receive.listeners[0].ae_title in ("null", "~")


def test_numbers_are_numbers_where_the_section_wants_them(folder: Folder) -> None:
    folder.spoil("dicom-xai.yaml", "port: 11112", 'port: "11112"')
    assert loaded(folder).service.receive.listeners[0].port == 11112


def test_anchors_and_a_byte_order_mark_are_fine(folder: Folder) -> None:
    folder.texts["dicom-xai.yaml"] = "\ufeff" + SERVICE.replace(
        "pacs: {type", "other: &one {type"
    ).replace("telemetry:", "  pacs: *one\ntelemetry:")
    service = loaded(folder).service
    assert service.destinations["pacs"] == service.destinations["other"]


YAML = "dicom-xai.yaml"
ROUTE = "routes.yaml"
MODEL_CARD = "models/phantom-cxr.yaml"

#: File, what stands there, what is put there (§ where it must be reported), part of the message.
BAD = [
    # unknown, missing and duplicate keys
    (YAML, "max_associations: 100", "§max_asociations: 100", "did you mean 'max_associations'?"),
    (YAML, "models: {", "§model: {}\nmodels: {", "unknown key 'model'; did you mean 'models'?"),
    (YAML, "host: 127.0.0.1, port: 4242", "§hots: x, host: h, port: 4242", "did you mean 'host'?"),
    (YAML, "keep_days: 2", "keep_days: 2, §zzz: 1", "unknown key 'zzz'"),
    (ROUTE, "{equals: CHEST}", "{§equal: CHEST}", "did you mean 'equals'?"),
    (ROUTE, "trigger: instance", "trigger: instance\n    §priorty: stat", "mean 'priority'?"),
    (ROUTE, "tests:", "§test: []\ntests:", "unknown key 'test'; did you mean 'tests'?"),
    (MODEL_CARD, "size: [64, 64]", "§sizes: [64]\n    size: [64, 64]", "did you mean 'size'?"),
    (YAML, "ae_title: DICOM_XAI, ", "", "listeners.0.ae_title is missing"),
    (YAML, "spool: {", "§spool: {}\nspoool: {", "spool.directory is missing"),
    (ROUTE, "    model: phantom-cxr\n", "", "routes.0.model is missing"),
    (YAML, "devices: [auto]", "devices: [auto]\n§devices: [cpu]", "'devices' stands here twice"),
    (ROUTE, "{in: [CR, DX]}", "{in: [CR], §in: [DX]}", "key 'in' stands here twice"),
    # values
    (YAML, "ae_title: DICOM_XAI", "§ae_title: ABCDEFGHIJKLMNOPQ", "1 to 16 characters, found 17"),
    (YAML, "ae_title: DICOM_XAI", '§ae_title: "A\\\\B"', "printable ASCII without backslash"),
    (YAML, "ae_title: DICOM_XAI", "§ae_title: RÖNTGEN", "printable ASCII"),
    (YAML, "ae_title: DICOM_XAI", '§ae_title: "  "', "1 to 16 characters"),
    (YAML, "ae_title: DICOM_XAI", "§ae_title: ", "should be a valid string"),
    (YAML, "port: 11112", "§port: 70000", "less than or equal to 65535, found '70000'"),
    (YAML, "port: 11112", "§port: 1E5", "valid integer"),
    (YAML, "port: 11112", "§port: 12:30", "valid integer"),
    (YAML, "127.0.0.0/8", "127.0.0.1/8", "has host bits set"),
    (YAML, "127.0.0.0/8", "everywhere", "does not appear to be an IPv4 or IPv6 network"),
    (YAML, "[SR, PR]", "[SR, §PRR]", "did you mean 'PR'?"),
    (YAML, "[auto]", "[§gpu]", "a device is auto, cpu or cuda:N"),
    (YAML, "devices: [auto]", "§devices: auto", "valid tuple"),
    (YAML, "type: dimse", "§type: dims", "did you mean 'dimse'?"),
    (YAML, "port: 4242}", "port: 4242, §compress: jpg}", "did you mean 'jpeg'?"),
    (YAML, "  pacs: {", "  §PACS: {", "a name is lower-case letters"),
    (YAML, "keep_days: 2", "§keep_days: nan", "finite number"),
    (YAML, "keep_days: 2", "§keep_days: -1", "greater than or equal to 0"),
    (YAML, '{url: "sqlite:///../var/ledger.db"}', '{§url: "mysql://me@db"}', "wanted"),
    (YAML, "  allow:", "  §allow: []\n  allowed:", "at least 1 item"),
    (ROUTE, "match: all", "§match: any", "'all' or 'first'"),
    (ROUTE, "match: all", "§match: al", "did you mean 'all'?"),
    (ROUTE, "Modality: {in", "§Modalty: {in", "did you mean 'Modality'?"),
    (ROUTE, "Modality: {in", "§called_ae: {in", "did you mean 'called_ae_title'?"),
    (ROUTE, "{in: [CR, DX]}", "{§in: []}", "at least 1 item"),
    (ROUTE, "Modality: {in: [CR, DX]}", "§Modality: {equals: }", "an empty clause or value"),
    (ROUTE, "Modality: {in: [CR, DX]}", "§Modality: {equals: CR, contains: ~}", "an empty clause"),
    (ROUTE, "Modality: {in: [CR, DX]}", "§Modality: {}", "an empty clause"),
    (ROUTE, "Modality: {in: [CR, DX]}", "§Modality: {min: 3, max: 2}", "min 3 is above max 2"),
    (ROUTE, "Modality: {in: [CR, DX]}", "§Modality: DX", "found 'DX'"),
    (ROUTE, "{in: [CR, DX]}", "{§exists: yes}", "write true or false"),
    (ROUTE, "{in: [CR, DX]}", "{not: {§min: many}}", "valid number"),
    (ROUTE, "trigger: instance", "§trigger: released", "'association_release' or 'quiet'"),
    (ROUTE, "trigger: instance", "§trigger: expected_count", "'instance'"),
    (ROUTE, "  - name: chest", "  - §name: Chest X", "a name is lower-case letters"),
    (ROUTE, "object: sc", "§object: note", "found 'note'"),
    (ROUTE, "[{object: sc,", "[§{slices: 3, object: seg,", "slices stands on object: sc, found"),
    (ROUTE, "[{object: sc,", "[§{layout: stack, object: seg,", "layout stands on object: sc"),
    (ROUTE, "[{object: sc,", "[§{kind: binary, object: sc,", "kind stands on object: seg, found"),
    (ROUTE, "[{object: sc,", "[§{layout: stack, slices: 3, object: sc,", "leave slices out"),
    (ROUTE, "[{object: sc,", "[{§layout: stak, object: sc,", "did you mean 'stack'?"),
    (ROUTE, "[{object: sc,", "[{§kind: label, object: seg,", "found 'label'"),
    (ROUTE, "[{object: sc,", "[{§kind: fractional, object: seg,", "use binary or labelmap"),
    (ROUTE, "[{object: sc,", "[{§layout: stack, object: sc,", "layout stack is for series"),
    (ROUTE, "trigger: instance", "trigger: instance\n    §budget_s: 0", "greater than 0"),
    (ROUTE, "trigger: instance", "trigger: instance\n    §quiet_s: 0,5", "valid number"),
    (ROUTE, "  - name: chest", "  - §per: series\n    name: chest", "needs per: instance"),
    (ROUTE, "{Modality: DX,", "{§Modalit: DX,", "did you mean 'Modality'?"),
    (MODEL_CARD, "calibrated: false", "§calibrated: no", "write true or false"),
    (MODEL_CARD, "threshold: 0.5\n", "§threshold: 1.5\n", "less than 1"),
    (MODEL_CARD, "{source: source}", "{source: fixed, center: 40}", "needs center and width"),
    (MODEL_CARD, "activation: sigmoid", "§activation: sigmoidal", "did you mean 'sigmoid'?"),
    (MODEL_CARD, "kind: image2d", "§kind: image", "did you mean 'image2d'?"),
    # names that must exist elsewhere
    (ROUTE, "model: phantom-cxr", "§model: phantom-crx", "did you mean 'phantom-cxr'?"),
    (ROUTE, "to: [pacs]", "to: [§pasc]", "no destination 'pasc'; did you mean 'pacs'?"),
    (ROUTE, "expect: [chest]", "expect: [§chset]", "no route 'chset'; did you mean 'chest'?"),
    (YAML, "routes: routes.yaml", "routes: nowhere.yaml", "cannot be read: No such file"),
    (YAML, "{directory: models}", "{§directory: modells}", "holds no model card"),
    # cards and their files
    (MODEL_CARD, "sha256: ", "§sha256: 0000", "should match pattern"),
    (MODEL_CARD, "file: phantom-cxr.onnx", "§file: other.onnx", "does not exist beside the card"),
    (MODEL_CARD, "name: phantom-cxr", "§name: phantom", "is not the file's"),
    # YAML itself
    (YAML, "models: {directory: models}", "models: {directory: models\n", "expected ',' or '}'"),
    (YAML, "devices: [auto]", "devices: §*nobody", "undefined alias"),
    (YAML, "devices: [auto]", "? §[a, b]\n: c\ndevices: [auto]", "a key must be a plain word"),
    (YAML, "devices: [auto]", "§<<: {a: b}\ndevices: [auto]", "a key must be a plain word"),
    (YAML, "devices: [auto]", "devices: [auto]\n§---\na: b", "single document"),
    (YAML, "devices: [auto]", "devices: [§\x07auto]", "YAML does not allow: #x0007"),
    (YAML, "devices: [auto]", "§\tdevices: [auto]", ""),
]  # fmt: skip


@pytest.mark.promise("K1")
@pytest.mark.parametrize(("name", "old", "new", "part"), BAD, ids=[f"{c[2][:40]}" for c in BAD])
def test_a_problem_is_reported_where_it_is(
    folder: Folder, name: str, old: str, new: str, part: str
) -> None:
    folder.spoil(name, old, new)
    found = problems_of(folder)
    matching = [problem for problem in found if part in problem.message]
    assert matching, [str(problem) for problem in found]
    for mark in folder.marks():
        assert mark in places(matching), [str(problem) for problem in found]


def test_a_ledger_url_is_refused_without_its_password(folder: Folder) -> None:
    folder.spoil("dicom-xai.yaml", "sqlite:///../var/ledger.db", "postgresql://me:secret@db/x")
    (problem,) = problems_of(folder)
    assert "found postgresql, wanted sqlite:///PATH" in problem.message
    assert "secret" not in str(problem)


def test_a_hash_that_is_not_the_files_says_what_the_files_is(folder: Folder) -> None:
    path = folder.write()
    (path.parent / "models/phantom-cxr.onnx").write_bytes(b"one bit flipped")
    with pytest.raises(ProblemsError, match=r"sha256: phantom-cxr\.onnx hashes to [0-9a-f]{64}"):
        load(path)


def test_two_routes_of_one_name_are_refused_at_the_second(folder: Folder) -> None:
    _, _, rest = ROUTES.partition("routes:\n")
    route, tests, _ = rest.partition("tests:")
    second = route.replace("name: chest", "§name: chest")
    folder.texts["routes.yaml"] = f"match: all\nroutes:\n{route}{second}{tests}{_}"
    found = problems_of(folder)
    assert places(found) == folder.marks()
    assert found[0].message == "two routes are named 'chest'"


def test_listeners_may_share_a_port_but_not_a_title_on_it(folder: Folder) -> None:
    line = "    - {ae_title: DICOM_XAI, host: 127.0.0.1, port: 11112}\n"
    folder.spoil("dicom-xai.yaml", line, line + line.replace("DICOM_XAI", "OTHER"))
    assert len(loaded(folder).service.receive.listeners) == 2
    folder.spoil("dicom-xai.yaml", "OTHER", "DICOM_XAI")
    (problem,) = problems_of(folder)
    assert "two listeners are DICOM_XAI on 127.0.0.1:11112" in problem.message


def with_commitment(folder: Folder, more: str = "") -> None:
    """Let the destination commit, in the line that it has."""
    folder.spoil("dicom-xai.yaml", "port: 4242}", f"port: 4242, commitment: true{more}}}")


@pytest.mark.promise("P4")
def test_a_destination_that_commits_must_be_able_to_report_to_us(folder: Folder) -> None:
    with_commitment(folder)
    assert loaded(folder).service.destinations["pacs"].commitment_wait_s == 60.0
    folder.spoil("dicom-xai.yaml", 'ae_title: "*", network', "ae_title: CT1, network")
    [problem] = problems_of(folder)
    assert "does not let PACS call DICOM_XAI" in str(problem)
    folder.spoil("dicom-xai.yaml", "commitment: true", "commitment: true, calling_ae_title: ME")
    [problem] = problems_of(folder)
    assert "calls from ME, which is no listener's ae_title" in str(problem)


@pytest.mark.promise("P4")
def test_who_may_be_told_of_commitment_has_an_address(folder: Folder) -> None:
    folder.spoil(
        "dicom-xai.yaml",
        "  max_associations",
        "  commitment: {CT1: {host: 10.0.0.4, port: 104}}\n  max_associations",
    )
    address = loaded(folder).service.receive.commitment["CT1"]
    assert (address.host, address.port, address.tls) == ("10.0.0.4", 104, None)


def test_all_problems_of_all_files_come_at_once_each_at_its_place(folder: Folder) -> None:
    folder.spoil("dicom-xai.yaml", "port: 11112", "§port: many")
    folder.spoil("dicom-xai.yaml", "max_associations", "§max_asociations")
    folder.spoil("routes.yaml", "Modality: {in", "§Modalty: {in")
    folder.spoil("routes.yaml", "BodyPartExamined: {equals", "§BodyPart: {equals")
    folder.spoil("routes.yaml", "trigger: instance", "§trigger: now")
    folder.spoil("models/phantom-cxr.yaml", "calibrated: false", "§calibrated: no")
    folder.spoil("models/phantom-cxr.yaml", "kind: image2d", "§kind: image")
    found = problems_of(folder)
    assert sorted(places(found)) == sorted(folder.marks())


def test_unknown_names_are_reported_beside_faults_in_other_routes(folder: Folder) -> None:
    _, _, rest = ROUTES.partition("routes:\n")
    route, tests, _ = rest.partition("tests:")
    second = (
        route.replace("name: chest", "name: second")
        .replace("model: ", "§model: x")
        .replace("[pacs]", "[§pasc]")
    )
    first = route.replace("trigger: instance", "§trigger: now")
    folder.texts["routes.yaml"] = f"match: all\nroutes:\n{first}{second}{tests}{_}"
    assert sorted(places(problems_of(folder))) == sorted(folder.marks())


def test_a_card_with_a_fault_does_not_make_its_route_wrong(folder: Folder) -> None:
    folder.spoil("models/phantom-cxr.yaml", "kind: image2d", "§kind: image")
    assert places(problems_of(folder)) == folder.marks()


def test_a_fault_in_the_service_file_does_not_hide_wrong_model_names(folder: Folder) -> None:
    folder.spoil("dicom-xai.yaml", "[auto]", "[§gpu]")
    folder.spoil("routes.yaml", "model: phantom-cxr", "§model: phantom-crx")
    assert places(problems_of(folder)) == folder.marks()


def test_a_problem_reads_as_compilers_write_them(folder: Folder) -> None:
    folder.spoil("dicom-xai.yaml", "[auto]", "[gpu]")
    (problem,) = problems_of(folder)
    assert str(problem) == (
        f"{folder.path}/dicom-xai.yaml:11:11: error: devices.0: a device is auto, cpu or cuda:N"
    )


def test_problems_are_a_config_error_with_one_line_each(folder: Folder) -> None:
    folder.spoil("dicom-xai.yaml", "[auto]", "[gpu, tpu]")
    with pytest.raises(ConfigError) as caught:
        load(folder.write())
    assert len(str(caught.value).splitlines()) == 2


def test_a_route_that_matches_everything_is_lint(folder: Folder) -> None:
    folder.spoil(
        "routes.yaml",
        "when:\n      Modality: {in: [CR, DX]}\n      BodyPartExamined: {equals: CHEST}",
        "§when: {}",
    )
    (problem,) = lint_of(folder)
    assert (problem.is_lint, places([problem])) == (True, folder.marks())
    assert "matches every image" in problem.message
    assert "warning" in str(problem)


def hidden(match: str, first_extra: str = "") -> str:
    """Two routes; the second asks for all that the first asks for, and more."""
    _, _, rest = ROUTES.partition("routes:\n")
    route, tests, tail = rest.partition("tests:")
    first = route.replace("      BodyPartExamined: {equals: CHEST}\n", "").replace(
        "    trigger", f"{first_extra}    trigger"
    )
    second = route.replace("name: chest", "§name: second")
    tail = tail.replace("[chest]", "[]")
    return f"match: {match}\nroutes:\n{first}{second}{tests}{tail}"


def test_a_route_behind_a_wider_one_is_lint_under_match_first(folder: Folder) -> None:
    folder.texts["routes.yaml"] = hidden("first")
    (problem,) = lint_of(folder)
    assert places([problem]) == folder.marks()
    assert "route 'second': is never reached" in problem.message


@pytest.mark.parametrize(
    "text",
    [hidden("all"), hidden("first", "    enabled: false\n")],
    ids=["match all", "the wider one is disabled"],
)
def test_a_route_that_can_be_reached_is_not_lint(folder: Folder, text: str) -> None:
    folder.texts["routes.yaml"] = text
    assert lint_of(folder) == []


def test_an_unused_destination_is_lint_in_the_file_that_names_it(folder: Folder) -> None:
    folder.spoil(
        "dicom-xai.yaml",
        "telemetry:",
        "  §spare: {type: dimse, ae_title: X, host: h, port: 1}\ntelemetry:",
    )
    (problem,) = lint_of(folder)
    assert places([problem]) == folder.marks()
    assert problem.message == "destination 'spare' is used by no route"


def test_routes_without_tests_are_lint(folder: Folder) -> None:
    folder.texts["routes.yaml"] = ROUTES.partition("tests:")[0]
    assert [problem.message for problem in lint_of(folder)] == [
        "no tests: nothing proves the routes"
    ]


def test_a_silence_as_long_as_the_budget_is_lint(folder: Folder) -> None:
    folder.spoil("routes.yaml", "trigger: instance", "trigger: quiet\n    §quiet_s: 2")
    (problem,) = lint_of(folder)
    assert places([problem]) == folder.marks()


def test_lint_is_told_beside_errors(folder: Folder) -> None:
    folder.texts["routes.yaml"] = ROUTES.partition("tests:")[0].replace("[pacs]", "[nobody]")
    with pytest.raises(ProblemsError) as caught:
        load(folder.write())
    assert {problem.is_lint for problem in caught.value.problems} == {True, False}


def bomb(levels: int = 9, width: int = 9) -> str:
    lines = ["a0: &a0 [" + ", ".join(["x"] * width) + "]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * width) + "]")
    return "\n".join(lines) + "\n"


@pytest.mark.promise("K3")
@pytest.mark.parametrize(
    ("text", "part"),
    [
        (bomb(), "values"),
        ("a: &a [*a]\n", "levels"),
        ("a: &a {b: *a}\n", "levels"),
        ("[" * 100_000, "nested too deep"),
        ("{a: " * 5_000, "nested too deep"),
        ("a: " + "[" * 100 + "]" * 100, "levels"),
        ("- " * 3_000 + "x", "nested too deep"),
        ("x" * (config.MAX_YAML_BYTES + 1), f"more than {config.MAX_YAML_BYTES} bytes"),
    ],
    ids=[
        "aliases of aliases",
        "itself",
        "itself as a key's value",
        "brackets",
        "braces",
        "a hundred levels",
        "dashes",
        "a megabyte",
    ],
)
def test_a_hostile_file_is_refused_in_little_time(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(ProblemsError, match=part):
        read_yaml(path)
    # a bomb takes for ever; 5 s of CPU is far above what these take (< 0.5 s) on a slow machine
    assert time.process_time() - started < 5


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(ProblemsError, match="more than"):
        read_yaml(Path("/dev/zero"))


def test_bytes_that_are_not_utf_8_are_refused_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("a: x\nbc: ä\n".encode("latin-1"))
    with pytest.raises(ProblemsError, match=r"latin\.yaml:2:5: error: is not UTF-8"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "~\n", "{}\n"])
def test_an_empty_file_is_told_what_is_missing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(text)
    with pytest.raises(ProblemsError) as caught:
        parse(path, ServiceConfig)
    messages = [problem.message for problem in caught.value.problems]
    assert "receive is missing" in messages or "dictionary" in messages[0]


@pytest.mark.parametrize("text", ["- a\n- b\n", "just a word\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(ProblemsError, match=r"list\.yaml:1:1: error: the file: .*dictionary"):
        parse(path, ServiceConfig)


@pytest.mark.parametrize("make", [lambda p: p / "absent.yaml", lambda p: p])
def test_what_cannot_be_read_says_why(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(ProblemsError, match=r"cannot be read: (No such file|Is a directory)"):
        read_yaml(make(tmp_path))


def test_tags_make_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "tags.yaml"
    path.write_text("a: !!python/object/apply:os.system [echo no]\nb: !!int 5\n")
    assert read_yaml(path)[0] == {"a": ["echo no"], "b": "5"}


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("modality", ["Modality"], "; did you mean 'Modality'?"),
        ("pasc", ["archive", "pacs"], "; did you mean 'pacs'?"),
        ("zzz", ["archive", "pacs"], ""),
        ("x", [], ""),
    ],
)
def test_the_nearest_word_is_offered_only_when_near(
    word: str, known: list[str], expected: str
) -> None:
    assert nearest(word, known) == expected


def test_sections_are_frozen() -> None:
    clause = Clause(equals="x")
    with pytest.raises(ValidationError):
        clause.equals = "y"  # type: ignore[misc]
    test = RouteTest(name="t", attributes={}, expect=())
    with pytest.raises(ValidationError):
        test.name = "y"  # type: ignore[misc]


def test_every_setting_is_described_for_the_admin() -> None:
    bare = [
        f"{name}.{key}"
        for model in (ServiceConfig, RoutesConfig)
        for name, section in model.model_json_schema()["$defs"].items()
        for key, item in section.get("properties", {}).items()
        if not item.get("description") and name not in ("RouteTest", "Route")
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("PACS@host:104", ("PACS", "host", 104)), ("PACS@::1:104", ("PACS", "::1", 104))],
)
def test_an_address_on_the_command_line_is_a_destination(
    text: str, expected: tuple[str, str, int]
) -> None:
    found = config.parse_address(text, "ME")
    assert (found.ae_title, found.host, found.port) == expected
    assert found.calling_ae_title == "ME"


@pytest.mark.parametrize("text", ["", "PACS", "PACS@host", "PACS@host:x", "@host:104", "A@:104"])
def test_an_address_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="wanted AE@HOST:PORT"):
        config.parse_address(text, "ME")


def test_the_examples_that_these_tests_spoil_are_whole() -> None:
    assert "§" not in SERVICE + ROUTES + CARD


def with_tls(folder: Folder, tls: str) -> None:
    """Give the destination a `tls` section, in the line that it has."""
    folder.spoil("dicom-xai.yaml", "port: 4242}", f"port: 4242, {HERE}tls: {tls}}}")


def test_paths_of_certificates_are_relative_to_the_file(folder: Folder) -> None:
    authority = Authority(folder.path / "tls")
    authority.sign("us")
    with_tls(folder, "{ca: tls/ca.pem, certificate: tls/us.pem, private_key: tls/us.key}")
    tls = loaded(folder).service.destinations["pacs"].tls
    assert tls is not None
    assert (tls.ca, tls.private_key) == (authority.ca, folder.path / "tls/us.key")


def test_tls_files_that_cannot_be_used_are_errors_where_they_are_named(folder: Folder) -> None:
    Authority(folder.path / "tls")
    with_tls(folder, "{ca: tls/ca.pem, certificate: tls/ca.pem, private_key: tls/no.key}")
    (problem,) = problems_of(folder)
    assert [(problem.file.name, problem.line, problem.column)] == folder.marks()
    assert "destinations.pacs.tls: " in problem.message
    assert "no.key: No such file" in problem.message


def test_an_expired_certificate_is_a_warning(folder: Folder) -> None:
    Authority(folder.path / "tls").sign("us", first_day=-9, last_day=-2)
    with_tls(folder, "{ca: tls/ca.pem, certificate: tls/us.pem, private_key: tls/us.key}")
    assert any("has expired" in problem.message for problem in lint_of(folder))


@pytest.mark.parametrize(
    ("tls", "words"),
    [
        ("{}", "tls.ca is missing"),
        ("{ca: a, certificate: b}", "go together"),
        ("{ca: a, private_key_password: {file: a, variable: B}}", "in one of the two"),
        ("{ca: a, minimum_version: TLSv1}", "unknown key 'minimum_version'"),
    ],
)
def test_a_tls_section_that_says_half_is_refused(folder: Folder, tls: str, words: str) -> None:
    with_tls(folder, tls)
    assert words in problems_of(folder)[0].message


@pytest.mark.promise("K7")
@pytest.mark.parametrize(
    "written",
    [
        "QUAGGA",
        "{value: QUAGGA}",
        "{QUAGGA}",
        "[QUAGGA]",
        "{variable: QUAGGA-1}",
        "{variable: [QUAGGA]}",
    ],
)
def test_a_secret_that_stands_in_the_config_itself_is_refused_and_not_shown(
    folder: Folder, written: str
) -> None:
    with_tls(folder, f"{{ca: a, private_key_password: {written}}}")
    found = problems_of(folder)
    assert "destinations.pacs.tls.private_key_password" in found[0].message
    assert "wanted {file: PATH} or {variable: NAME}" in found[0].message
    assert [str(problem) for problem in found if "QUAGGA" in str(problem)] == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "`ca` is missing"),
        (
            {"require_client_certificate": False, "ae_titles_by_certificate": {"ct": ("CT",)}},
            "proves nothing",
        ),
    ],
)
def test_a_listener_that_asks_for_proof_must_be_able_to_check_it(
    fields: dict[str, object], words: str
) -> None:
    values = {"certificate": "a", "private_key": "b", **fields}
    with pytest.raises(ValidationError, match=words):
        ListenerTLS.model_validate(values)


@pytest.mark.promise("N10")
def test_a_certificate_may_be_used_under_its_own_ae_titles_only() -> None:
    files = {"certificate": "a", "private_key": "b", "ca": "c"}
    anybody = ListenerTLS.model_validate(files)
    tied = ListenerTLS.model_validate(
        {**files, "ae_titles_by_certificate": {"ct-1": ("CT1", "CT1B")}}
    )
    assert anybody.allows(("ct-2",), "CT1")
    assert tied.allows(("other", "ct-1"), "CT1B")
    assert not tied.allows(("ct-1",), "CT2")
    assert not tied.allows(("ct-2",), "CT1")
    assert not tied.allows((), "CT1")

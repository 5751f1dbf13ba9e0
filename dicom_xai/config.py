"""The three YAML files an admin edits: one frozen model per section; load, check, nearest word.

Every scalar is read as text and typed by its model, so that ``NO``, ``0123`` and ``12:30`` never
change an AE title or a code (PyYAML's YAML 1.1 resolver would read false, 83 and 750). Unknown and
duplicate keys are errors. All problems of a file are reported at once, each with file, line and
column and, where a word is wrong, the nearest known one.

Relative paths are relative to the folder of the file in which they stand.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydicom.datadict import keyword_dict

from dicom_xai.errors import ConfigError
from dicom_xai.study import ObjectKind, Per, Priority

MAX_YAML_BYTES = 1_000_000
MAX_YAML_NODES = 100_000
MAX_YAML_DEPTH = 64


# ------------------------------------------------------------------ field types


def _ae_title(text: str) -> str:
    """An AE value (PS3.5 6.2): 1 to 16 printable ASCII characters, no backslash."""
    if not 1 <= len(text) <= 16 or not text.strip():
        raise ValueError(f"an AE title has 1 to 16 characters, found {len(text)}")
    if any(not 0x20 <= ord(c) <= 0x7E or c == "\\" for c in text):
        raise ValueError("an AE title is printable ASCII without backslash")
    return text.strip()


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text, strict=True))


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", text):
        raise ValueError("a name is lower-case letters, digits, '.', '_' and '-', at most 63 long")
    return text


def _yes_or_no(value: object) -> object:
    """YAML 1.2's two booleans; `yes`, `NO` and `on` are words."""
    if isinstance(value, str):
        if value not in ("true", "false"):
            raise ValueError("write true or false")
        return value == "true"
    return value


def _keyword(text: str) -> str:
    if text not in keyword_dict and text not in SENDER_FACTS:
        near = nearest(text, [*keyword_dict, *SENDER_FACTS])
        raise ValueError(f"{text!r} is no DICOM keyword and no sender fact{near}")
    return text


def _ledger_url(text: str) -> str:
    if not re.fullmatch(r"sqlite:///[^?#]+", text):
        found = text.partition(":")[0]  # no more of it: a URL may hold a password
        raise ValueError(f"found {found}, wanted sqlite:///PATH; other engines are not served")
    return text


#: What a clause may ask about beside DICOM keywords.
SENDER_FACTS = ("calling_ae_title", "called_ae_title", "source_address")

AETitle = Annotated[str, AfterValidator(_ae_title)]
Keyword = Annotated[str, AfterValidator(_keyword)]
Network = Annotated[str, AfterValidator(_network)]
Name = Annotated[str, AfterValidator(_name)]
Port = Annotated[int, Field(ge=0, le=65535)]
Bool = Annotated[bool, BeforeValidator(_yes_or_no)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ------------------------------------------------------------------ dicom-xai.yaml


class Listener(Section):
    """One AE title on one port."""

    ae_title: AETitle = Field(description="Our AE title on this port; any other is rejected.")
    host: str = Field("127.0.0.1", description="Address to bind.")
    port: Port = Field(description="TCP port; 0 takes a free one (tests).")


class Allowed(Section):
    """Who may send."""

    ae_title: AETitle = Field(description="Calling AE title; `*` for any.")
    network: Network = Field(description="Source network, for example 10.1.2.0/24.")


class IgnoredKind(StrEnum):
    """Kinds of object that are kept but never routed."""

    SR = "SR"
    PR = "PR"
    KO = "KO"
    SEG = "SEG"
    DOC = "DOC"


class ReceiveConfig(Section):
    """The door for images."""

    listeners: tuple[Listener, ...] = Field(min_length=1, description="Where we listen.")
    allow: tuple[Allowed, ...] = Field(min_length=1, description="Who may send; nobody else may.")
    max_associations: int = Field(100, ge=1, le=10_000, description="At most so many at once.")
    max_per_source: int = Field(20, ge=1, le=10_000, description="The same, for one address.")
    accept_and_ignore: tuple[IgnoredKind, ...] = Field(
        tuple(IgnoredKind), description="Kinds answered with Success and never routed."
    )
    acse_timeout_s: Seconds = Field(5.0, gt=0, description="For each step of association set-up.")
    dimse_timeout_s: Seconds = Field(30.0, gt=0, description="Between messages of one operation.")
    network_timeout_s: Seconds = Field(60.0, gt=0, description="An idle association is aborted.")

    @model_validator(mode="after")
    def _one_listener_for_each_title(self) -> ReceiveConfig:
        """Listeners may share a port; then the called AE title tells them apart."""
        taken: set[tuple[str, int, str]] = set()
        for listener in self.listeners:
            key = (listener.host, listener.port, listener.ae_title)
            if listener.port and key in taken:
                raise ValueError(
                    f"two listeners are {listener.ae_title} on {listener.host}:{listener.port}"
                )
            taken.add(key)
        return self


class SpoolConfig(Section):
    """Where bytes are kept."""

    directory: Path = Field(description="A folder on a local disk.")
    min_free_bytes: int = Field(2_000_000_000, ge=0, description="Below it C-STORE gets 0xA700.")
    keep_days: float = Field(2.0, ge=0, description="Delivered studies stay so long.")


class LedgerConfig(Section):
    """Where facts are kept."""

    url: Annotated[str, AfterValidator(_ledger_url)] = Field(
        description="SQLAlchemy URL, for example sqlite:///../var/ledger.db"
    )


class ModelsConfig(Section):
    """Where the model cards are."""

    directory: Path = Field(description="A folder of NAME.yaml files with their .onnx beside them.")


class Compression(StrEnum):
    """How objects are compressed for a destination."""

    NONE = "none"
    RLE = "rle"
    JPEG = "jpeg"  #: lossy, SC only; SEG goes uncompressed


class Destination(Section):
    """Where results go."""

    type: Literal["dimse"] = Field(description="dimse: C-STORE to a storage SCP.")
    ae_title: AETitle = Field(description="The destination's AE title.")
    host: str = Field(min_length=1, description="Its address.")
    port: int = Field(ge=1, le=65535, description="Its port.")
    compress: Compression = Field(Compression.NONE, description="none | rle | jpeg (SC only).")
    calling_ae_title: AETitle = Field("DICOM_XAI", description="Our AE title towards it.")


class TelemetryConfig(Section):
    """The HTTP face: /metrics, /livez, /readyz."""

    host: str = Field("127.0.0.1", description="Address to bind.")
    port: Port = Field(
        9464, description="Port; a role started alone uses port, +1, +2 (receiver, worker, sender)."
    )


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda:\d{1,2}", text):
        raise ValueError("a device is auto, cpu or cuda:N")
    return text


class ServiceConfig(Section):
    """config/dicom-xai.yaml"""

    receive: ReceiveConfig
    spool: SpoolConfig
    ledger: LedgerConfig
    models: ModelsConfig
    devices: tuple[Annotated[str, AfterValidator(_device)], ...] = Field(
        ("auto",), min_length=1, description="auto | cpu | cuda:N; one worker each."
    )
    routes: Path = Field(description="The routes file.")
    destinations: dict[Name, Destination] = Field(description="By name.")
    telemetry: TelemetryConfig = TelemetryConfig()


# ------------------------------------------------------------------ routes.yaml


class Operator(StrEnum):
    """What a clause may ask of an attribute."""

    EQUALS = "equals"
    IN = "in"
    CONTAINS = "contains"
    MIN = "min"
    MAX = "max"
    EXISTS = "exists"
    NOT = "not"


class Clause(Section):
    """One test of one attribute; several operators in one clause must all hold.

    Text is compared without regard to case and surrounding spaces; of several values one must
    match. `not` holds a clause that must be false.
    """

    equals: str | None = Field(None, description="The value is this text.")
    one_of: tuple[str, ...] | None = Field(
        None, alias="in", min_length=1, description="The value is one of these."
    )
    contains: str | None = Field(None, description="The value contains this text.")
    min: float | None = Field(None, description="The value is a number of at least this.")
    max: float | None = Field(None, description="The value is a number of at most this.")
    exists: Bool | None = Field(None, description="The attribute has a value, or has none.")
    negated: Clause | None = Field(None, alias="not", description="This clause must be false.")

    @model_validator(mode="after")
    def _asks_something(self) -> Clause:
        asked = {name for name in type(self).model_fields if getattr(self, name) is not None}
        if not asked or asked != self.model_fields_set:
            # a clause that asks nothing would match every image
            raise ValueError(f"an empty clause or value; give one of {', '.join(Operator)}")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: nothing can match")
        return self


class TriggerKind(StrEnum):
    """When a unit counts as complete."""

    INSTANCE = "instance"
    ASSOCIATION_RELEASE = "association_release"
    QUIET = "quiet"


class SendRule(Section):
    """Which object goes where."""

    object: Literal[ObjectKind.SC, ObjectKind.SEG] = Field(description="sc | seg")
    to: tuple[Name, ...] = Field(min_length=1, description="Names of destinations.")
    slices: int | None = Field(None, ge=1, le=64, description="On an sc of a series: the k best.")

    @model_validator(mode="after")
    def _slices_only_on_sc(self) -> SendRule:
        if self.slices is not None and self.object is not ObjectKind.SC:
            raise ValueError("slices stands on an sc only")
        return self


class Route(Section):
    """One route: which units, which model, which results, where to."""

    name: Name
    description: str = Field("", description="For people.")
    enabled: Bool = Field(True, description="false: the route matches nothing.")
    when: dict[Keyword, Clause] = Field(description="All clauses must hold; {} matches everything.")
    per: Per | None = Field(None, description="instance | series | study; default by the model.")
    trigger: TriggerKind = Field(description="instance | association_release | quiet")
    quiet_s: Seconds = Field(0.75, gt=0, le=3600, description="Silence after which it is complete.")
    max_wait_s: Seconds = Field(60.0, gt=0, le=86400, description="The longest wait.")
    when_incomplete: Literal["partial", "hold"] = Field("partial", description="At max_wait_s.")
    model: Name
    explain: tuple[Name, ...] = Field(min_length=1, description="In order of preference.")
    findings: int = Field(3, ge=1, le=16, description="At most so many classes get a map.")
    send: tuple[SendRule, ...] = Field(min_length=1)
    on_failure: Literal["note", "silent"] = Field("note", description="note: a text SC with why.")
    priority: Priority = Field(Priority.ROUTINE, description="stat | routine")
    budget_s: Seconds = Field(2.0, gt=0, le=86400, description="From ready to triaged.")

    @model_validator(mode="after")
    def _trigger_fits_the_unit(self) -> Route:
        if self.trigger is TriggerKind.INSTANCE and self.per not in (None, Per.INSTANCE):
            raise ValueError(f"trigger instance needs per: instance, found per: {self.per}")
        return self

    @property
    def objects(self) -> tuple[ObjectKind, ...]:
        """The kinds this route sends, each once."""
        return tuple(dict.fromkeys(ObjectKind(rule.object) for rule in self.send))

    def destinations_of(self, kind: ObjectKind) -> tuple[str, ...]:
        """Where objects of this kind go; a note goes wherever an sc would."""
        wanted = ObjectKind.SC if kind is ObjectKind.NOTE else kind
        names = [name for rule in self.send if rule.object == wanted for name in rule.to]
        if kind is ObjectKind.NOTE and not names:
            names = [name for rule in self.send for name in rule.to]
        return tuple(dict.fromkeys(names))

    @property
    def slices(self) -> int:
        """How many slices of a series get an sc."""
        return next((rule.slices for rule in self.send if rule.slices is not None), 1)


class RouteTest(Section):
    """An example that the admin wants to stay true."""

    name: str
    attributes: dict[Keyword, str] = Field(description="Keyword or sender fact: value.")
    expect: tuple[Name, ...] = Field(description="Names of the routes that must match; [] = none.")


class RoutesConfig(Section):
    """config/routes.yaml"""

    match: Literal["all", "first"] = Field("all", description="all routes, or the first that fits.")
    routes: tuple[Route, ...] = Field(min_length=1)
    tests: tuple[RouteTest, ...] = ()


# ------------------------------------------------------------------ models/NAME.yaml


class InputKind(StrEnum):
    """What a model takes."""

    IMAGE2D = "image2d"
    SLICES = "slices"
    VOLUME3D = "volume3d"


class ResizeRule(StrEnum):
    """How a frame meets the model's grid."""

    LETTERBOX = "letterbox"  #: aspect kept, rest filled with the lowest value
    STRETCH = "stretch"  #: both axes on their own


class WindowSource(StrEnum):
    """Where the window of the model's input comes from."""

    FIXED = "fixed"  #: center and width of the card, in modality units
    SOURCE = "source"  #: the image's own VOI, else the percentiles
    PERCENTILE = "percentile"  #: low and high percentile of the valid pixels


class Windowing(Section):
    """How modality units become 0..1."""

    source: WindowSource
    center: float | None = Field(None, description="fixed: in modality units.")
    width: float | None = Field(None, gt=0, description="fixed: in modality units.")
    low_percentile: float = Field(0.5, ge=0, le=100)
    high_percentile: float = Field(99.5, ge=0, le=100)

    @model_validator(mode="after")
    def _fixed_is_given(self) -> Windowing:
        if self.source is WindowSource.FIXED and (self.center is None or self.width is None):
            raise ValueError("windowing source fixed needs center and width")
        if self.low_percentile >= self.high_percentile:
            raise ValueError("low_percentile must be below high_percentile")
        return self


class ModelInput(Section):
    """One input tensor."""

    name: str = Field(description="The ONNX input's name.")
    kind: InputKind
    size: tuple[int, ...] = Field(min_length=2, max_length=3, description="rows, columns.")
    windowing: Windowing
    scaling: tuple[float, float] = Field(
        (0.0, 1.0), description="What 0 and 1 after windowing become."
    )
    photometric: Literal["MONOCHROME1", "MONOCHROME2"] = Field(
        "MONOCHROME2", description="Which end of the range the model sees as bright."
    )
    resize: ResizeRule = ResizeRule.LETTERBOX


class Code(Section):
    """A coded concept (PS3.3 Table 8.8-1)."""

    value: str = Field(min_length=1, max_length=16)
    scheme: str = Field(min_length=1, max_length=16)
    meaning: str = Field(min_length=1, max_length=64)


class ModelClass(Section):
    """One class of a classifier."""

    name: Name
    label: str = Field(min_length=1, max_length=48, description="As the legend shows it; ASCII.")
    threshold: float = Field(gt=0, lt=1, description="Positive at or above it.")
    category: Code = Field(description="Segmented Property Category.")
    type: Code = Field(description="Segmented Property Type.")


class ModelOutput(Section):
    """One output tensor."""

    name: str = Field(description="The ONNX output's name.")
    kind: Literal["classification", "segmentation"]
    activation: Literal["sigmoid", "softmax", "none"] = Field(
        description="What makes scores of the output; none = the output holds scores already."
    )
    classes: tuple[ModelClass, ...] = Field(min_length=1)


class HeatmapScale(Section):
    """The absolute scale of the maps, in the map's own unit."""

    full_scale: float = Field(gt=0, description="Drawn in the strongest colour.")
    threshold: float = Field(gt=0, description="Below it nothing is drawn and nothing segmented.")
    layer: str = Field("auto", description="Tensor to explain; auto = last before pooling.")
    measured: str = Field("", description="How and on what the two numbers were measured.")


class ModelCard(Section):
    """config/models/NAME.yaml: what a model is, takes and gives."""

    name: Name
    version: str = Field(min_length=1, max_length=32)
    file: Path
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    intended_use: str = Field(min_length=1)
    manufacturer: str = Field(min_length=1, max_length=64)
    calibrated: Bool = Field(description="true: scores are calibrated probabilities.")
    inputs: tuple[ModelInput, ...] = Field(min_length=1)
    outputs: tuple[ModelOutput, ...] = Field(min_length=1)
    heatmap: HeatmapScale
    performance: dict[str, str] = Field(default_factory=dict, description="Figures, for people.")

    @property
    def classes(self) -> tuple[ModelClass, ...]:
        """The classes of the first output."""
        return self.outputs[0].classes

    @property
    def digest(self) -> str:
        """SHA-256 over all that decides a result: the card's values, the file's hash among them."""
        return hashlib.sha256(self.model_dump_json(exclude={"file"}).encode()).hexdigest()

    @property
    def default_per(self) -> Per:
        """The unit a route works on when it does not say."""
        return Per.INSTANCE if self.inputs[0].kind is InputKind.IMAGE2D else Per.SERIES


# ------------------------------------------------------------------ reading


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a file.

    `is_lint` says that the config still works: a warning, not an error.
    """

    file: Path
    line: int
    column: int
    message: str
    is_lint: bool = False

    def __str__(self) -> str:
        word = "warning" if self.is_lint else "error"
        return f"{self.file}:{self.line}:{self.column}: {word}: {self.message}"


class ProblemsError(ConfigError):
    """All that is wrong with the config, at once, in `.problems`."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


def nearest(word: str, known: Sequence[str]) -> str:
    """A `; did you mean X?` for a misspelt word, or nothing."""
    lowered = {item.lower(): item for item in known}
    close = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""


Marks = dict[tuple[str | int, ...], tuple[int, int]]
S = TypeVar("S", bound=Section)


def read_yaml(path: Path) -> tuple[object, Marks]:
    """The file as dicts, lists and text, and the line and column of every value.

    Raises
    ------
    ProblemsError
        Unreadable, no YAML, duplicate keys, anchors that multiply, or keys that are not text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ProblemsError([Problem(path, 1, 1, f"cannot be read: {error.strerror}")]) from error
    if len(data) > MAX_YAML_BYTES:
        raise ProblemsError([Problem(path, 1, 1, f"has more than {MAX_YAML_BYTES} bytes")])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        raise ProblemsError([Problem(path, *_position(before), "is not UTF-8")]) from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        message = ", ".join(part for part in (error.context, error.problem) if part)
        raise ProblemsError([Problem(path, line, column, message)]) from error
    except yaml.reader.ReaderError as error:
        position = _position(text[: error.position])
        message = f"a character that YAML does not allow: #x{error.character:04x}"
        raise ProblemsError([Problem(path, *position, message)]) from error
    except RecursionError as error:
        raise ProblemsError([Problem(path, 1, 1, "is nested too deep")]) from error
    marks: Marks = {}
    problems: list[Problem] = []
    budget = [MAX_YAML_NODES]
    value = _plain(root, (), path, marks, problems, budget) if root is not None else {}
    if budget[0] <= 0:
        message = f"more than {MAX_YAML_NODES} values, or {MAX_YAML_DEPTH} levels (aliases?)"
        problems.append(Problem(path, 1, 1, message))
    if problems:
        raise ProblemsError(problems)
    return value, marks


def _position(before: str) -> tuple[int, int]:
    """Line and column of what follows `before`."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _plain(
    node: yaml.Node,
    where: tuple[str | int, ...],
    path: Path,
    marks: Marks,
    problems: list[Problem],
    budget: list[int],
) -> object:
    budget[0] -= 1
    if budget[0] <= 0 or len(where) > MAX_YAML_DEPTH:
        budget[0] = 0
        return None
    mark = (node.start_mark.line + 1, node.start_mark.column + 1)
    marks.setdefault(where, mark)
    if isinstance(node, yaml.ScalarNode):
        is_null = node.tag.endswith(":null") and node.value in ("", "~", "null")
        return None if is_null else node.value
    if isinstance(node, yaml.SequenceNode):
        return [
            _plain(item, (*where, i), path, marks, problems, budget)
            for i, item in enumerate(node.value)
        ]
    mapping: dict[str, object] = {}
    for key, item in node.value:
        line, column = key.start_mark.line + 1, key.start_mark.column + 1
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            problems.append(Problem(path, line, column, "a key must be a plain word"))
            continue
        if key.value in mapping:
            problems.append(Problem(path, line, column, f"key {key.value!r} stands here twice"))
        marks[(*where, key.value)] = (line, column)
        mapping[key.value] = _plain(item, (*where, key.value), path, marks, problems, budget)
    return mapping


def parse(path: Path, model: type[S]) -> tuple[S, Marks]:
    """A file as its model.

    Raises
    ------
    ProblemsError
        With every problem of the file.
    """
    value, marks = read_yaml(path)
    try:
        return model.model_validate(value), marks
    except ValidationError as error:
        raise ProblemsError(list(_problems_of(error, path, marks, model))) from error


def _problems_of(
    error: ValidationError, path: Path, marks: Marks, model: type[Section]
) -> Iterator[Problem]:
    items = error.errors(include_url=False)
    for item in items:
        if item["type"] == "too_short" and _is_about_a_part(items, item["loc"]):
            continue  # a list counts only its good items; the bad one is reported by itself
        where = tuple(part for part in item["loc"] if part != "[key]")
        key = where
        while key not in marks and key:
            key = key[:-1]
        line, column = marks.get(key, (1, 1))
        dotted = ".".join(map(str, where)) or "the file"
        if item["type"] == "extra_forbidden":
            known = _known_keys(model, where[:-1])
            message = f"unknown key {where[-1]!r}{nearest(str(where[-1]), known)}"
        elif item["type"] == "missing":
            message = f"{dotted} is missing"
        elif item["type"] == "value_error":
            message = f"{dotted}: {item['ctx']['error']}"
        else:
            found = item["input"]
            shown = f", found {found!r}" if isinstance(found, str | int | float) else ""
            word = ""
            if item["type"] in ("enum", "literal_error") and isinstance(found, str):
                expected = re.findall(r"'([^']*)'", str(item.get("ctx", {}).get("expected", "")))
                word = nearest(found, expected)
            message = f"{dotted}: {item['msg']}{shown}{word}"
        yield Problem(path, line, column, message)


def _is_about_a_part(items: Sequence[ErrorDetails], where: tuple[int | str, ...]) -> bool:
    """Whether one of the errors lies below `where`."""
    size = len(where)
    return any(item["loc"][:size] == where and len(item["loc"]) > size for item in items)


def _known_keys(model: type[Section], where: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `where` knows, found by walking the JSON Schema."""
    schema = model.model_json_schema()
    definitions: Mapping[str, Any] = schema.get("$defs", {})

    def resolve(node: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in node:
            node = definitions[node["$ref"].rsplit("/", 1)[-1]]
        for option in node.get("anyOf", ()):
            if "$ref" in option or option.get("type") in ("object", "array"):
                return resolve(option)
        return node

    node = resolve(schema)
    for part in where:
        if isinstance(part, int):
            node = resolve(node.get("items", {}))
        elif part in node.get("properties", {}):
            node = resolve(node["properties"][part])
        else:
            node = resolve(node.get("additionalProperties") or {})
    return list(node.get("properties", {}))


def parse_address(text: str, calling_ae_title: str) -> Destination:
    """A destination from ``AE@HOST:PORT``, for commands.

    Raises
    ------
    ConfigError
        It is written otherwise.
    """
    ae_title, _, rest = text.partition("@")
    host, _, port = rest.rpartition(":")
    values = {"ae_title": ae_title, "host": host, "port": port}
    try:
        return Destination.model_validate(
            {"type": "dimse", "calling_ae_title": calling_ae_title, **values}
        )
    except ValidationError as error:
        raise ConfigError(f"found {text!r}, wanted AE@HOST:PORT") from error


# ------------------------------------------------------------------ the whole config


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the roles need to know, all paths absolute."""

    path: Path
    service: ServiceConfig
    routes: RoutesConfig
    cards: Mapping[str, ModelCard]

    @property
    def digest(self) -> str:
        """SHA-256 of all values: which revision is live."""
        parts = [self.service.model_dump_json(), self.routes.model_dump_json()]
        parts += [card.model_dump_json() for _, card in sorted(self.cards.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load(path: Path) -> tuple[Config, list[Problem]]:
    """The config and its lint.

    Raises
    ------
    ProblemsError
        With every error of every file: one bad file does not hide the others.
    """
    path = path.resolve()
    errors: list[Problem] = []
    service, service_marks = _parse_or_collect(path, ServiceConfig, errors)
    if service is None:
        routes_file, models_folder = _places(path)
    else:
        service = _absolute(service, path.parent)
        routes_file, models_folder = service.routes, service.models.directory
    cards: dict[str, ModelCard] = {}
    files = sorted(models_folder.glob("*.yaml")) if models_folder else []
    if models_folder and not files:
        line, column = service_marks.get(("models", "directory"), (1, 1))
        message = f"models.directory: {models_folder} holds no model card (NAME.yaml)"
        errors.append(Problem(path, line, column, message))
    for file in files:
        card, marks = _parse_or_collect(file, ModelCard, errors)
        if card is not None:
            card = card.model_copy(update={"file": (file.parent / card.file).resolve()})
            errors += _card_problems(card, file, marks)
            cards[card.name] = card
    routes = None
    lint: list[Problem] = []
    if routes_file:
        routes, routes_marks = _parse_or_collect(routes_file, RoutesConfig, errors)
        names = _Names(
            models=tuple(file.stem for file in files),
            units={name: card.default_per for name, card in cards.items()},
            destinations=None if service is None else tuple(service.destinations),
        )
        readable = dict(enumerate(routes.routes)) if routes else _readable_routes(routes_file)
        for index, route in readable.items():
            errors += _route_problems(index, route, names, routes_file, routes_marks)
        if routes is not None:
            found = list(_routes_problems(routes, routes_file, routes_marks))
            errors += [problem for problem in found if not problem.is_lint]
            lint = [problem for problem in found if problem.is_lint]
    if service is not None and routes is not None:
        lint += _unused(service, routes, path, service_marks)
    if errors or service is None or routes is None:
        raise ProblemsError(errors + lint)
    return Config(path, service, routes, cards), lint


def _places(path: Path) -> tuple[Path | None, Path | None]:
    """Where routes and models are, as far as a faulty service file says."""
    try:
        raw, _ = read_yaml(path)
    except ProblemsError:
        return None, None
    top = raw if isinstance(raw, dict) else {}
    models = top.get("models")
    directory = models.get("directory") if isinstance(models, dict) else None
    return (
        (path.parent / top["routes"]).resolve() if isinstance(top.get("routes"), str) else None,
        (path.parent / directory).resolve() if isinstance(directory, str) else None,
    )


def _readable_routes(path: Path) -> dict[int, Route]:
    """The faultless routes of a file that has faults, by their place in it."""
    try:
        raw, _ = read_yaml(path)
    except ProblemsError:
        return {}
    items = raw.get("routes") if isinstance(raw, dict) else None
    found: dict[int, Route] = {}
    for index, item in enumerate(items if isinstance(items, list) else []):
        with suppress(ValidationError):
            found[index] = Route.model_validate(item)
    return found


def _parse_or_collect(path: Path, model: type[S], errors: list[Problem]) -> tuple[S | None, Marks]:
    try:
        return parse(path, model)
    except ProblemsError as error:
        errors += error.problems
        return None, _marks(path)


def _marks(path: Path) -> Marks:
    try:
        return read_yaml(path)[1]
    except ProblemsError:
        return {}


def _absolute(service: ServiceConfig, folder: Path) -> ServiceConfig:
    def at(path: Path) -> Path:
        return (folder / path).resolve()

    url = service.ledger.url
    if url.startswith("sqlite:///") and not url.startswith("sqlite:////"):
        url = f"sqlite:///{at(Path(url.removeprefix('sqlite:///')))}"
    return service.model_copy(
        update={
            "spool": service.spool.model_copy(update={"directory": at(service.spool.directory)}),
            "models": ModelsConfig(directory=at(service.models.directory)),
            "routes": at(service.routes),
            "ledger": LedgerConfig(url=url),
        }
    )


def _card_problems(card: ModelCard, file: Path, marks: Marks) -> Iterator[Problem]:
    line, column = marks.get(("file",), (1, 1))
    if card.name != file.stem:
        yield Problem(file, *marks.get(("name",), (1, 1)), f"name {card.name!r} is not the file's")
    if not card.file.is_file():
        yield Problem(file, line, column, f"file: {card.file.name} does not exist beside the card")
        return
    digest = hashlib.sha256(card.file.read_bytes()).hexdigest()
    if digest != card.sha256:
        line, column = marks.get(("sha256",), (1, 1))
        yield Problem(file, line, column, f"sha256: {card.file.name} hashes to {digest}")


@dataclass(frozen=True, slots=True)
class _Names:
    """What a route may name; a card with faults still has a name. None: not known."""

    models: tuple[str, ...]
    units: Mapping[str, Per]
    destinations: tuple[str, ...] | None


def _route_problems(
    index: int, route: Route, names: _Names, file: Path, marks: Marks
) -> Iterator[Problem]:
    """Names that must exist elsewhere, and a trigger that must suit the model's unit."""

    def at(*where: str | int) -> tuple[int, int]:
        return marks.get(("routes", index, *where), (1, 1))

    here = f"route {route.name!r}: "
    if names.models and route.model not in names.models:
        message = f"{here}no model {route.model!r}{nearest(route.model, names.models)}"
        yield Problem(file, *at("model"), message)
    per = route.per or names.units.get(route.model, Per.INSTANCE)
    if route.trigger is TriggerKind.INSTANCE and per is not Per.INSTANCE:
        message = f"{here}trigger instance, but model {route.model!r} works per {per}"
        yield Problem(file, *at("trigger"), message)
    for j, rule in enumerate(route.send):
        for k, name in enumerate(rule.to):
            if names.destinations is not None and name not in names.destinations:
                message = f"{here}no destination {name!r}{nearest(name, names.destinations)}"
                yield Problem(file, *at("send", j, "to", k), message)


def _routes_problems(routes: RoutesConfig, file: Path, marks: Marks) -> Iterator[Problem]:
    """What no route can see alone: equal names, routes that hide others, tests."""

    def at(*where: str | int) -> tuple[int, int]:
        return marks.get(where, (1, 1))

    names = [route.name for route in routes.routes]
    for i, route in enumerate(routes.routes):
        here = f"route {route.name!r}: "
        if route.name in names[:i]:
            message = f"two routes are named {route.name!r}"
            yield Problem(file, *at("routes", i, "name"), message)
        if not route.when and route.enabled:
            message = f"{here}matches every image; write a `when` clause"
            yield Problem(file, *at("routes", i, "when"), message, is_lint=True)
        if routes.match == "first" and route.enabled and _is_hidden(routes.routes[:i], route):
            message = f"{here}is never reached: an earlier route matches all it could match"
            yield Problem(file, *at("routes", i, "name"), message, is_lint=True)
        if route.trigger is TriggerKind.QUIET and route.quiet_s >= route.budget_s:
            message = f"{here}quiet_s {route.quiet_s:g} is no shorter than the budget"
            yield Problem(file, *at("routes", i, "quiet_s"), message, is_lint=True)
    for i, test in enumerate(routes.tests):
        for k, name in enumerate(test.expect):
            if name not in names:
                message = f"test {test.name!r}: no route {name!r}{nearest(name, names)}"
                yield Problem(file, *at("tests", i, "expect", k), message)
    if not routes.tests:
        yield Problem(file, 1, 1, "no tests: nothing proves the routes", is_lint=True)


def _unused(
    service: ServiceConfig, routes: RoutesConfig, file: Path, marks: Marks
) -> Iterator[Problem]:
    used = {name for route in routes.routes for rule in route.send for name in rule.to}
    for name in service.destinations:
        if name not in used:
            position = marks.get(("destinations", name), (1, 1))
            message = f"destination {name!r} is used by no route"
            yield Problem(file, *position, message, is_lint=True)


def _is_hidden(earlier: tuple[Route, ...], route: Route) -> bool:
    """An earlier enabled route whose clauses are all among this route's hides it."""
    return any(
        other.enabled and all(route.when.get(key) == clause for key, clause in other.when.items())
        for other in earlier
    )

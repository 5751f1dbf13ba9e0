"""All files of a config as one, checked against each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import (
    ValidationError,
)

from dicom_xai.config.cards import InputKind, ModelCard
from dicom_xai.config.reading import Marks, Problem, ProblemsError, S, parse, read_yaml
from dicom_xai.config.routes import Layout, Route, RoutesConfig, SegmentationKind, TriggerKind
from dicom_xai.config.service import LedgerConfig, ServiceConfig
from dicom_xai.config.tls import ClientTLS, ListenerTLS
from dicom_xai.config.types import Section, nearest
from dicom_xai.errors import ConfigError
from dicom_xai.study import Per
from dicom_xai.tls import Credentials


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
    lint: list[Problem] = []
    service, service_marks = _parse_or_collect(path, ServiceConfig, errors)
    if service is None:
        routes_file, models_folder = _places(path)
    else:
        service = _absolute(service, path.parent)
        routes_file, models_folder = service.routes, service.models.directory
        of_tls = list(_tls_problems(service, path, service_marks))
        errors += [problem for problem in of_tls if not problem.is_lint]
        lint += [problem for problem in of_tls if problem.is_lint]
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
    if routes_file:
        routes, routes_marks = _parse_or_collect(routes_file, RoutesConfig, errors)
        names = _Names(
            models=tuple(file.stem for file in files),
            cards=cards,
            destinations=None if service is None else tuple(service.destinations),
        )
        readable = dict(enumerate(routes.routes)) if routes else _readable_routes(routes_file)
        for index, route in readable.items():
            errors += _route_problems(index, route, names, routes_file, routes_marks)
        if routes is not None:
            found = list(_routes_problems(routes, routes_file, routes_marks))
            errors += [problem for problem in found if not problem.is_lint]
            lint += [problem for problem in found if problem.is_lint]
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
    """The same with every path made absolute, the ledger's too."""

    def at(path: Path) -> Path:
        return (folder / path).resolve()

    url = service.ledger.url
    if url.startswith("sqlite:///") and not url.startswith("sqlite:////"):
        url = f"sqlite:///{at(Path(url.removeprefix('sqlite:///')))}"
    moved = _with_paths(service, at)
    beside = Path(url.removeprefix("sqlite:///")).parent / "audit"
    audit = moved.audit.model_copy(update={"directory": moved.audit.directory or beside})
    return moved.model_copy(update={"ledger": LedgerConfig(url=url), "audit": audit})


def _with_paths(section: S, at: Callable[[Path], Path]) -> S:
    """A section whose paths, however deep, went through `at`."""

    def moved(value: object) -> object:
        if isinstance(value, Path):
            return at(value)
        if isinstance(value, Section):
            return _with_paths(value, at)
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if isinstance(value, dict):
            return {key: moved(each) for key, each in value.items()}
        return value

    names = type(section).model_fields
    return section.model_copy(update={name: moved(getattr(section, name)) for name in names})


def _tls_problems(service: ServiceConfig, file: Path, marks: Marks) -> Iterator[Problem]:
    """Certificates and keys that cannot be used; those of another day are only warned of."""
    places: list[tuple[tuple[str | int, ...], str, ListenerTLS | ClientTLS | None]] = []
    for index, listener in enumerate(service.receive.listeners):
        places.append((("receive", "listeners", index, "tls"), listener.ae_title, listener.tls))
    for name, destination in service.destinations.items():
        places.append((("destinations", name, "tls"), name, destination.tls))
    for title, requester in service.receive.commitment.items():
        places.append((("receive", "commitment", title, "tls"), title, requester.tls))
    if service.audit.syslog is not None:
        places.append((("audit", "syslog", "tls"), "audit", service.audit.syslog.tls))
    for place, use, files in places:
        if files is None:
            continue
        position = marks.get(place, (1, 1))
        try:
            certificate = Credentials(use, files).certificate
        except ConfigError as error:
            yield Problem(file, *position, f"{'.'.join(map(str, place))}: {error}")
            continue
        if certificate is not None and certificate.problem:
            message = f"{'.'.join(map(str, place))}: {certificate.problem}"
            yield Problem(file, *position, message, is_lint=True)


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
    cards: Mapping[str, ModelCard]
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
    card = names.cards.get(route.model)
    per = route.per or (card.default_per if card else Per.INSTANCE)
    if route.trigger is TriggerKind.INSTANCE and per is not Per.INSTANCE:
        message = f"{here}trigger instance, but model {route.model!r} works per {per}"
        yield Problem(file, *at("trigger"), message)
    for j, rule in enumerate(route.send):
        if rule.kind is SegmentationKind.FRACTIONAL and card and not card.segments:
            message = (
                f"{here}kind fractional is for the probabilities of a segmentation model, and "
                f"model {route.model!r} has no output of kind segmentation; use binary or labelmap"
            )
            yield Problem(file, *at("send", j, "kind"), message)
        if rule.layout is Layout.STACK and card and card.inputs[0].kind is InputKind.IMAGE2D:
            message = f"{here}layout stack is for series, and model {route.model!r} takes images"
            yield Problem(file, *at("send", j, "layout"), message)
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

"""Is this config good? Every file, every route's test, every model, before anything runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dicom_xai.config import Config, Problem, ProblemsError, load, nearest, read_yaml
from dicom_xai.errors import ConfigError
from dicom_xai.route.selftest import failures


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What loading one model showed."""

    model: str
    version: str
    device: str
    explainer: str
    layer: str
    is_bit_identical: bool
    largest_difference: float
    backward_nodes: dict[str, int]
    gradient_error: float | None
    no_gradient: str
    does_not_apply: dict[str, str]
    seconds_per_image: float
    plain_seconds_per_image: float


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All problems and, where the files are good, what the models showed."""

    problems: tuple[Problem, ...]
    models: tuple[ModelReport, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 clean, 1 lint only, 2 errors."""
        if any(not problem.is_lint for problem in self.problems):
            return 2
        return 1 if self.problems else 0


def check(path: Path) -> CheckReport:
    """Prove a config: files, names, routes' tests, models on the configured devices."""
    try:
        config, lint = load(path)
    except ProblemsError as error:
        return CheckReport(tuple(error.problems))
    unknown = _unknown_explainers(config)
    problems = [*route_problems(config), *unknown, *lint]
    models: list[ModelReport] = []
    for device in config.service.devices if not unknown else ():
        try:
            models += _model_reports(config, device)
        except ConfigError as error:
            problems.append(Problem(config.path, 1, 1, str(error)))
    return CheckReport(tuple(problems), tuple(models))


def route_problems(config: Config) -> list[Problem]:
    """The routes' tests that fail, as errors of the routes file."""
    path = config.service.routes
    _, marks = read_yaml(path)
    return [
        Problem(path, *marks.get(("tests", index), (1, 1)), message)
        for index, message in failures(config.routes)
    ]


def _unknown_explainers(config: Config) -> list[Problem]:
    """Methods that routes name and nobody knows."""
    # here and not above: the table of explainers loads torch
    from dicom_xai.explain import EXPLAINERS

    path = config.service.routes
    _, marks = read_yaml(path)
    known = list(EXPLAINERS)
    all_known = f"; known: {', '.join(known)}"
    return [
        Problem(
            path,
            *marks.get(("routes", i, "explain", k), (1, 1)),
            f"route {route.name!r}: no explainer {name!r}{nearest(name, known) or all_known}",
        )
        for i, route in enumerate(config.routes.routes)
        for k, name in enumerate(route.explain)
        if name not in EXPLAINERS
    ]


def _model_reports(config: Config, asked: str) -> list[ModelReport]:
    # here and not above: only a check loads torch and ONNX Runtime, not whoever imports this module
    from dicom_xai.infer.session import resolve_device
    from dicom_xai.service.modelfiles import load_models

    device = resolve_device(asked)
    return [
        ModelReport(
            model=served.card.name,
            version=served.card.version,
            device=device.name,
            explainer=explainer,
            layer=served.graph(explainer).layer,
            is_bit_identical=test.is_bit_identical,
            largest_difference=test.largest_difference,
            backward_nodes=dict(test.backward_nodes),
            gradient_error=served.gradient_error,
            no_gradient=served.no_gradient,
            does_not_apply=served.inapplicable_methods(),
            seconds_per_image=served.costs.seconds(explainer, 1),
            plain_seconds_per_image=served.costs.seconds("", 1),
        )
        for served in load_models(config, device).values()
        for explainer, test in served.self_tests.items()
    ]

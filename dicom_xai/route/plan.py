"""Which routes want an arriving instance, as part of which unit, and why or why not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pydicom import Dataset

from dicom_xai.config import Route, RoutesConfig
from dicom_xai.route.match import Facts, Verdict, facts_of, keywords_of, match
from dicom_xai.study import Per, Sender, Unit


@dataclass(frozen=True, slots=True)
class Plan:
    """The routes that fit one instance, and the verdict on each route that was asked."""

    routes: tuple[Route, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def trace(self) -> str:
        """JSON: route name to why it matched or did not; the ledger keeps it."""
        lines = {
            verdict.route: ("yes: " if verdict.is_match else "no: ") + verdict.reason
            for verdict in self.verdicts
        }
        return json.dumps(lines)


def plan(facts: Facts, config: RoutesConfig) -> Plan:
    """Ask the routes in order; with `match: first`, none after the first that fits."""
    verdicts: list[Verdict] = []
    chosen: list[Route] = []
    for route in config.routes:
        if chosen and config.match == "first":
            verdicts.append(Verdict(route.name, False, f"{chosen[0].name} came first"))
            continue
        verdict = match(route, facts)
        verdicts.append(verdict)
        if verdict.is_match:
            chosen.append(route)
    return Plan(tuple(chosen), tuple(verdicts))


def plan_instance(header: Dataset, sender: Sender, config: RoutesConfig) -> Plan:
    """As `plan`, for a received header."""
    return plan(facts_of(header, sender, keywords_of(config.routes)), config)


def unit_of(route: Route, default_per: Mapping[str, Per], uids: tuple[str, str, str]) -> Unit:
    """The unit of an instance on a route.

    Parameters
    ----------
    route : Route
    default_per : mapping
        Model name to the unit that suits its input, for routes that do not say.
    uids : tuple of str
        Study, Series and SOP Instance UID.
    """
    study, series, sop = uids
    per = route.per or default_per[route.model]
    return Unit(
        per,
        study,
        series if per is not Per.STUDY else "",
        sop if per is Per.INSTANCE else "",
    )

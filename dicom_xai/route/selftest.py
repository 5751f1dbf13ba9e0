"""The examples in the routes file: does each still match what its admin expects?"""

from __future__ import annotations

from collections.abc import Iterator

from dicom_xai.config import RoutesConfig, RouteTest
from dicom_xai.route.plan import plan


def failures(config: RoutesConfig) -> Iterator[tuple[int, str]]:
    """The tests that fail: their index and what to know to mend them."""
    for index, test in enumerate(config.tests):
        message = _failure(test, config)
        if message:
            yield index, message


def _failure(test: RouteTest, config: RoutesConfig) -> str:
    facts = {
        keyword: tuple(text.split("\\"))
        for keyword, text in test.attributes.items()
        if text.strip()
    }
    found = plan(facts, config)
    names = [route.name for route in found.routes]
    if sorted(names) == sorted(test.expect):
        return ""
    differing = set(names) ^ set(test.expect)
    reasons = "; ".join(
        f"{verdict.route}: {verdict.reason}"
        for verdict in found.verdicts
        if verdict.route in differing
    )
    wanted = ", ".join(test.expect) or "no route"
    return f"test {test.name!r}: expected {wanted}, found {', '.join(names) or 'none'} ({reasons})"

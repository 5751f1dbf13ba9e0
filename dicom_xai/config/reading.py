"""YAML to a model, with the place of everything that is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import (
    ValidationError,
)
from pydantic_core import ErrorDetails

from dicom_xai.config.types import Section, nearest
from dicom_xai.errors import ConfigError

MAX_YAML_BYTES = 1_000_000
MAX_YAML_NODES = 100_000
MAX_YAML_DEPTH = 64


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

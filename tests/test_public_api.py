"""The docstrings of the public names say what goes in, what comes out, and what is raised."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
from pydantic import BaseModel

import ditfastattn

NEVER_RAISE = {"generation", "quality", "reports", "reset"}
PUBLIC = {name: getattr(ditfastattn, name) for name in ditfastattn.__all__}
FUNCTIONS = [name for name, item in PUBLIC.items() if inspect.isfunction(item)]
CLASSES = [
    name
    for name, item in PUBLIC.items()
    if inspect.isclass(item) and not issubclass(item, (Enum, Exception))
]


def section(docstring: str, title: str) -> str:
    """Return the lines below ``title``, or "" where there is no such section."""
    found = re.search(rf"^{title}:\n((?:[ ]{{4,}}.*\n?|\n)+)", docstring, re.MULTILINE)
    return found[1] if found else ""


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def faults(name: str, function: Callable[..., Any]) -> list[str]:
    """Return what the docstring of a public function lacks."""
    docstring = inspect.getdoc(function) or ""
    described = re.findall(r"^ {4}\*{0,2}(\w+): \S", section(docstring, "Args"), re.MULTILINE)
    found = [f"Args: {each}" for each in parameters(function) if each not in described]
    returned = inspect.signature(function).return_annotation
    if returned not in ("None", None, inspect.Signature.empty) and not section(
        docstring, "Returns"
    ):
        found.append("Returns")
    if name not in NEVER_RAISE and not section(docstring, "Raises"):
        found.append("Raises")
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functions_docstring_is_complete(name: str) -> None:
    assert faults(name, PUBLIC[name]) == []


def test_what_a_docstring_lacks_is_found() -> None:
    def poor(first: int, second: int) -> int:
        """Do something with ``second``.

        Args:
            first: a number.
        """
        return first

    assert faults("poor", poor) == ["Args: second", "Returns", "Raises"]


def fields(kind: type[Any]) -> list[str]:
    if issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return (
        [each.name for each in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    )


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_describes_its_fields_and_what_its_methods_take(name: str) -> None:
    kind = PUBLIC[name]
    attributes = section(inspect.getdoc(kind) or "", "Attributes")
    lacking = [each for each in fields(kind) if not re.search(rf"^ +{each}: \S", attributes, re.M)]
    for member, item in vars(kind).items():
        function = item.__func__ if isinstance(item, classmethod) else item
        if member.startswith("_") or member in fields(kind) or not inspect.isfunction(function):
            continue
        docstring = function.__doc__ or ""
        named = [
            each
            for each in parameters(function)
            if not re.search(rf"``{each}``|^ +{each}: \S", docstring, re.MULTILINE)
        ]
        lacking += [f"{member}: {each}" for each in named]
    assert lacking == []

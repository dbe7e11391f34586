"""ARCHITECTURE.md names each file of the rooms that it describes by a table, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
MOST_TERMS = 25


def _sections() -> Iterator[tuple[str, str]]:
    """Yield each section about a folder: the folder, and the text up to the next heading."""
    for section in re.split(r"^#+ ", TEXT, flags=re.M):
        heading = re.match(r"`([a-z_/]+)/`", section)
        if heading is not None:
            yield heading[1], section


def _described() -> dict[str, set[str]]:
    """Return the files that the first column of a section's table names, by folder."""
    return {
        folder: {
            name
            for row in re.findall(r"^\| ([^|]+) \|", section, re.M)
            for name in re.findall(r"`(\w+\.py)`", row)
        }
        for folder, section in _sections()
    }


@pytest.mark.parametrize(
    "folder",
    [
        "passes/graph",
        "passes/windows",
        "passes/capture",
        "passes/analysis",
        "passes/plan",
        "passes/rewrites",
        "export",
        "export/aoti",
        "export/operators",
        "export/tensorrt",
        "export/triton",
        "runtime",
        "runtime/book",
        "runtime/pipeline",
        "runtime/search",
        "runtime/search/measure",
        "runtime/search/solve",
        "runtime/search/judge",
        "runtime/search/record",
        "runtime/search/whole_steps",
        "runtime/aoti",
        "runtime/search/joint",
        "runtime/bundle",
        "runtime/tensorrt",
        "serving",
        "tools/demo",
        "tools/gpu_report",
        "tools/report",
    ],
)
def test_a_room_is_described_file_by_file(folder: str) -> None:
    present = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert _described()[folder] == present


def test_the_glossary_is_short() -> None:
    (glossary,) = re.findall(r"^## Glossary\n(.*?)^## ", TEXT, re.M | re.S)
    terms = re.findall(r"^\| ([^|]+) \|", glossary, re.M)[1:]
    assert 0 < len(terms) <= MOST_TERMS
    assert len(set(terms)) == len(terms)

"""The table of pipelines in docs/compatibility.md holds what the tests exercise."""

from __future__ import annotations

import pytest

from tests.exercises import FAMILIES, PAGE, cells, exercises, page
from tests.tiny_pipelines import TINY_PIPELINES


def test_the_page_holds_the_cells_of_the_tests() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "write it anew: python -m tests.exercises"


def test_every_family_is_exercised() -> None:
    assert TINY_PIPELINES.keys() <= FAMILIES.keys()
    assert {cell.family for cell in cells()} == FAMILIES.keys()


def test_a_family_or_a_feature_that_is_not_in_the_table_is_refused() -> None:
    for feature, families in (("sound", ("dit",)), ("image", ("sdxl",)), ("image", ())):
        with pytest.raises(AssertionError):
            exercises(feature, *families)

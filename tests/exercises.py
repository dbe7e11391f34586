"""The table of pipelines in docs/compatibility.md: each cell is a test that runs the pipeline.

    python -m tests.exercises

writes it anew. Cells are read from the tests' own markers, so that a cell cannot outlive its test.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ditfastattn.core.files import write_text_atomically
from ditfastattn.tools.survey_page import PIPELINES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
FEATURES = (
    *("image", "img2img", "inpaint", "control", "video"),
    *("LoRA", "two-call guidance", "ONNX", "loop"),
)
#: the pipelines of ``tests/tiny_pipelines.py``, as their users call them
FAMILIES = {
    "cogvideox": "CogVideoX",
    "dit": "DiT",
    "flux": "FLUX",
    "ltx": "LTX-Video",
    "pixart": "PixArt",
    "qwenimage": "Qwen-Image",
    "sd3": "Stable Diffusion 3",
    "unet": "Stable Diffusion (U-Net; whole steps alone)",
    "wan": "Wan",
    "z_image": "Z-Image",
}


def exercises(feature: str, *families: str) -> pytest.MarkDecorator:
    """Mark a test that runs the pipelines of ``families`` by a plan, with ``feature``.

    Args:
        feature: one of ``FEATURES``.
        families: keys of ``FAMILIES``; where a test is parametrized, of all its cases.
    """
    assert feature in FEATURES, feature
    assert families, feature
    assert set(families) <= FAMILIES.keys(), families
    return pytest.mark.exercises(feature, families)


@dataclass(frozen=True, order=True)
class Cell:
    """What a test exercises of one family."""

    family: str
    feature: str
    file: str
    test: str


def cells() -> list[Cell]:
    """Return what all tests exercise."""
    return sorted(cell for path in ROOT.glob("tests/**/test_*.py") for cell in _cells_of(path))


def _cells_of(path: Path) -> Iterator[Cell]:
    if "from tests.exercises import" not in path.read_text(encoding="utf-8"):
        return
    file = path.relative_to(ROOT)
    module = importlib.import_module(".".join(file.with_suffix("").parts))
    for name, test in vars(module).items():
        for mark in getattr(test, "pytestmark", ()):
            if name.startswith("test_") and mark.name == exercises.__name__:
                feature, families = mark.args
                yield from (Cell(family, feature, file.as_posix(), name) for family in families)


def page(old: str) -> str:
    """Return the page ``old`` with the cells of today."""
    shown: dict[tuple[str, str], str] = {}
    for cell in cells():
        shown.setdefault((cell.family, cell.feature), f"[yes](../{cell.file})")
    lines = [f"| pipeline | {' | '.join(FEATURES)} |", "|---" * (len(FEATURES) + 1) + "|"]
    for family in sorted(FAMILIES, key=lambda key: FAMILIES[key].lower()):
        row = [shown.get((family, feature), "-") for feature in FEATURES]
        lines.append(f"| {' | '.join([FAMILIES[family], *row])} |")
    return PIPELINES.sub("\n".join([*lines, ""]), old)


def main() -> None:
    """Write the table."""
    write_text_atomically(PAGE, page(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()

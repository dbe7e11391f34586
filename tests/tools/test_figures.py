"""Test that figures are written whole, at a plausible size, and leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from PIL import Image

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import Fingerprint
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.planned_site import PlannedSite
from ditfastattn.passes.plan.schema import Plan, Sampler
from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.tools.figures import (
    curves,
    image_grid,
    plan_map,
)


def make_plan(sites: int, steps: int) -> Plan:
    """Return a plan that is full at first, as far as curves need it, then goes round all."""
    rows = [(Strategy.FULL,) * sites] * 3
    every = list(strategies())
    for step in range(3, steps):
        rows.append(tuple(every[(step + site) % len(every)] for site in range(sites)))
    return Plan(
        model=Fingerprint(structure="s", weights="w", dtype="float32"),
        inputs={"hidden_states": (1, 64, 64)},
        sampler=Sampler(
            steps=steps,
            timesteps=tuple(float(steps - step) for step in range(steps)),
            cfg_layout=CfgLayout.COND_FIRST,
        ),
        sites=tuple(
            PlannedSite(
                name=f"transformer_blocks.{site}.attn1",
                kind=SiteKind.SELF,
                tokens=1024,
                heads=6,
                head_dim=32,
                window=128,
            )
            for site in range(sites)
        ),
        strategies=tuple(rows),
        calibration=Calibration(method="manual"),
    )


def colours_of(path: Path) -> set[tuple[int, ...]]:
    """Return the distinct RGB colours of a picture."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return {tuple(int(value) for value in colour) for colour in np.unique(pixels, axis=0)}


@pytest.mark.parametrize(("samples", "channels"), [(1, 1), (4, 3), (10, 1)])
def test_image_grid_is_written(tmp_path: Path, samples: int, channels: int) -> None:
    images = torch.rand(samples, channels, 16, 16)
    path = tmp_path / "new" / "grid.png"
    image_grid(images, images.roll(1, -1), path)
    assert os.listdir(path.parent) == ["grid.png"]
    picture = Image.open(path)
    assert picture.format == "PNG"
    assert 120 * samples < picture.width < 140 * samples + 300
    assert 380 < picture.height < 450
    assert path.stat().st_size > 3000


def test_image_grid_without_difference_has_a_black_last_row(tmp_path: Path) -> None:
    images = torch.ones(2, 1, 8, 8)
    image_grid(images, images, tmp_path / "grid.png")
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    column = picture[:, 230]  # runs through the first sample of each row
    third = len(column) // 3
    assert column[third // 2] == 255
    assert column[-third // 2] == 0


def test_amplification_is_the_end_of_the_colour_scale(tmp_path: Path) -> None:
    dense, planned = torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.1)
    image_grid(dense, planned, tmp_path / "weak.png", amplification=1.0)
    image_grid(dense, planned, tmp_path / "strong.png", amplification=10.0)
    weak, strong = (
        np.asarray(Image.open(tmp_path / name).convert("L"))[-60, 230]
        for name in ("weak.png", "strong.png")
    )
    assert strong > weak + 100


@pytest.mark.parametrize(
    ("dense", "planned", "amplification", "message"),
    [
        ((2, 1, 8, 8), (1, 1, 8, 8), 4.0, "planned: .*differ in shape"),
        ((2, 2, 8, 8), (2, 2, 8, 8), 4.0, "dense: the shape is not one of images"),
        ((1, 8, 8), (1, 8, 8), 4.0, "dense: the shape is not one of images"),
        ((11, 1, 8, 8), (11, 1, 8, 8), 4.0, "B from 1 to 10"),
        ((0, 1, 8, 8), (0, 1, 8, 8), 4.0, "B from 1 to 10"),
        ((1, 1, 8, 8), (1, 1, 8, 8), 0.0, "amplification: "),
    ],
)
def test_image_grid_refuses(
    tmp_path: Path,
    dense: tuple[int, ...],
    planned: tuple[int, ...],
    amplification: float,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        image_grid(torch.zeros(dense), torch.zeros(planned), tmp_path / "g.png", amplification)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("sites", "steps"), [(1, 3), (6, 20), (28, 50)])
def test_plan_map_is_written(tmp_path: Path, sites: int, steps: int) -> None:
    plan_map(make_plan(sites, steps), tmp_path / "plan.png", attention_kept=0.43)
    assert os.listdir(tmp_path) == ["plan.png"]
    picture = Image.open(tmp_path / "plan.png")
    assert 900 < picture.width < 2000
    assert 200 < picture.height < 1200


def test_dollars_in_names_are_text(tmp_path: Path) -> None:
    plan = make_plan(2, 3)
    sites = tuple(site.model_copy(update={"name": "a$\\b$[/x]"}) for site in plan.sites)
    plan_map(plan.model_copy(update={"sites": sites}), tmp_path / "plan.png", attention_kept=0.5)
    curves({"a$\\b$": [(0.0, 1.0)]}, tmp_path / "$\\a$.png", "across $\\a$", "up $\\b$", ["$\\c$"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}


def test_plan_map_shows_each_strategy_in_its_colour(tmp_path: Path) -> None:
    plan_map(make_plan(6, 20), tmp_path / "plan.png", attention_kept=0.43)
    expected = {
        tuple(round(255 * part) for part in to_rgb(colour))
        for colour in (strategy.colour for strategy in strategies())
    }
    assert expected <= colours_of(tmp_path / "plan.png")


def test_each_strategy_has_a_colour_and_a_label() -> None:
    for read in ("name", "label", "symbol", "colour"):
        assert len({getattr(strategy, read) for strategy in strategies()}) == len(strategies())


def test_a_figure_tells_twenty_lines_apart(tmp_path: Path) -> None:
    lines = {f"method {line}": [(0.0, 0.0), (1.0, line)] for line in range(20)}
    curves(lines, tmp_path / "all.png", "across", "up")
    assert (tmp_path / "all.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="too many lines"):
        curves(lines | {"one more": []}, tmp_path / "more.png", "across", "up")


@pytest.mark.parametrize("kept", [-0.1, 1.1, float("nan")])
def test_plan_map_refuses_what_is_no_fraction(tmp_path: Path, kept: float) -> None:
    with pytest.raises(ConfigError, match="attention_kept: not a fraction"):
        plan_map(make_plan(2, 3), tmp_path / "plan.png", attention_kept=kept)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ditfastattn.tools.figures.os.replace", fail)
    with pytest.raises(ConfigError, match=r"cannot write the file[\s\S]*disk full"):
        image_grid(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), path)
    assert os.listdir(tmp_path) == ["grid.png"]
    assert path.read_bytes() == b"old"


def test_pyplot_knows_of_no_figure(tmp_path: Path) -> None:
    before = pyplot.get_fignums()
    plan_map(make_plan(2, 3), tmp_path / "plan.png", attention_kept=0.5)
    assert pyplot.get_fignums() == before

"""Draw a report's figures: dense and planned images, the map of a plan, and curves.

Figures are built without pyplot, which would touch its global figure list and backend, and are
written atomically.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from numpy.typing import NDArray
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import replacing
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy, every_strategy

MOST_SAMPLES = 10
_DOTS_PER_INCH = 150


def image_grid(
    dense: Tensor, planned: Tensor, path: str | os.PathLike[str], amplification: float = 4.0
) -> None:
    """Draw a column per sample, up to ten: dense, planned, amplified difference.

    ``dense`` and ``planned`` are ``[B, 1 or 3, H, W]`` in [0, 1]. The colour scale of the mean
    absolute difference over channels ends at ``1 / amplification``.

    Raises:
        ConfigError: the shapes differ or are not those of 1 to 10 images, or ``amplification`` is
            not positive.
    """
    _check_images(dense, planned, amplification)
    difference = (dense.float() - planned.float()).abs().mean(1).cpu().numpy()
    limit = 1.0 / amplification
    rows = (
        ("dense", _pixels(dense), "gray", 1.0),
        ("planned", _pixels(planned), "gray", 1.0),
        (f"|difference|\nx {amplification:g}", difference, "magma", limit),
    )
    figure, axes, bar_axis = _tiles(len(dense), dense.shape[2] / dense.shape[3])
    for line, (label, images, colours, ceiling) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, colours, vmin=0.0, vmax=ceiling, interpolation="nearest")
            axis.set_axis_off()
        line[0].text(
            -0.1, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9
        )
    bar = figure.colorbar(
        axes[-1][-1].images[0], cax=bar_axis, extend="max", ticks=[0.0, limit / 2.0, limit]
    )
    bar.ax.tick_params(labelsize=7)
    _write_png(figure, Path(path))


def plan_map(plan: Plan, path: str | os.PathLike[str], attention_kept: float) -> None:
    """Draw which strategy each attention site (down) takes at each step (across).

    ``attention_kept`` is the fraction of attention FLOPs that the plan keeps.

    Raises:
        ConfigError: ``attention_kept`` is not a fraction.
    """
    if not 0.0 <= attention_kept <= 1.0:
        raise ConfigError(
            "not a fraction",
            where="attention_kept",
            got=attention_kept,
            expected="0.0 to 1.0",
            remedy="divide the plan's attention FLOPs by the dense ones",
        )
    order = _by_effort()
    codes = np.array([[order.index(entry) for entry in row] for row in plan.strategies]).T
    sites, steps = codes.shape
    height = 0.19 * sites + 1.35
    figure = Figure(
        figsize=(max(0.17 * steps + 2.4, 6.4), height), dpi=_DOTS_PER_INCH, layout="constrained"
    )
    axis = figure.subplots()
    axis.pcolormesh(
        codes,
        cmap=ListedColormap([strategy.colour for strategy in order]),
        norm=BoundaryNorm(np.arange(len(order) + 1) - 0.5, len(order)),
        edgecolors="white",
        linewidth=0.6,
    )
    axis.invert_yaxis()
    _label_map(axis, plan)
    counts = f"sites: {sites}, steps: {steps}"
    axis.set_title(f"{attention_kept:.0%} of attention FLOPs kept ({counts})", fontsize=10)
    figure.legend(
        handles=_legend(plan), loc="outside lower center", ncols=3, fontsize=7.5, frameon=False
    )
    _write_png(figure, Path(path))


_LINES = (
    "#0072b2",
    "#e69f00",
    "#26323f",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#999999",
    "#7a5195",
    "#8c6d31",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_STYLES = [(*pair, dash) for dash in ("-", "--") for pair in zip(_LINES, _MARKERS, strict=True)]


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike[str],
    across: str,
    up: str,
    labels: Sequence[str] = (),
) -> None:
    """Draw a line of points per series; ``labels`` annotate the points of the first one.

    Raises:
        ConfigError: there are more series than styles of lines.
    """
    if len(series) > len(_STYLES):
        raise ConfigError(
            "too many lines for one figure",
            where=str(path),
            got=len(series),
            expected=f"{len(_STYLES)} or fewer",
        )
    figure = Figure(figsize=(6.4, 4.0), dpi=_DOTS_PER_INCH, layout="constrained")
    axis = figure.subplots()
    for (name, points), (colour, marker, dash) in zip(series.items(), _STYLES, strict=False):
        ordered = sorted(points)
        axis.plot(
            [x for x, _ in ordered],
            [y for _, y in ordered],
            color=colour,
            marker=marker,
            linestyle=dash,
            markersize=5,
            label=name,
        )
    for label, (x, y) in zip(labels, next(iter(series.values()), ()), strict=False):
        axis.annotate(label, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=7.5)
    axis.set_xlabel(across, fontsize=9)
    axis.set_ylabel(up, fontsize=9)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.tick_params(labelsize=8)
    many = len(series) > len(_LINES)
    axis.legend(fontsize=6 if many else 8, ncols=1 + many, frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    _write_png(figure, Path(path))


def _check_images(dense: Tensor, planned: Tensor, amplification: float) -> None:
    if dense.shape != planned.shape:
        raise ConfigError(
            "dense and planned images differ in shape",
            where="planned",
            got=tuple(planned.shape),
            expected=tuple(dense.shape),
            remedy="draw both from the same labels at the same size",
        )
    if dense.ndim != 4 or dense.shape[1] not in (1, 3) or not 1 <= len(dense) <= MOST_SAMPLES:
        raise ConfigError(
            "the shape is not one of images to lay out",
            where="dense",
            got=tuple(dense.shape),
            expected=f"[B, 1 or 3, H, W] with B from 1 to {MOST_SAMPLES}",
            remedy=f"pass images[:{MOST_SAMPLES}]",
        )
    if not amplification > 0.0:
        raise ConfigError(
            "the amplification is out of range",
            where="amplification",
            got=amplification,
            expected="a number above 0",
            remedy="leave it out: the default is 4",
        )


def _pixels(images: Tensor) -> NDArray[np.float32]:
    """Return ``[B, H, W, C]`` fp32 pixels, with one channel or three."""
    pixels: NDArray[np.float32] = images.detach().float().clamp(0.0, 1.0).cpu().numpy()
    return pixels.transpose(0, 2, 3, 1)


def _tiles(samples: int, aspect: float) -> tuple[Figure, list[list[Axes]], Axes]:
    """Return a figure, its three rows of axes and the axes of a colour bar beside the last row.

    Positions are fixed in inches, because automatic layout shrinks the row with the bar.
    """
    tile, gap, left, right, border = 0.86, 0.05, 1.05, 0.65, 0.06
    height = tile * aspect
    total = (left + samples * (tile + gap) + right, 3 * (height + gap) - gap + 2 * border)
    figure = Figure(figsize=total, dpi=_DOTS_PER_INCH)

    def place(x: float, y: float, wide: float, high: float) -> Axes:
        box = (x / total[0], y / total[1], wide / total[0], high / total[1])
        return figure.add_axes(box)

    rows = [
        [
            place(left + column * (tile + gap), border + (2 - row) * (height + gap), tile, height)
            for column in range(samples)
        ]
        for row in range(3)
    ]
    bar = place(left + samples * (tile + gap) + 0.03, border, 0.09, height)
    return figure, rows, bar


def _label_map(axis: Axes, plan: Plan) -> None:
    steps = plan.sampler.steps
    every = 1 if steps <= 20 else 5
    shown = range(0, steps, every)
    axis.set_xticks([step + 0.5 for step in shown], [str(step) for step in shown], fontsize=7)
    axis.set_yticks(
        [index + 0.5 for index in range(len(plan.sites))],
        [site.name for site in plan.sites],
        fontsize=7,
    )
    axis.tick_params(length=0)
    axis.set_xlabel("step", fontsize=9)
    axis.set_frame_on(False)


def _by_effort() -> list[Strategy]:
    """Return the strategies from dark to light, with the work that is left."""
    return sorted(every_strategy(), key=lambda strategy: -strategy.effort)


def _legend(plan: Plan) -> list[Patch]:
    counts = Counter(entry for row in plan.strategies for entry in row)
    total = counts.total()
    return [
        Patch(
            facecolor=strategy.colour,
            edgecolor="#888888",
            linewidth=0.4,
            label=f"{strategy.label} ({counts[strategy] / total:.0%})",
        )
        for strategy in _by_effort()
        if counts[strategy]
    ]


def _write_png(figure: Figure, path: Path) -> None:
    """Render ``figure`` as a PNG; a dollar in a name does not start a formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi="figure", metadata={"Software": None})

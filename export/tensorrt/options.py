"""Choose which engines to build, and in which layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.bundle.manifest import Manifest
from ditfastattn.runtime.tensorrt.engines import Layout
from ditfastattn.runtime.tensorrt.library import CURRENT

_MEGABYTE: Final = 2**20
_SWITCHED: Final = 8  # variants: a builder's time grows faster than their number


@dataclass(frozen=True)
class BuildOptions:
    """Choose which engines to build.

    Attributes:
        target: a compute capability such as ``sm89``, or ``current``, this machine's GPU.
        layout: see ``choose_layout``.
        images: the least, usual and most images of a call.
        max_engine_mb: the MiB that the engines of all variants may take, each with weights of its
            own, before ``auto`` takes the switch.
        time_limit: for each build, in seconds.
        library: ``tensorrt`` or ``tensorrt_rtx``; "" takes what suits this machine.
        on_progress: called with the graph, its builder's phase, and how much is done (0 to 1).
    """

    target: str = CURRENT
    layout: Layout = Layout.AUTO
    images: tuple[int, int, int] = (1, 1, 4)
    max_engine_mb: float = 2048.0
    time_limit: float = 3600.0
    library: str = ""
    on_progress: Callable[[str, str, float], None] = lambda graph, phase, done: None


def rows_of(
    manifest: Manifest, images: tuple[int, int, int], layout: Layout = Layout.VARIANTS
) -> tuple[int, int, int]:
    """Return the rows of calls with these numbers of images; guidance doubles them.

    A switch takes the usual number only: builders fail on a free batch inside an ``If``.

    Raises:
        ConfigError: the numbers decrease.
    """
    least, usual, most = images
    if not 0 < least <= usual <= most:
        raise ConfigError("images must not decrease", got=images, expected="least, usual, most")
    if manifest.fixed_batch:
        least = usual = most = manifest.fixed_batch
        return least, usual, most
    branches = 2 if manifest.sampler.cfg_layout.batched else 1
    if (branches * least) % manifest.batch_multiple:
        branches *= manifest.batch_multiple
    if layout is Layout.SWITCH:
        least = most = usual
    return branches * least, branches * usual, branches * most


def choose_layout(
    root: Path, manifest: Manifest, options: BuildOptions, first: int = 0
) -> tuple[Layout, str]:
    """Return the layout to build, and why.

    ``auto`` never takes the loop, which generates whole images and cannot be a pipeline's model.

    Args:
        root: the bundle's folder.
        manifest: the bundle's manifest.
        options: the requested engines.
        first: the size of the first variant's engine in bytes, 0 before it is measured; what it
            holds beside its weights, every other engine will hold too.

    Raises:
        ConfigError: the bundle lacks what the layout needs.
    """
    wanted, count = options.layout, len(manifest.variants)
    if wanted is Layout.LOOP and manifest.loop is None:
        raise ConfigError(
            "the bundle has no unrolled loop", where=str(root), remedy="export it with --loop"
        )
    if wanted is Layout.SWITCH and count == 1:
        raise ConfigError("there is one step variant: nothing to switch between", where=str(root))
    if wanted is Layout.SWITCH and manifest.halved:
        raise ConfigError(
            "a switch has one batch, and guidance is on at some steps only",
            where=str(root),
            got=f"layout {wanted}",
            expected=f"{Layout.VARIANTS}, or {Layout.LOOP}",
        )
    if wanted is not Layout.AUTO:
        return wanted, "it was requested"
    if count == 1:
        return Layout.VARIANTS, "there is one step variant"
    if manifest.halved:
        return Layout.VARIANTS, "guidance is on at some steps only, and a switch has one batch"
    return _by_size(root, manifest, options.max_engine_mb, first)


def _by_size(root: Path, manifest: Manifest, limit_mb: float, first: int) -> tuple[Layout, str]:
    """Return the layout of several variants whose weights fit the limit, and why."""
    count = len(manifest.variants)
    weights = [weight_bytes(root / variant.file) for variant in manifest.variants]
    beside = max(0, first - weights[0])
    held = (sum(weights) + count * beside) / _MEGABYTE
    once = manifest.files[manifest.weights].bytes / _MEGABYTE
    what = "" if first else " of weights"
    sizes = f"{count} engines take {held:.0f} MiB{what}, one switch {once:.0f} MiB of weights"
    limit = f"the limit of {limit_mb:g} MiB"
    if held <= limit_mb:
        return Layout.VARIANTS, f"{sizes}: within {limit}"
    if count > _SWITCHED:
        return (
            Layout.VARIANTS,
            f"{sizes}: over {limit}, but a switch of more than {_SWITCHED} variants does not build "
            "in reasonable time; cap them (--max-variants)",
        )
    return Layout.SWITCH, f"{sizes}: over {limit}"


def weight_bytes(path: Path) -> int:
    """Return how many bytes of weights a graph refers to."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return sum(
        int(entry.value)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    )

"""What an export is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ditfastattn.runtime.bundle.manifest import Format

Progress = Callable[[str, int, int], None]  # (what, done, of)


def silent(what: str, done: int, of: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class ExportOptions:
    """Choose what a bundle holds.

    Attributes:
        dtype: of weights and activations; "" keeps the model's.
        dynamic_batch: whether the bundle takes any batch.
        loop: whether the whole generation is written as one graph too.
        timestep: the name of the model's timestep argument.
        format: what graphs are written as.
        isa: the vector instructions that packages are compiled for; "" takes this machine's best.
        regions: whether packages are regions, compiled once for all equal blocks and variants.
        golden: whether the bundle holds a golden sample, for which torch generates once.
        on_progress: called with the file just written, how many are done, and of how many.
    """

    dtype: str = ""
    dynamic_batch: bool = True
    loop: bool = False
    timestep: str = "timestep"
    format: Format = Format.ONNX
    isa: str = ""
    regions: bool = False
    golden: bool = True
    on_progress: Progress = silent

"""Tiny LongCat-Image models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.families.flux import FLUX
from ditfastattn.tools.zoo.image_inputs import TEXT, UNIT, diagonal, grid, packed


def _longcat(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of LongCat-Image."""
    ids = {"txt_ids": diagonal(), "img_ids": grid(1.0, float(TEXT))}
    return packed(batch, timestep) | ids


MODELS: tuple[ZooModel, ...] = (
    ZooModel("LongCatImageTransformer2DModel", {**FLUX}, _longcat, UNIT),
)

"""Tiny PRX models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.image_inputs import CHANNELS, FEATURES, UNIT, mask, square


def _prx(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of PRX."""
    return square(batch, timestep) | {"attention_mask": mask(batch).bool()}


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "PRXTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "context_in_dim": FEATURES,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        _prx,
        UNIT,
    ),
)

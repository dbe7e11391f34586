"""Tiny AuraFlow models, and the inputs of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.image_inputs import FEATURES, HEADS, SIDE, UNIT, square


@dataclass(frozen=True)
class TwiceGatedModel(ZooModel):
    """Build a class that gates attention's output twice, with gates that let the text through."""

    def build(self, seed: int = 0) -> torch.nn.Module:
        """Return the model with the modulation of its blocks eight times as strong."""
        model = super().build(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".norm1" in name:
                    parameter.mul_(8.0)
        return model


MODELS: tuple[ZooModel, ...] = (
    TwiceGatedModel(
        "AuraFlowTransformer2DModel",
        {
            **HEADS,
            "sample_size": 2 * SIDE,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": FEATURES,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        square,
        UNIT,
    ),
)

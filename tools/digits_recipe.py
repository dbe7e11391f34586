"""How the embedded digits DiT is trained: its configuration, noise schedule and stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ditfastattn.tools.digits_data import NUM_CLASSES

TARGET_SIZE = 64
PATCH_SIZE = 2
MODEL_CONFIG: dict[str, Any] = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "sample_size": TARGET_SIZE,
    "patch_size": PATCH_SIZE,
    "num_embeds_ada_norm": NUM_CLASSES,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
# Pixels are in [-1, 1]: a ceiling of 1 turns "dynamic thresholding" into clipping the predicted
# image. Without it, 20 steps leave white specks.
SAMPLER = SCHEDULE | {"thresholding": True, "sample_max_value": 1.0}


@dataclass(frozen=True)
class Stage:
    """One training stage: image size in pixels, optimizer steps, batch, peak learning rate."""

    size: int
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100


STAGES = (
    Stage(size=32, steps=1900, batch=16, learning_rate=5e-4),
    Stage(size=64, steps=400, batch=8, learning_rate=2e-4),
)


def learning_rate(stage: Stage, step: int) -> float:
    """Return the learning rate: linear warm-up, then linear decay to a tenth."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    return stage.learning_rate * (1.0 - 0.9 * step / stage.steps)

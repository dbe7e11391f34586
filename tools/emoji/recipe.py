"""How the emoji model is made: its words, configuration, sampler and training stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ditfastattn.tools.emoji.captions import Vocabulary

# Each thing's sprite by code point. Few, and without fine texture: a small model draws them sharp.
SPRITES = {
    "panda": "1f43c",
    "fox": "1f98a",
    "tiger": "1f42f",
    "frog": "1f438",
    "pig": "1f437",
    "koala": "1f428",
    "penguin": "1f427",
    "unicorn": "1f984",
    "whale": "1f433",
    "turtle": "1f422",
    "elephant": "1f418",
    "dinosaur": "1f996",
    "snail": "1f40c",
    "strawberry": "1f353",
    "carrot": "1f955",
    "avocado": "1f951",
    "watermelon": "1f349",
    "mushroom": "1f344",
    "burger": "1f354",
    "rocket": "1f680",
    "car": "1f697",
    "star": "2b50",
    "ghost": "1f47b",
    "robot": "1f916",
}
# All others are drawn facing left, or look alike both ways.
DRAWN_FACING_RIGHT = frozenset({"rocket"})
# Evenly spaced on the colour wheel, from red on.
HUES = ("red", "yellow", "lime", "green", "cyan", "blue", "purple", "pink")
VOCABULARY = Vocabulary(tuple(SPRITES), HUES, ("left", "right"))

TARGET_SIZE = 64
PATCH_SIZE = 4
CAPTION_CHANNELS = 64
MODEL_CONFIG: dict[str, Any] = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 6,
    "cross_attention_dim": 192,
    "caption_channels": CAPTION_CHANNELS,
    "sample_size": TARGET_SIZE,
    "patch_size": PATCH_SIZE,
    "use_additional_conditions": False,
}
SAMPLER: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.5}
LABEL_DROPOUT = 0.1


@dataclass(frozen=True)
class Stage:
    """One training stage: image size in pixels, optimizer steps, batch, peak learning rate.

    ``noise_shift`` moves the noise levels that are drawn: larger pictures need more noise.
    """

    size: int
    steps: int
    batch: int
    learning_rate: float
    noise_shift: float = 0.0
    warmup: int = 50
    cooldown: float = 0.0


STAGES = (
    Stage(size=32, steps=1200, batch=32, learning_rate=4e-3),
    Stage(size=64, steps=2800, batch=16, learning_rate=2.4e-3, noise_shift=0.3, cooldown=0.25),
)


def learning_rate(stage: Stage, step: int) -> float:
    """Return the learning rate: linear warm-up, constant, linear decay over the cooldown.

    It is constant until the cooldown so that a run can be continued for more steps.
    """
    warm = min(1.0, (step + 1) / stage.warmup)
    left = (stage.steps - step) / (stage.cooldown * stage.steps) if stage.cooldown else 1.0
    return stage.learning_rate * warm * min(1.0, left)


def held_out(thing: int, hue: int) -> bool:
    """Return whether a pair of thing and hue is never trained on: one hue of each thing."""
    return (3 * thing + 1) % len(HUES) == hue

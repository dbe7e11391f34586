"""Read pictures back: how well they show a sprite, which thing they show, and on what hue."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ditfastattn.tools.emoji.recipe import HUES, VOCABULARY
from ditfastattn.tools.emoji.sprites import LARGEST_SHIFT, SCALES, place

_SOLID = 0.99  # opacity above which a pixel shows the sprite alone
_CORNER = 4  # pixels, of 64


def placements(sprite: Tensor, mirrored: bool, scales: int, shifts: int) -> Tensor:
    """Return ``sprite`` at ``scales`` sizes and ``shifts`` x ``shifts`` places, ``[K, 4, H, W]``.

    They span the sizes and places of the training data.
    """
    sizes = torch.linspace(*SCALES, scales)
    moves = torch.linspace(-LARGEST_SHIFT, LARGEST_SHIFT, shifts)
    grid = torch.tensor(list(itertools.product(sizes.tolist(), moves.tolist(), moves.tolist())))
    count = len(grid)
    return place(
        sprite.expand(count, *sprite.shape),
        torch.full((count,), mirrored),
        grid[:, 0],
        grid[:, 1:],
    )


def fit_errors(images: Tensor, placed: Tensor) -> Tensor:
    """Return each image's mean squared error to the best of ``placed``, ``[B]``.

    Only the pixels that the sprite covers count. Images are ``[B, 3, H, W]`` in [0, 1].
    """
    weight = (placed[:, 3:] > _SOLID).float()
    pixels = weight.sum((1, 2, 3)) * 3
    # The square of a difference, expanded: three matrix products instead of B x K pictures.
    target, cover = (weight * placed[:, :3]).flatten(1), weight.expand(-1, 3, -1, -1).flatten(1)
    flat = images.flatten(1)
    squares = flat.square() @ cover.T - 2 * flat @ target.T + target.square().sum(1)
    return (squares / pixels).amin(1).clamp(min=0)


def best_fit_psnr(images: Tensor, sprite: Tensor, mirrored: bool) -> Tensor:
    """Return the PSNR of each image to ``sprite``, at the place and size that fit best, ``[B]``."""
    errors = fit_errors(images, placements(sprite, mirrored, scales=5, shifts=9))
    return -10 * torch.log10(errors + 1e-12)


def read_things(images: Tensor, sprites: Tensor) -> Tensor:
    """Return the number of the sprite that each image resembles most, either way round, ``[B]``."""
    errors = [
        torch.minimum(
            *(
                fit_errors(images, placements(sprite, way, scales=2, shifts=3))
                for way in (False, True)
            )
        )
        for sprite in sprites
    ]
    return torch.stack(errors, 1).argmin(1)


def read_hues(images: Tensor) -> Tensor:
    """Return the number of the hue that each image's corners have, ``[B]``."""
    corner = max(1, images.shape[-1] * _CORNER // 64)
    edges = (slice(None, corner), slice(-corner, None))
    corners = [images[:, :, rows, columns].mean((2, 3)) for rows in edges for columns in edges]
    colour = torch.stack(corners).mean(0)
    wheel = 2 * math.pi * (torch.arange(len(HUES))[:, None] / len(HUES) - torch.arange(3) / 3)
    centred = colour - colour.mean(1, keepdim=True)
    return (functional.normalize(centred, dim=1) @ torch.cos(wheel).T).argmax(1)


def hue_as_asked(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return whether each image has the hue of its prompt, ``[B]``.

    Images are ``[B, 3, H, W]`` in [0, 1].
    """
    hues = [HUES.index(VOCABULARY.parse(prompt).hue) for prompt in prompts]
    return read_hues(images) == torch.tensor(hues)


def shown_as_asked(images: Tensor, prompts: Sequence[str], sprites: Tensor) -> Tensor:
    """Return whether each image shows the thing and the hue of its prompt, ``[B]``.

    Images are ``[B, 3, 64, 64]`` in [0, 1].
    """
    captions = [VOCABULARY.parse(prompt) for prompt in prompts]
    things = torch.tensor([VOCABULARY.things.index(caption.thing) for caption in captions])
    return (read_things(images, sprites) == things) & hue_as_asked(images, prompts)


@dataclass(frozen=True)
class StillObeyed:
    """A metric for targets: 1 where a planned image shows thing and hue if the dense one does.

    ``Target.quality(StillObeyed(load_sprites(package)), at_least=1)``
    """

    sprites: Tensor = field(repr=False)

    def __call__(self, dense: Tensor, planned: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return 1 or 0 for each image, ``[B]``."""
        prompts = [call["prompt"]] if isinstance(call["prompt"], str) else call["prompt"]
        before, after = (shown_as_asked(each, prompts, self.sprites) for each in (dense, planned))
        return (after | ~before).float()

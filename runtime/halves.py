"""Refuse halves of guidance that hold different latents, where a plan shares guidance."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError

log = logging.getLogger(__name__)


def check_halves(first: Tensor, second: Tensor, where: str) -> None:
    """Raise ``ConfigError`` unless both halves of guidance hold the same latents.

    A plan that shares guidance copies one half over the other. Were the halves different images,
    generated without guidance, one would silently replace the other.
    """
    if not _same(first, second):
        raise ConfigError(
            "the plan shares guidance, but its halves hold different latents",
            where=where,
            got=f"{len(first)} and {len(second)} different latents",
            expected="the same latents twice, for the conditional and the unconditional half",
            remedy="run with the plan's guidance, or calibrate a plan without guidance",
        )


def _same(first: Tensor, second: Tensor) -> bool:
    """Return whether both hold the same numbers; NaN is the same as NaN."""
    if first.shape != second.shape:
        return False
    return torch.equal(first, second) or torch.allclose(
        first, second, rtol=0.0, atol=0.0, equal_nan=True
    )


def warn_of_unchecked_latents(inputs: Sequence[str]) -> None:
    """Warn that a plan shares guidance, and nothing can refuse halves of different images."""
    log.warning(
        "ditfastattn: the plan shares guidance, and none of the model's inputs (%s) has the size "
        "of its output, so the latent is unknown: run with the plan's guidance, since different "
        "images in its halves would go unnoticed",
        ", ".join(inputs),
    )

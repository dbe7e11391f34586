"""What guidance makes of the outputs of its branches, read from what the scheduler was given.

It is a weighted sum. Some pipelines (Qwen-Image) then bring each of its tokens to the norm that the
conditional output has there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditfastattn.passes.plan.guidance import CfgLayout

CLOSE = 1e-3  # relative to the largest element
_ROUNDINGS = 8.0  # guidance in half precision rounds some times, and amplifies it
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Guidance:
    """Say how the outputs of the branches become what the scheduler is given.

    Attributes:
        weights: of the branches, in their order.
        norm_of: the branch whose norm each token of the sum is brought to, along the last
            dimension; None where the sum stays as it is.
    """

    weights: tuple[float, ...]
    norm_of: int | None = None

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the weights in the mean of the branches, to which all of this file refers."""
        return tuple(weight / sum(self.weights) for weight in self.weights)

    def mean(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the weighted mean of ``outputs``, in fp32."""
        parts = zip(self.shares, outputs, strict=True)
        return torch.stack([share * part.float() for share, part in parts]).sum(0)

    def rescaling(self, outputs: Sequence[Tensor]) -> Tensor | float:
        """Return what the mean is multiplied by."""
        if self.norm_of is None:
            return 1.0
        return _norms(outputs[self.norm_of]) / _norms(self.mean(outputs)) / sum(self.weights)

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the guided output; times the sum of the weights, it is the scheduler's."""
        return self.mean(outputs) * self.rescaling(outputs)


def _norms(outputs: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(outputs.float(), dim=-1, keepdim=True)
    return norms.clamp(min=_SMALLEST_NORM)


def find_guidance(parts: Sequence[Tensor], wanted: Tensor, layout: CfgLayout) -> Guidance | None:
    """Return how the scheduler's ``wanted`` came of the branches' outputs; None if by no known way.

    The outputs are of as many elements as ``wanted``.
    """
    columns = torch.stack([part.double().flatten() for part in parts], 1)
    target = wanted.double().flatten()[:, None]
    solved = torch.linalg.lstsq(columns, target, driver="gelsd").solution
    if near((columns @ solved)[:, 0], target[:, 0], wanted.dtype):
        return Guidance(tuple(map(float, solved[:, 0])))
    if layout.branches == 1:
        return None
    conditional = 0 if layout in (CfgLayout.COND_FIRST, CfgLayout.SEPARATE) else 1
    scale = _scale_along(parts[conditional], parts[1 - conditional], wanted)
    weights = (scale, 1 - scale) if conditional == 0 else (1 - scale, scale)
    found = Guidance(weights, conditional)
    given = found(parts).reshape(wanted.shape)
    return found if near(given.double(), wanted.double(), wanted.dtype) else None


def _scale_along(conditional: Tensor, other: Tensor, wanted: Tensor) -> float:
    """Return the scale for which each token of the guided sum points where ``wanted`` does.

    What of ``other + scale * (conditional - other)`` is across ``wanted`` is least.
    """
    direction = wanted.double() / _norms(wanted).double()
    base = other.double().reshape(wanted.shape)
    change = conditional.double().reshape(wanted.shape) - base

    def across(tokens: Tensor) -> Tensor:
        return tokens - (tokens * direction).sum(-1, keepdim=True) * direction

    base, change = across(base), across(change)
    return float(-(base * change).sum() / change.square().sum().clamp(min=1e-30))


def near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Return whether both are equal but for rounding to ``dtype``."""
    close = max(CLOSE, _ROUNDINGS * torch.finfo(dtype).eps)
    return bool((got - wanted).abs().max() <= close * wanted.abs().max().clamp(min=1e-6))

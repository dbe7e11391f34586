"""What a model is given where guidance is off: the conditional part of a guided step's inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.bundle.specs import TensorSpec


def conditional_call(layout: CfgLayout) -> int:
    """Return which of a step's calls the conditional one is."""
    return int(layout is CfgLayout.SEPARATE_UNCOND_FIRST)


def conditional_rows(tensor: Tensor, dims: Sequence[int], layout: CfgLayout) -> Tensor:
    """Return the conditional half of ``tensor`` along ``dims``, which grow with the batch."""
    if layout.batched:
        for dim in dims:
            tensor = tensor.tensor_split(2, dim)[int(layout is CfgLayout.UNCOND_FIRST)]
    return tensor


def batch_dims(spec: TensorSpec) -> list[int]:
    """Return the dimensions of an input that grow with the batch."""
    return [dim for dim, size in enumerate(spec.shape) if not isinstance(size, int)]

"""What a model is given where guidance is off: the conditional part of a guided step's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.bundle.specs import TensorSpec


def conditional_rows(tensor: Tensor, dims: Sequence[int], layout: CfgLayout) -> Tensor:
    """Return the conditional half of ``tensor`` along ``dims``, which grow with the batch."""
    if layout.batched:
        for dim in dims:
            tensor = tensor.tensor_split(2, dim)[layout.conditional_half]
    return tensor


def conditional_inputs(
    given: Mapping[str, Tensor], specs: Iterable[TensorSpec], layout: CfgLayout
) -> dict[str, Tensor]:
    """Return the conditional half of what is ``given``, as far as it grows with the batch."""
    dims = {
        spec.name: [dim for dim, size in enumerate(spec.shape) if not isinstance(size, int)]
        for spec in specs
    }
    return {name: conditional_rows(item, dims[name], layout) for name, item in given.items()}

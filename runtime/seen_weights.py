"""What a generation saw of a model's weights, to tell whether the next one has others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditfastattn.passes.analysis.fingerprint import SAMPLES, hash_tensors
from ditfastattn.runtime.options import WeightsCheck

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SeenWeights:
    """Hold as much of the weights as is compared.

    That is a copy of sampled elements, compared bit by bit (so that NaN equals itself) in one
    operation per dtype and device; or a hash of all.
    """

    def __init__(self, tensors: Sequence[Tensor], check: WeightsCheck) -> None:
        """Look at ``tensors``, which are plain, as much as ``check`` says."""
        self._check = check
        self._hash = hash_tensors(tensors, check.samples) if check is WeightsCheck.FULL else ""
        self._seen = _sampled(tensors) if check is WeightsCheck.SAMPLED else {}

    def equal(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether ``tensors``, in the same order, are what was seen, as far as looked at."""
        if self._check is WeightsCheck.NEVER:
            return True
        if self._check is WeightsCheck.FULL:
            return hash_tensors(tensors, self._check.samples) == self._hash
        now = _sampled(tensors)
        return now.keys() == self._seen.keys() and all(
            torch.equal(now[key], seen) for key, seen in self._seen.items()
        )


@torch.no_grad()
def _sampled(tensors: Sequence[Tensor]) -> dict[tuple[object, ...], Tensor]:
    """Return the bits of elements of ``tensors``, by what else there is to compare of these."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return {
        (key, *(item.shape for item in group)): _bits(torch.cat([_sample(item) for item in group]))
        for key, group in groups.items()
    }


def _sample(tensor: Tensor) -> Tensor:
    """Return the elements that a plan's fingerprint covers."""
    count = tensor.numel()
    step = max(1, count // SAMPLES)
    if tensor.is_contiguous():  # as most are; one operation then
        return tensor.as_strided((-(-count // step),), (step,))
    return tensor.reshape(-1)[::step]


def _bits(sample: Tensor) -> Tensor:
    """Return ``sample`` as integers: what is not a number equals itself."""
    return sample.view(_BITS.get(sample.element_size(), torch.uint8))

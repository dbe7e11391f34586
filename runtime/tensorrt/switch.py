"""Run one variant with the engine that holds all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditfastattn.runtime.bundle.manifest import Manifest
from ditfastattn.runtime.bundle.specs import TensorSpec
from ditfastattn.runtime.bundle.transformer import Engine
from ditfastattn.runtime.tensorrt.engines import SwitchSpec


def through_switch(manifest: Manifest, switch: SwitchSpec) -> Manifest:
    """Return the manifest of the switch, in which every variant takes all of the inputs."""
    variants = [
        variant.model_copy(update={"inputs": switch.inputs}) for variant in manifest.variants
    ]
    return manifest.model_copy(update={"variants": tuple(variants)})


class SwitchedVariant:
    """Run one variant: its slots go through its ports, fillers through the others."""

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        switch: SwitchSpec,
        index: int,
        device: torch.device,
    ) -> None:
        """Wrap the engine of the switch."""
        self._engine, self._manifest, self._switch = engine, manifest, switch
        self._ports = switch.variants[index]
        self._number = torch.tensor(index, dtype=torch.int32, device=device)

    def __call__(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Run from the model's inputs and the variant's reads into outputs and writes."""
        switch, count = self._switch, len(self._manifest.outputs)
        inputs, slots = tensors[: len(switch.inputs)], tensors[len(switch.inputs) :]
        batch = len(next(tensor for tensor in inputs if tensor.dim()))
        given = dict(zip(self._ports.reads, slots, strict=True))
        reads = [
            given[port] if port in given else self._filler(spec.like, batch)
            for port, spec in enumerate(switch.reads)
        ]
        taken = dict(zip(self._ports.writes, results[count:], strict=True))
        writes = [
            taken[port] if port in taken else self._filler(spec.like, batch)
            for port, spec in enumerate(switch.writes)
        ]
        self._engine([self._number, *inputs, *reads], [*results[:count], *writes])

    def _filler(self, like: TensorSpec, batch: int) -> Tensor:
        """Return a tensor for a port that the variant does not use."""
        device = self._number.device
        return torch.empty(like.sizes(batch), dtype=like.torch_dtype, device=device)

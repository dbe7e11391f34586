"""Run one AOTInductor package on torch tensors, with weights that it shares with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError, EngineError
from ditfastattn.runtime.bundle.manifest import EXPORT_AGAIN
from ditfastattn.runtime.bundle.packages import PackageInput, PackageSpec, StepCalls
from ditfastattn.runtime.bundle.specs import Multiple

MODEL: Final = "model"  # the name within a package
_CURRENT_DEVICE: Final = -1


@dataclass(frozen=True)
class PackageFile:
    """Name a package: where it was found, for messages, and a path that opens what was checked."""

    path: Path
    opened: str


class AotiPackage:
    """Hold a loaded package, and run it on tensors in the order of its inputs."""

    def __init__(
        self,
        file: PackageFile,
        spec: PackageSpec,
        weights: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        """Load the package and point it to its share of ``weights``, which are not copied.

        The loader of torch's C++ library is used as it is. ``torch._inductor`` would compile a test
        program first, to learn the processor's vector instructions.

        Raises:
            ConfigError: it cannot be loaded, or it wants other constants than ``spec`` says.
        """
        self._path, self._spec, self._device = file.path, spec, device
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(
                file.opened, MODEL, False, 1, _CURRENT_DEVICE
            )
        except RuntimeError as error:
            raise ConfigError(
                "torch cannot load the package",
                where=str(file.path),
                got=str(error).partition("\n")[0],
                remedy="install what is missing, such as OpenMP (libgomp1), or export the bundle "
                "on this machine",
            ) from error
        wanted = loader.get_constant_fqns()
        if set(wanted) != set(spec.constants):
            raise ConfigError(
                "the package takes other weights than the manifest says",
                where=str(file.path),
                got=", ".join(sorted(set(wanted) - set(spec.constants))) or "fewer",
                expected=", ".join(sorted(set(spec.constants) - set(wanted))) or "only its own",
                remedy=EXPORT_AGAIN,
            )
        lacking = sorted(set(spec.constants) - set(weights))
        if lacking:
            raise ConfigError(
                "the weights file lacks weights of the package",
                where=str(file.path),
                got=", ".join(lacking),
                remedy=EXPORT_AGAIN,
            )
        # The package keeps pointers alone: whoever holds it must hold the tensors.
        self._constants = {name: weights[name] for name in spec.constants}
        if self._constants:
            loader.load_constants(self._constants, False, True, user_managed=True)
        self._loader: Any = loader

    @property
    def device(self) -> torch.device:
        """Return where the tensors must be."""
        return self._device

    def __call__(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Run from ``tensors`` into ``results``; errors as in ``run``."""
        for result, made in zip(results, self.run(tensors), strict=True):
            result.copy_(made)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return what the package computes from ``tensors``.

        Raises:
            EngineError: a tensor has another shape, dtype or device than the package was compiled
                for, or the package failed.
        """
        batch = _batch(self._spec.inputs, tensors)
        given = [
            self._laid_out(tensor, spec, batch)
            for tensor, spec in zip(tensors, self._spec.inputs, strict=True)
        ]
        try:
            found: list[Tensor] = self._loader.run(given)
        except RuntimeError as error:
            raise EngineError(f"{self._path}: the package failed: {error}") from error
        return found

    def _laid_out(self, tensor: Tensor, spec: PackageInput, batch: int) -> Tensor:
        """Return ``tensor`` with the strides that the package was compiled for."""
        sizes, strides = spec.sizes(batch), spec.layout(batch)
        alike = tuple(tensor.shape) == sizes and tensor.dtype == spec.torch_dtype
        if not alike or tensor.device.type != self._device.type:
            raise EngineError(
                f"{self._path}: input {spec.name!r} is {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}; the package was compiled for {spec.dtype} {list(sizes)} on "
                f"{self._device}"
            )
        if _strides_matter(sizes, tensor.stride(), strides):
            copy = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
            return copy.copy_(tensor)
        return tensor


class RegionStep:
    """Run a step as calls of packages, each the region of several places and steps."""

    def __init__(
        self,
        calls: StepCalls,
        packages: Mapping[str, AotiPackage],
        weights: Mapping[str, Tensor],
        where: str,
    ) -> None:
        """Take the packages by file.

        Raises:
            ConfigError: a package or weight is missing.
        """
        missing = {call.file for call in calls.calls} - set(packages)
        missing |= set(calls.constants) - set(weights)
        if missing:
            raise ConfigError(
                "the step needs packages or weights that the bundle lacks",
                where=where,
                got=", ".join(sorted(missing)),
                remedy=EXPORT_AGAIN,
            )
        self._constants = [weights[name] for name in calls.constants]
        self._calls = [(packages[call.file], call.reads, call.frees) for call in calls.calls]
        self._returned = calls.returned

    def __call__(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Run from ``tensors`` into ``results``; errors as in ``AotiPackage.run``."""
        values: list[Any] = [*tensors, *self._constants]
        for package, reads, frees in self._calls:
            found = package.run([values[index] for index in reads])
            for index in frees:
                values[index] = None
            values += found
        for result, index in zip(results, self._returned, strict=True):
            result.copy_(values[index])


def _strides_matter(sizes: Sequence[int], found: Sequence[int], wanted: Sequence[int]) -> bool:
    """Return whether strides differ where a dimension has more than one element."""
    pairs = zip(sizes, found, wanted, strict=True)
    return any(size > 1 and a != b for size, a, b in pairs)


def _batch(specs: Sequence[PackageInput], tensors: Sequence[Tensor]) -> int:
    """Return the batch that ``tensors`` have, 0 if no size depends on it."""
    for spec, tensor in zip(specs, tensors, strict=True):
        for size, found in zip(spec.shape, tensor.shape, strict=False):
            if isinstance(size, Multiple):
                return int(Fraction(size.denominator, size.numerator) * found)
    return 0

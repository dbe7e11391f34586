"""Compare a package with the graph that it was compiled from, before it is written.

A C++ compiler may be wrong. GCC 12.2 at ``-O3``, which Inductor asks for, makes AVX-512 code that
computes NaN or garbage where a kernel transposes tiles of half-precision values.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import write_bytes_atomically
from ditfastattn.export.aoti.options import CompileFor
from ditfastattn.runtime.aoti.package import AotiPackage, PackageFile
from ditfastattn.runtime.bundle.packages import PackageSpec

log = logging.getLogger(__name__)

_APART: Final = 0.05  # of the largest value: roundings are far below, wrong code is far above


@dataclass
class Compilation:
    """Hold what a package is compiled from and for, and what was wrong with it so far.

    Attributes:
        path: the package's file.
        module: the graph; what ``package`` describes, with ``weights`` by their names.
        package: its inputs and constants.
        weights: those of the bundle.
        examples: inputs, with the strides that the package is for.
        made: what to compile for.
        wrong: in what each compiled package differed from the graph.
    """

    path: Path
    module: GraphModule
    package: PackageSpec
    weights: Mapping[str, Tensor]
    examples: Sequence[Tensor]
    made: CompileFor
    wrong: list[str] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """Return Inductor's options: for narrower vectors where the code was wrong."""
        return (self.made.narrower if self.wrong else None) or self.made.options

    def takes(self, content: bytes) -> bool:
        """Write ``content``, made earlier of an equal graph, if it is right with these weights."""
        return not self._wrong_with(content)

    def _wrong_with(self, content: bytes) -> str:
        """Write ``content``; return in what it is wrong, and then there is no file."""
        write_bytes_atomically(self.path, content)
        wrong = disagreement(self.module, self.path, self.package, self.weights, self.examples)
        if wrong:
            self.path.unlink()
        return wrong

    def accept(self, content: bytes) -> bool:
        """Write ``content`` if it is right; otherwise return False, to compile by other options.

        Raises:
            ConfigError: the code is wrong for narrower vectors too.
        """
        wrong = self._wrong_with(content)
        if not wrong:
            if self.wrong:
                log.warning(
                    "%s is compiled for vectors of 256 bits: for %s it would be wrong (%s), which "
                    "is a fault of the C++ compiler",
                    *(self.path.name, self.made.target.isa, *self.wrong),
                )
            return True
        self.wrong.append(wrong)
        if len(self.wrong) == 1 and self.made.narrower is not None:
            return False
        raise ConfigError(
            "a compiled package computes otherwise than its graph",
            where=self.path.name,
            got="; ".join(self.wrong),
            remedy="name another C++ compiler (CXX=clang++), or export with format='onnx'",
        )


def disagreement(
    module: GraphModule,
    path: Path,
    package: PackageSpec,
    weights: Mapping[str, Tensor],
    examples: Sequence[Tensor],
) -> str:
    """Return in what the package at ``path`` computes otherwise than ``module``; "" if it does not.

    Both compute from random values of the shapes and dtypes of ``examples``.
    """
    inputs = [_random(example, seed) for seed, example in enumerate(examples)]
    device = examples[0].device if examples else torch.device("cpu")
    held = {name: weights[name].to(device) for name in package.constants}
    with torch.no_grad():
        expected = module(*(tensor.clone() for tensor in inputs))
    found = AotiPackage(PackageFile(path, str(path)), package, held, device).run(inputs)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if not isinstance(other, Tensor) or not other.is_floating_point():
            continue
        known = torch.isfinite(other)
        if not known.any():
            continue
        broken = int((known & ~torch.isfinite(one)).sum())
        if broken:
            return f"result {index} has {broken} values that are not finite"
        apart = float((one - other)[known].abs().max())
        largest = float(other[known].abs().max())
        if apart > _APART * largest:
            return f"result {index} is {apart:.3g} away, of values up to {largest:.3g}"
    return ""


def _random(example: Tensor, seed: int) -> Tensor:
    if not example.is_floating_point():
        return torch.ones_like(example) if example.dtype == torch.bool else example
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(example.shape, generator=generator).to(example)

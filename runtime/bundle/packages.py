"""Describe a bundle's AOTInductor packages in its manifest: what each takes, what they run on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from ditfastattn.core.records import Record
from ditfastattn.runtime.bundle.specs import Multiple, Natural, Positive, TensorSpec


class PackageInput(TensorSpec, frozen=True):
    """Describe an input of a package.

    A package trusts that an input has the ``strides`` of the example it was compiled for, and
    computes something else, without an error, where it has not.
    """

    strides: tuple[Positive | Multiple, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.strides) != len(self.shape):
            raise ValueError(f"{self.name!r} has {len(self.shape)} dimensions")
        return self

    def layout(self, batch: int) -> tuple[int, ...]:
        """Return the strides at ``batch``."""
        return tuple(step if isinstance(step, int) else step.of(batch) for step in self.strides)


class PackageSpec(Record, frozen=True):
    """Describe one package: its inputs, in order, and the tensors of the weights file it takes.

    A constant has one name, in the package and in the weights file. ``key`` is a hash of all that
    the package was compiled from; "" if it is not known.
    """

    inputs: tuple[PackageInput, ...]
    constants: tuple[str, ...]
    key: str = ""


class RegionCall(Record, frozen=True):
    """Describe one call of a step: the package, the values it reads, those not needed after it."""

    file: str
    reads: tuple[Natural, ...]
    frees: tuple[Natural, ...]


class StepCalls(Record, frozen=True):
    """Describe a step as a list of calls over one list of values.

    The list begins with the inputs of the step and the ``constants``, tensors of the weights file;
    each call appends its results. What the step returns is at ``returned``.
    """

    constants: tuple[str, ...]
    calls: tuple[RegionCall, ...]
    returned: tuple[Natural, ...]


class PackageTarget(Record, frozen=True):
    """Describe what the packages were compiled for.

    Attributes:
        torch: the version of torch; packages call into its library.
        device: where the tensors must be.
        machine: the processor's architecture, as ``platform.machine()`` names it.
        isa: the vector instructions, as Inductor names them.
        features: what the processor must have, as ``torch.cpu.get_capabilities()`` names it.
        capability: the GPU's compute capability, "" on a CPU.
    """

    torch: str
    device: Literal["cpu", "cuda"]
    machine: str
    isa: str
    features: tuple[str, ...]
    capability: str = ""


class PackagesSpec(Record, frozen=True):
    """Describe the packages of a bundle by file, and what they were compiled for.

    A package is a whole step, or a region that steps call: then each step's file is ``StepCalls``.
    """

    target: PackageTarget
    files: dict[str, PackageSpec]

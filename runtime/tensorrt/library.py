"""Find TensorRT: ``tensorrt`` (10, 11) or ``tensorrt_rtx``, of which we use the common API."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

import torch

from ditfastattn.core.errors import ConfigError

CURRENT: Final = "current"  # the GPU of this machine
PACKAGES: Final = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}  # module: package
_REMEDY: Final = 'pip install "ditfastattn[tensorrt]", or "ditfastattn[tensorrt-rtx]"'


@dataclass(frozen=True)
class Library:
    """Hold one of the libraries.

    Attributes:
        name: of its module.
        module: the module.
        version: as the library reports it.
    """

    name: str
    module: Any
    version: str

    @property
    def targets(self) -> tuple[str, ...]:
        """Return what engines can be built for: compute capabilities, and this machine's GPU."""
        known = getattr(self.module, "ComputeCapability", None)
        named = [] if known is None else [name.lower() for name in dir(known)]
        return (CURRENT, *(name for name in named if name.startswith("sm")))


def find_library(name: str = "") -> Library:
    """Return the library called ``name``, or the one that suits this machine.

    That is ``tensorrt`` where there is a GPU, else ``tensorrt_rtx``, which builds without one.

    Raises:
        ConfigError: it is not installed, or does not load.
    """
    order = list(PACKAGES) if torch.cuda.is_available() else list(PACKAGES)[::-1]
    if name and name not in PACKAGES:
        raise ConfigError(
            "there is no such TensorRT library", got=name, expected=", ".join(PACKAGES)
        )
    wanted = [name] if name else [module for module in order if find_spec(module) is not None]
    if not wanted:
        raise ConfigError("TensorRT is not installed", remedy=_REMEDY)
    try:
        module = importlib.import_module(wanted[0])
    except Exception as error:  # a broken library may raise anything
        raise ConfigError(
            "TensorRT does not load", where=wanted[0], got=error, remedy=_REMEDY
        ) from error
    return Library(wanted[0], module, str(module.__version__))

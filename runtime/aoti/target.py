"""Say what AOTInductor packages are compiled for, and refuse a machine that cannot run them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any, Final

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.bundle.packages import PackageTarget

_EXPORT_HERE: Final = "export the bundle on this machine (`ditfastattn export --format pt2`)"


def processor_features() -> frozenset[str]:
    """Return what this processor has, as ``torch.cpu.get_capabilities()`` names it."""
    found: Mapping[str, Any] = torch.cpu.get_capabilities()
    return frozenset(name for name, present in found.items() if present is True)


def compute_capability(device: str) -> str:
    """Return the compute capability of the current GPU, "" on a CPU."""
    if device != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def check_target(target: PackageTarget, where: str) -> None:
    """Refuse packages that this machine, or this torch, cannot run.

    Nothing is compiled to find that out, so no compiler need be installed.

    Raises:
        ConfigError: the version of torch, the architecture, the processor's vector instructions, or
            the GPU is another.
    """
    if target.torch != torch.__version__:
        raise ConfigError(
            "the packages were compiled for another version of torch",
            where=where,
            got=torch.__version__,
            expected=target.torch,
            remedy=f"install torch=={target.torch.partition('+')[0]}, or {_EXPORT_HERE}",
        )
    if target.machine != platform.machine():
        raise ConfigError(
            "the packages were compiled for another processor architecture",
            where=where,
            got=platform.machine(),
            expected=target.machine,
            remedy=_EXPORT_HERE,
        )
    missing = sorted(set(target.features) - processor_features())
    if missing:
        raise ConfigError(
            f"the packages use vector instructions ({target.isa}) that this processor lacks",
            where=where,
            got=f"no {', '.join(missing)}",
            expected=", ".join(target.features),
            remedy=f'{_EXPORT_HERE}, or elsewhere with isa="avx2" (--isa avx2)',
        )
    if target.device == "cuda":
        _check_gpu(target, where)


def _check_gpu(target: PackageTarget, where: str) -> None:
    if not torch.cuda.is_available():
        raise ConfigError(
            "the packages run on an NVIDIA GPU, and there is none here",
            where=where,
            remedy="export the bundle from a pipeline on the CPU",
        )
    found = compute_capability("cuda")
    if found != target.capability:
        raise ConfigError(
            "the packages were compiled for another GPU",
            where=where,
            got=f"compute capability {found}",
            expected=target.capability,
            remedy=_EXPORT_HERE,
        )

"""Choose what packages are compiled for: the vector instructions, as flags that are written down.

Inductor would compile for exactly this machine (``-march=native``) and for its number of threads,
and record neither.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.aoti.target import compute_capability, processor_features
from ditfastattn.runtime.bundle.packages import PackageTarget

_WIDTHS: Final = {"avx2": 256, "avx512": 512}
# The levels of the x86-64 psABI, as compilers and ``torch.cpu.get_capabilities()`` name them.
_LEVEL_3: Final = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt")
_LEVEL_4: Final = (*_LEVEL_3, "avx512_bw", "avx512_cd", "avx512_dq", "avx512_f", "avx512_vl")
_LEVELS: Final = {256: ("x86-64-v3", _LEVEL_3), 512: ("x86-64-v4", _LEVEL_4)}


@dataclass(frozen=True)
class CompileFor:
    """Hold what packages are compiled for, and Inductor's options for it."""

    target: PackageTarget
    options: dict[str, Any]

    @property
    def narrower(self) -> dict[str, Any] | None:
        """Return the options for vectors of 256 bits; None if those of ``options`` are no wider."""
        if self.target.device != "cpu" or self.options["cpp.simdlen"] != _WIDTHS["avx512"]:
            return None
        level = {"cpp.march": _LEVELS[256][0]} if "cpp.march" in self.options else {}
        return {**self.options, "cpp.simdlen": _WIDTHS["avx2"], **level}


def compile_for(device: torch.device, isa: str = "") -> CompileFor:
    """Return the target and options for ``isa``; "" takes the best that this processor has.

    Raises:
        ConfigError: this machine cannot compile for it, or has no C++ compiler.
    """
    if isa and isa not in _WIDTHS:
        raise ConfigError(
            "there are no such vector instructions",
            where="isa",
            got=isa,
            expected=", ".join(_WIDTHS),
        )
    with config.patch({"cpp.simdlen": _WIDTHS.get(isa)}):
        found = pick_vec_isa()  # compiles a test program, the first time
    if isa and not str(found).startswith(isa):
        raise ConfigError(
            "this processor or compiler has no such vector instructions",
            where="isa",
            got=isa,
            expected=str(found),
            remedy="leave isa out, or install a C++ compiler (g++)",
        )
    options: dict[str, Any] = {"cpp.simdlen": found.bit_width() if found else None}
    features = tuple(sorted(processor_features()))
    level = _LEVELS.get(found.bit_width() if found else 0)
    if level is not None and platform.machine() == "x86_64" and hasattr(config.cpp, "march"):
        options["cpp.march"], named = level
        features = tuple(sorted({*named, *_features(found.build_arch_flags())}))
    target = PackageTarget(
        torch=torch.__version__,
        device="cuda" if device.type == "cuda" else "cpu",
        machine=platform.machine(),
        isa=str(found),
        features=features,
        capability=compute_capability(device.type),
    )
    return CompileFor(target, {**options, **_ALWAYS})


def isa_option(target: PackageTarget) -> str:
    """Return the vector instructions of ``target`` as ``compile_for`` takes them."""
    return next((name for name in _WIDTHS if target.isa.startswith(name)), "")


_ALWAYS: Final[dict[str, Any]] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    # Small ones would be written into the code, where no later change of a weight reaches them.
    "always_keep_tensor_constants": True,
    # As many threads as the process has then, not as this one has.
    "cpp.dynamic_threads": True,
}


def _features(flags: str) -> set[str]:
    """Return the names of what compiler ``flags`` such as ``-mavx512bf16`` ask for."""
    names = {name.replace("_", ""): name for name in processor_features()} | {"fma": "fma3"}
    plain = {re.sub("[-_]", "", flag) for flag in re.findall(r"-m([\w-]+)", flags)}
    return {names.get(flag, flag) for flag in plain}

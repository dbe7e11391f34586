"""``ditfastattn doctor``: show what is installed, what can run here, why not, and the remedy."""

from __future__ import annotations

import importlib
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.tensorrt.library import CURRENT, find_library
from ditfastattn.tools.commands.options import Json
from ditfastattn.tools.terminal import open_console, print_json


def doctor(as_json: Json = False) -> None:
    """Show what is installed, what can run here, why not, and what to install."""
    findings = examine()
    show_findings(open_console(stderr=as_json), findings)
    if as_json:
        print_json([asdict(found) for found in findings])


@dataclass(frozen=True)
class Finding:
    """What was found of one part: ``can`` is what it can do here, ``cannot`` why not more."""

    name: str
    version: str
    can: str
    cannot: str = ""
    remedy: str = ""


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Print a row per part, readable at 80 columns, then the remedies: commands to copy."""
    table = Table(title="what ditfastattn can use here", show_lines=True)
    table.add_column("part", no_wrap=True)
    table.add_column("can, and cannot", overflow="fold")
    for found in findings:
        lines = [f"can {found.can}" if found.can else "", found.cannot and f"not: {found.cannot}"]
        named = f"{found.name}\n{found.version}" if found.version else found.name
        table.add_row(named, "\n".join(line for line in lines if line))
    console.print(table)
    for found in findings:
        if found.remedy:
            console.print(f"{found.name}: {found.remedy}", soft_wrap=True)


def examine() -> list[Finding]:
    """Examine every part that ditfastattn can use; nothing is loaded onto a device."""
    checks: tuple[Callable[[], Finding], ...] = (
        _torch,
        _compiler,
        _onnxruntime,
        lambda: _tensorrt("tensorrt_rtx", "tensorrt-rtx"),
        lambda: _tensorrt("tensorrt", "tensorrt"),
        lambda: _package("diffusers", "run and calibrate pipelines"),
        lambda: _package("peft", "recognise LoRA adapters"),
        lambda: _package("cache-dit", "be compared in `ditfastattn bench`", "[bench]"),
    )
    return [check() for check in checks]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _package(distribution: str, purpose: str, extra: str = "") -> Finding:
    version = _version(distribution)
    if version:
        return Finding(distribution, version, purpose)
    wanted = f'"ditfastattn{extra}"' if extra else distribution
    return Finding(distribution, "", "", "not installed", f"pip install {wanted}")


def _torch() -> Finding:
    if torch.cuda.is_available():
        return Finding("torch", torch.__version__, f"run on {torch.cuda.get_device_name()}")
    why = "no CUDA device" if torch.version.cuda else "this build of torch has no CUDA"
    return Finding("torch", torch.__version__, f"run on the CPU ({platform.machine()})", why)


def _compiler() -> Finding:
    """Look for what ``torch.compile`` needs on a CPU."""
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), "")
    if found:
        return Finding("C++ compiler", found, "compile for the CPU (Inductor)")
    return Finding(
        "C++ compiler", "", "", "not on the PATH", "install g++ or clang++ for torch.compile"
    )


def _onnxruntime() -> Finding:
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if not installed:
        remedy = 'pip install "ditfastattn[onnx]"'
        return Finding("onnxruntime", "", "", "not installed", remedy)
    version = ", ".join(f"{name} {_version(name)}" for name in installed)
    if len(installed) > 1:
        return Finding(
            "onnxruntime",
            version,
            "",
            "both packages are installed and overwrite each other",
            "pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
        )
    runtime, reason = _imported("onnxruntime")
    if runtime is None:
        return Finding("onnxruntime", version, "", reason, "reinstall it")
    if not _version("onnx"):
        return Finding("onnxruntime", version, "", "onnx is not installed", "pip install onnx")
    names = [name.removesuffix("ExecutionProvider") for name in runtime.get_available_providers()]
    return Finding("onnxruntime", version, f"export bundles; run them on {', '.join(names)}")


def _tensorrt(module: str, distribution: str) -> Finding:
    version = _version(distribution)
    if not version:
        remedy = f'pip install "ditfastattn[{distribution}]"'
        return Finding(distribution, "", "", "not installed", remedy)
    try:
        library = find_library(module)
    except ConfigError as error:
        return Finding(distribution, version, "", str(error.__cause__ or error), "reinstall it")
    named = [target for target in library.targets if target != CURRENT]
    if torch.cuda.is_available():
        own = "sm{}{}".format(*torch.cuda.get_device_capability())
        if named and own not in named:
            return Finding(
                distribution,
                version,
                f"build engines for {', '.join(named)}",
                f"this GPU, {own}, is not among them",
                'pip install "ditfastattn[tensorrt]", which builds for the GPU it runs on',
            )
        return Finding(distribution, version, f"build engines and run them on this GPU ({own})")
    if not named:
        return Finding(
            distribution,
            version,
            "",
            "it builds only on a machine with a GPU",
            "use a machine with a GPU",
        )
    return Finding(
        distribution,
        version,
        f"build engines for {', '.join(named)}",
        "no CUDA device: engines cannot run here",
        "run the engines on a machine with a GPU",
    )


def _imported(module: str) -> tuple[Any, str]:
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # a broken library may raise anything
        return None, f"it fails to load: {error}"

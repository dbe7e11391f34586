"""Measure compiling: with empty caches, and without what only the first of a process pays."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch

from ditfastattn.tools.benchmarking.process import run_alone


def run_uncached(module: str, *arguments: str) -> dict[str, Any]:
    """Return what ``run_alone`` does, with an empty folder for Inductor's caches."""
    with tempfile.TemporaryDirectory() as folder:
        return run_alone(module, *arguments, TORCHINDUCTOR_CACHE_DIR=folder)


def start_inductor(size: int = 8) -> None:
    """Let Inductor import its parts and find the compiler: costs that belong to no model."""
    with torch.no_grad():
        torch.compile(torch.nn.Linear(size, size).eval())(torch.randn(size, size))


def cpu_seconds() -> float:
    """Return the CPU time so far, the C++ compiler's included; other load does not count."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system

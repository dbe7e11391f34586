"""Describe the machine of a measurement, and measure this process's memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from pathlib import Path

import torch

from ditfastattn.runtime.search.measure.timing import device_name


def machine() -> dict[str, str]:
    """Return the hardware and software of a measurement."""
    return {
        "device": device_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def process_memory(field: str = "VmRSS") -> int:
    """Return a field of this process's ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def trim_memory() -> None:
    """Return free memory to the system, so that new allocations are visible."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

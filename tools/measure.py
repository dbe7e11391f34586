"""Describe the machine that a measurement was taken on, and weigh this process."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from pathlib import Path

import torch

from ditfastattn.runtime.search.measure.timing import device_name


def machine() -> dict[str, str]:
    """Describe the hardware and software that a measurement was taken on."""
    return {
        "device": device_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def process_memory(field: str = "VmRSS") -> int:
    """Return one of the sizes that Linux counts for this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def trim_memory() -> None:
    """Give back to Linux what is free: it must not hide what is allocated next."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

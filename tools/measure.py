"""Describe the machine that a measurement was taken on."""

from __future__ import annotations

import os
import platform

import torch

from ditfastattn.runtime.search.timing import device_name


def machine() -> dict[str, str]:
    """Describe the hardware and software that a measurement was taken on."""
    return {
        "device": device_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }

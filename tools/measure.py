"""Describe the machine and the code of a measurement, and measure the memory of processes."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import write_text_atomically
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


def commit() -> str:
    """Return the commit that this code is of, "" outside a checkout; "-dirty" if it was changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def write_record(path: Path, arguments: dict[str, Any], **found: Any) -> None:
    """Write what was found with ``arguments`` as JSON, with the machine and the commit."""
    data = {"machine": machine(), "commit": commit(), "arguments": arguments, **found}
    write_text_atomically(path, json.dumps(data, indent=1) + "\n")


def process_memory(field: str = "VmRSS", process: int | str = "self") -> int:
    """Return a field of ``/proc/PROCESS/status``, by default of this process, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def slope_per_100(samples: Sequence[tuple[int, int]]) -> float:
    """Return by how much the second numbers grow per 100 of the first, by least squares.

    Raises:
        ConfigError: the first numbers are all the same.
    """
    counts, values = np.array(samples, dtype=float).T
    if np.ptp(counts) == 0:
        raise ConfigError(
            "too few samples for a slope", where="slope", got=len(samples), expected="more"
        )
    return 100 * float(np.polyfit(counts, values, 1)[0])


def trim_memory() -> None:
    """Return free memory to the system, so that new allocations are visible."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

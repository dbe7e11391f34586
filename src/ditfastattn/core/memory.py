"""Know how much memory this machine has to spare."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def available_memory() -> int:
    """Return the bytes that programs can take now without swapping; unlimited where unknown."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return sys.maxsize
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else sys.maxsize

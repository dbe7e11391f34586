"""Run a command of a benchmark in a process of its own, where no other has left its traces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def run_alone(module: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run ``python -m ditfastattn.tools.<module>``; return the JSON of the last line it prints.

    ``environment`` is added to this process's.

    Raises:
        RuntimeError: it failed; with what it wrote to standard error.
    """
    command = [sys.executable, "-m", f"ditfastattn.tools.{module}", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

"""Compile packages in another process, one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from ditfastattn.core.errors import ConfigError

_WORKER: Final = "ditfastattn.export.aoti.worker"


class HelperError(RuntimeError):
    """Report that a helper cannot compile a package, for a reason that may lie in the helper."""


class Helper:
    """Hold a process that compiles; an interrupt reaches this one, which then ends it."""

    def __init__(self) -> None:
        """Start it. Importing torch takes it seconds; requests wait for that.

        Raises:
            HelperError: it cannot be started.
        """
        threads = str(torch.get_num_threads())  # the code of a package may depend on it
        path = os.pathsep.join(sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": path},
                start_new_session=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise HelperError(str(error)) from error

    def compile(self, program: Path, options: Mapping[str, Any], where: str) -> bytes:
        """Return the package of the program at ``program``; ``where`` names it in messages.

        Raises:
            ConfigError: it cannot be compiled.
            HelperError: this process cannot do it, or was ended.
        """
        package = program.with_suffix(".compiled")
        request = {"program": str(program), "package": str(package), "where": where}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({**request, "options": dict(options)}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError as error:
            raise HelperError(f"its process ended: {error}") from error
        if not line:
            raise HelperError(f"its process ended ({self._process.wait()})")
        answer = json.loads(line)
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        if "failed" in answer:
            raise HelperError(answer["failed"])
        content = package.read_bytes()
        package.unlink()
        return content

    def end(self) -> None:
        """End it, with the compilers that it runs."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

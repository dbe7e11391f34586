"""``ditfastattn serve`` in a process of its own, on a free port of the loopback interface."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_STARTS = 600.0  # seconds within which it must answer: what is not compiled yet is compiled first
_ENDS = 60.0


@dataclass(frozen=True)
class ServerProcess:
    """A server that runs."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path = field(repr=False)

    @property
    def url(self) -> str:
        """Return its address."""
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: it has ended, or does not answer in time.
        """
        end = time.monotonic() + _STARTS
        while self.process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.1)
            else:
                return
        state = self.process.poll()
        what = "does not answer" if state is None else f"ended with {state}"
        raise RuntimeError(f"the server {what}: {self.log.read_text(errors='replace')[-4000:]}")


@contextmanager
def server_process(
    source: Path,
    options: Sequence[str] = (),
    on: str = "uvicorn",
    environment: Mapping[str, str] | None = None,
) -> Generator[ServerProcess]:
    """Serve a book or a bundle ``on`` a host; at the end of the block it drains.

    ``environment`` holds variables beside those of this process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ditfastattn.tools.commands.app", "serve", str(source)]
    command += ["--port", str(port), "--on", on, *options]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {})},
        )
        try:
            server = ServerProcess(process, port, Path(log.name))
            server.wait_until_ready()
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_ENDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

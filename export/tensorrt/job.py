"""Run one build in a separate process, with a time limit, and report why it failed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ditfastattn.core.errors import EngineError
from ditfastattn.core.files import naming_faults

Profile = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
WORKER: Final = Path(__file__).with_name("worker.py")
_SHOWN: Final = 5  # lines of the log in an error


@dataclass(frozen=True)
class Job:
    """Describe one build.

    Attributes:
        library: the module.
        graph: the ONNX graph's path.
        engine: where the engine goes.
        log: where the builder's messages go.
        target: a compute capability, or ``current``.
        profiles: least, usual and most shape of each input; none where all are fixed.
    """

    library: str
    graph: Path
    engine: Path
    log: Path
    target: str
    profiles: Mapping[str, Profile]

    def request(self) -> str:
        """Return what the worker reads."""
        return json.dumps(
            {
                "library": self.library,
                "onnx": str(self.graph),
                "engine": str(self.engine),
                "log": str(self.log),
                "target": self.target,
                "profiles": self.profiles,
            }
        )


def run_job(
    job: Job, time_limit: float, on_progress: Callable[[str, float], None], lock: int | None = None
) -> None:
    """Build; call ``on_progress`` with the builder's phase, and how much of it is done (0 to 1).

    The worker holds ``lock``, a descriptor, as long as it lives: if this process is killed, no
    other build begins before the worker is gone.

    Raises:
        EngineError: the builder refused the graph, crashed, or took longer than ``time_limit``
            seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        with naming_faults(request):
            request.write_text(job.request(), encoding="utf-8")
        # -P: modules beside the worker must not shadow others.
        command = [sys.executable, "-P", str(WORKER), str(request)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # it ends with this process, and the worker with it
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=() if lock is None else (lock,),
            text=True,
            errors="replace",
        )
        errors: list[str] = []
        listening = [
            threading.Thread(target=_listen, args=(process.stdout, on_progress), daemon=True),
            threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True),
        ]
        for thread in listening:
            thread.start()
        try:
            code = process.wait(time_limit)
        except subprocess.TimeoutExpired as error:
            raise _failed(job, f"took longer than {time_limit:g} s", errors) from error
        finally:
            process.kill()
            process.wait()
            for thread in listening:
                thread.join()
            if process.stdin is not None:
                process.stdin.close()
            Path(f"{job.engine}.partial").unlink(missing_ok=True)
    if code:
        how = f"crashed with {signal.Signals(-code).name}" if code < 0 else "failed"
        raise _failed(job, how, errors)


def _listen(lines: object, on_progress: Callable[[str, float], None]) -> None:
    for line in lines or ():  # type: ignore[attr-defined]  # a pipe
        done, _, rest = line.rstrip("\n").partition("\t")
        of, _, phase = rest.partition("\t")
        if done.isdigit() and of.isdigit():
            on_progress(phase, int(done) / max(int(of), 1))


def _failed(job: Job, how: str, errors: list[str]) -> EngineError:
    said = [line.rstrip() for line in errors if line.strip()]
    if job.log.is_file():
        with job.log.open(encoding="utf-8", errors="replace") as file:
            said += [line.rstrip() for line in file if "ERROR: " in line]
    shown = "\n  ".join(said[-_SHOWN:]) or "no output"
    return EngineError(
        f"{job.graph.name}: the TensorRT builder {how}:\n  {shown}\n  log: {job.log}"
    )

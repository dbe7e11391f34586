"""Build one engine in a separate process, so that a crash of the builder harms nothing else.

Run as a script with the path of a request in JSON (see ``Job.request``). It imports nothing but the
library, so that it starts at once. It prints a line for every step of progress, and writes the
builder's messages to the request's log. It ends when its standard input does: whoever started it is
gone.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any


def main(path: str) -> str:
    """Build the engine of the request in ``path``; return why it failed, or ""."""
    request: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    library: Any = importlib.import_module(request["library"])
    with Path(request["log"]).open("w", encoding="utf-8", buffering=1) as log:
        logger = _logger(library, log)
        builder = library.Builder(logger)
        network = builder.create_network(_network_flags(library))
        parser = library.OnnxParser(network, logger)
        if not parser.parse_from_file(request["onnx"]):
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            return "the parser refuses the graph: " + "; ".join(errors)
        config = builder.create_builder_config()
        _configure(library, builder, config, request)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            return "the builder made no engine"
        _write(Path(request["engine"]), engine)
    return ""


def _write(path: Path, engine: Any) -> None:
    temporary = Path(f"{path}.partial")
    with temporary.open("wb") as file:
        file.write(memoryview(engine))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _end_with_starter() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)  # the builder cannot be interrupted


def _network_flags(library: Any) -> int:
    """Ask for strong typing, the only kind in TensorRT 11: dtypes are the graph's."""
    flags = library.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def _configure(library: Any, builder: Any, config: Any, request: dict[str, Any]) -> None:
    if request["target"] != "current":
        config.num_compute_capabilities = 1
        wanted = getattr(library.ComputeCapability, request["target"].upper())
        config.set_compute_capability(wanted, 0)
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    if hasattr(library, "IProgressMonitor"):
        config.progress_monitor = _monitor(library)
    if request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in request["profiles"].items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)


def _logger(library: Any, file: Any) -> Any:
    class Logger(library.ILogger):  # type: ignore[misc]  # known at run time only
        def log(self, severity: Any, message: str) -> None:
            label = str(severity).rpartition(".")[2]
            for line in message.splitlines() or [""]:
                file.write(f"{label}: {line}\n")

    return Logger()


def _monitor(library: Any) -> Any:
    class Monitor(library.IProgressMonitor):  # type: ignore[misc]  # the same
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._say(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._say(phase_name, step + 1)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._say(phase_name, self.steps.pop(phase_name, 1))

        def _say(self, phase: str, done: int) -> None:
            print(f"{done}\t{self.steps.get(phase, done)}\t{phase}", flush=True)

    return Monitor()


if __name__ == "__main__":
    threading.Thread(target=_end_with_starter, daemon=True).start()
    reason = main(sys.argv[1])
    if reason:
        print(reason, file=sys.stderr)
        sys.exit(1)

"""Compile packages here and in helper processes, as many at once as there are cores.

Half of a compilation is Python, which two threads cannot run at once. Helpers compile in the
order in which packages come; this process traces graphs until there are no more, and then compiles
too, the last first. It alone checks packages and writes them.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from torch._inductor import config
from torch.export import ExportedProgram

from ditfastattn.core.memory import available_memory
from ditfastattn.export.aoti.checked import Compilation
from ditfastattn.export.aoti.compile import compile_package
from ditfastattn.export.aoti.helper import Helper, HelperError
from ditfastattn.export.aoti.program import save_program

log = logging.getLogger(__name__)

_MEMORY: Final = 2 * 2**30  # bytes that a helper and its C++ compiler take at most, and some more


def helper_count() -> int:
    """Return how many helpers this machine has cores and memory for, besides this process.

    ``TORCHINDUCTOR_COMPILE_THREADS``, by which Inductor is limited, limits these too.
    """
    return max(0, min((config.compile_threads or 1) - 1, available_memory() // _MEMORY))


@dataclass(frozen=True)
class _Job:
    """Hold what is to be compiled; ``program`` is its file for helpers, None where they cannot."""

    compilation: Compilation
    program: Path | None
    done: Callable[[], None]


class Compilations:
    """Compile packages, and tell when each is written; a context, which ends the helpers."""

    def __init__(self, helpers: int) -> None:
        """Start up to ``helpers`` processes as packages come; with none, compile as they come."""
        self._count = helpers
        self._own: list[_Job] = []
        self._given: dict[Future[bytes], _Job] = {}
        self._helpers: list[Helper] = []
        self._starting, self._local = threading.Lock(), threading.local()

    @property
    def here(self) -> bool:
        """Return whether this process compiles all packages."""
        return not self._count

    def __enter__(self) -> Self:
        """Make the folder of what helpers read and write."""
        self._folder = tempfile.TemporaryDirectory()
        self._threads = ThreadPoolExecutor(max(self._count, 1), "compiling")
        return self

    def __exit__(self, *_: object) -> None:
        """End the helpers, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._starting:
            self._count = 0
            for helper in self._helpers:
                helper.end()
        self._threads.shutdown()
        self._folder.cleanup()

    def add(
        self, compilation: Compilation, program: ExportedProgram | None, done: Callable[[], None]
    ) -> None:
        """Compile a package, now or later; ``done`` is called when it is written.

        Args:
            compilation: what to compile.
            program: the same, for a helper; None where only this process can compile it.
            done: called from this thread, within this call, a later one or ``finish``.

        Raises:
            ConfigError: this or an earlier one cannot be compiled.
        """
        if not self._count:
            self._settle(_Job(compilation, None, done))
        elif program is None or not (self._own or self._given):
            self._own.append(_Job(compilation, None, done))  # the only one, perhaps
        else:
            path = Path(self._folder.name) / f"{compilation.path.stem}.program.pt2"
            save_program(program, path)
            self._give(_Job(compilation, path, done))
        self._collect()

    def finish(self) -> None:
        """Compile what is left, and wait for the helpers.

        Raises:
            ConfigError: a package cannot be compiled.
        """
        while self._own or self._given:
            job = self._own.pop() if self._own else self._taken_back()
            if job is not None:
                self._settle(job)
            else:
                wait(self._given, return_when=FIRST_COMPLETED)
            self._collect()

    def _give(self, job: _Job) -> None:
        self._given[self._threads.submit(self._by_helper, job)] = job

    def _taken_back(self) -> _Job | None:
        """Return the last job that no helper has begun."""
        for future in reversed(self._given):
            if future.cancel():
                return self._given.pop(future)
        return None

    def _collect(self) -> None:
        """Check and write what helpers have compiled."""
        for future in [future for future in self._given if future.done()]:
            job = self._given.pop(future)
            try:
                content = future.result()
            except HelperError as error:
                name = job.compilation.path.name
                log.warning("%s: a helper failed, it is compiled here: %s", name, error)
                self._settle(job)
            else:
                self._settle(job, content)

    def _settle(self, job: _Job, content: bytes | None = None) -> None:
        """Compile here, unless ``content`` was; check it, write it, or compile it otherwise."""
        compilation = job.compilation
        if content is None:
            content = compile_package(
                compilation.module, compilation.examples, compilation.options, compilation.path.name
            )
        if compilation.accept(content):
            job.done()
        elif job.program is not None:
            self._give(job)
        else:
            self._settle(job)

    def _by_helper(self, job: _Job) -> bytes:
        """Compile by the helper of this thread."""
        assert job.program is not None
        helper: Helper | None = getattr(self._local, "helper", None)
        if helper is None:
            with self._starting:
                if not self._count:
                    raise HelperError("the export has ended")
                helper = self._local.helper = Helper()
                self._helpers.append(helper)
        options, name = job.compilation.options, job.compilation.path.name
        return helper.compile(job.program, options, name)

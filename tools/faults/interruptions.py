"""Kill processes, fill the disk, and let processes meet: what is left, and what follows."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import replace_folder
from ditfastattn.core.locks import sole_writer
from ditfastattn.runtime.bundle.manifest import MANIFEST
from ditfastattn.runtime.tensorrt.engines import read_engine, read_engines
from ditfastattn.tools.faults.inject import children_of
from ditfastattn.tools.faults.scene import Scene, fails_at, worst
from ditfastattn.tools.faults.subject import (
    built,
    built_by_tensorrt,
    outcome,
)

_MOST: Final = 999  # changes of the disk
_FEW: Final = 30  # trials


def interrupted_export(scene: Scene, full: bool, there: bool) -> Iterator[str]:
    """Interrupt an export at each of its changes.

    If trials are few, at every 20th: each of the four ways to interrupt one begins elsewhere.
    """
    first, every = (10 * full + 5 * there, 20) if scene.trials < _FEW else (0, 1)
    for at in range(first, _MOST, every):
        out = scene.place(there)
        began = fails_at(scene, out.parent, at, full, partial(scene.export, out))
        if began == "over":
            return
        seen = outcome(partial(scene.image, out), scene.is_one_of(0, 1))
        if there and not (out / MANIFEST).is_file():
            seen = "wrong"  # there is no bundle any more
        yield worst(began, seen, scene.exports_well(out))


def interrupted_build(scene: Scene, full: bool) -> Iterator[str]:
    """Interrupt a build at each of its changes."""
    for at in range(_MOST):
        bundle = scene.place(True)
        began = fails_at(scene, bundle, at, full, partial(built, bundle))
        if began == "over":
            return

        seen = outcome(partial(scene.image, bundle), scene.is_one_of(0))
        yield worst(began, seen, outcome(partial(_builds_well, bundle, built), bool))


def _builds_well(bundle: Path, build: Callable[[Path], None]) -> bool:
    """Return whether a build leaves engines that are whole, their logs, and no more."""
    build(bundle)
    out = bundle / "engines" / "sm89"
    engines = read_engines(out)
    content = [read_engine(out, spec) for spec in engines.engines]
    names = {spec.file for spec in engines.engines}
    names |= {Path(name).with_suffix(".log").name for name in names}
    left = {path.name for path in out.iterdir()}
    return bool(content) and left == {*names, "engines.json", ".lock"}


def killed_builders(scene: Scene) -> Iterator[str]:
    """Kill builds by TensorRT at any time, or the processes that build their engines.

    Nothing where TensorRT is not installed.
    """
    if find_spec("tensorrt_rtx") is None:
        return
    began = time.monotonic()
    wanted = _builds_well(scene.place(True), built_by_tensorrt)
    lasts = time.monotonic() - began
    yield "survived" if wanted else "wrong"
    for trial in range(max(2, scene.trials // 6)):
        bundle = scene.place(True)
        builder = os.fork()
        if builder == 0:
            os._exit(outcome(partial(built_by_tensorrt, bundle), lambda _: True) == "raw")
        time.sleep(scene.random.uniform(0.0, lasts))
        for process in children_of(builder) if trial % 2 else [builder]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(builder, 0)[1])
        again = outcome(partial(_builds_well, bundle, built_by_tensorrt), bool)
        yield worst("raw" if code > 0 else "", again)


def interrupted_search(scene: Scene, full: bool) -> Iterator[str]:
    """Interrupt a search at its changes, all of them if there are no more than trials.

    What resumes must find the same plan.
    """
    wanted = scene.plan_found
    out = scene.place(False).with_name("plan.json")
    changes = scene.disk.changes(out.parent, full, partial(scene.calibrate, out))
    for at in sorted(scene.random.sample(range(changes), min(changes, scene.trials))):
        out = scene.place(False).with_name("plan.json")
        work = partial(scene.calibrate, out)
        began = fails_at(scene, out.parent, at, full, work)
        if began != "over":
            again = outcome(work, lambda plan: plan.strategies == wanted)
            left = {path.name for path in out.parent.iterdir()} - {"plan.json", ".plan.json.lock"}
            yield worst(began, again, "wrong" if left else "survived")


def two_exporters(scene: Scene) -> Iterator[str]:
    """Let three processes export to one folder at once."""
    for _ in range(max(1, scene.trials // 12)):
        out, children = scene.place(True), list[int]()
        for _ in range(3):
            child = os.fork()
            if child == 0:
                os._exit(outcome(partial(scene.export, out), lambda _: True) == "raw")
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        seen = outcome(partial(scene.image, out), scene.is_one_of(1))
        left = [path.name for path in out.parent.iterdir()] != ["bundle"]
        yield worst("raw" if any(codes) else "", seen, "wrong" if left else "")


def entries(scene: Scene) -> Iterator[str]:
    """Let four processes enter by one lock, which each removes: none may meet another."""
    folder = scene.place(False).parent
    lock, inside = folder / ".lock", folder / "inside"

    def enter() -> None:
        for _ in range(scene.trials):
            try:
                with sole_writer(lock, folder, "taken", remove=True):
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    inside.unlink()
                    with (folder / "entries").open("a") as file:
                        file.write("survived\n")
            except ConfigError:
                pass
            except FileExistsError:
                with (folder / "entries").open("a") as file:
                    file.write("wrong\n")

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            enter()
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    yield from (folder / "entries").read_text().split()


def readers(scene: Scene) -> Iterator[str]:
    """Load a bundle again and again while another process replaces it."""
    out = scene.place(True)
    writer = os.fork()
    if writer == 0:
        for turn in range(10**6):
            new = out.with_name(".new")
            shutil.copytree(scene.whole[turn % 2], new)
            replace_folder(new, out)
    for _ in range(scene.trials):
        yield outcome(lambda: scene.image(out), scene.is_one_of(0, 1))
    os.kill(writer, 9)
    os.waitpid(writer, 0)

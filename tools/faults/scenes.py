"""The kinds of faults: each yields, trial by trial, what became of it."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

import ditfastattn
from ditfastattn.core.errors import ConfigError, EngineError
from ditfastattn.core.files import replace_folder
from ditfastattn.core.locks import sole_writer
from ditfastattn.export import prepare
from ditfastattn.export.capture_call import CapturedCall, RecordedCall, capture_call
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.bundle.manifest import MANIFEST, manifest_text
from ditfastattn.runtime.tensorrt.engines import read_engine, read_engines
from ditfastattn.tools.faults.inject import Disk, flipped, in_child
from ditfastattn.tools.faults.subject import (
    CALL,
    built,
    calibrated,
    image_by_bundle,
    image_by_plan,
    outcome,
    plan_of,
    subject,
)

_MOST: Final = 999  # changes of the disk
_CALIBRATIONS: Final = 8  # searches that are interrupted
_MIDWAY: Final = 30  # changes of the disk that an export and a search make before they are killed
_BAD: Final[tuple[Any, ...]] = (None, -1, 0, 1e308, 2**70, "", "x", "\ud800", [], {}, True, [[]])


@dataclass
class Scene:
    """Hold what all kinds of faults share; ``trials`` counts those of a random kind."""

    root: Path
    random: random.Random
    trials: int

    def __post_init__(self) -> None:
        """Make the plans, and a bundle of each."""
        self.disk, self.pipeline = Disk(), subject()
        self._captures: dict[int, CapturedCall] = {}
        self.plans = [plan_of(self.pipeline, s) for s in (Strategy.SHARE_STEP, Strategy.WINDOW)]
        self.whole = [self.root / "whole-0", self.root / "whole-1"]
        ditfastattn.export(self.pipeline, CALL, self.plans[0], self.whole[0])
        self.export(self.whole[1])
        self.images = [image_by_bundle(self.pipeline, folder) for folder in self.whole]
        assert not torch.equal(*self.images)

    def place(self, bundle: bool) -> Path:
        """Return where an export goes: an empty folder's "bundle", or the first bundle there."""
        folder = self.root / "place"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if bundle:
            shutil.copytree(self.whole[0], folder / "bundle")
        return folder / "bundle"

    def export(self, out: Path) -> None:
        """Export the second plan; the model is captured once, which changes no file."""
        with patch.object(prepare, "capture_call", self._captured):
            ditfastattn.export(self.pipeline, CALL, self.plans[1], out)

    def _captured(self, model: Any, call: RecordedCall, timestep: str) -> CapturedCall:
        if call.batch not in self._captures:
            self._captures[call.batch] = capture_call(model, call, timestep)
        return self._captures[call.batch]

    def image(self, out: Path) -> Tensor:
        """Return the image of the bundle in ``out``."""
        return image_by_bundle(self.pipeline, out)

    def is_one_of(self, *images: int) -> Callable[[Tensor], bool]:
        """Return whether an image is one of those of the bundles."""
        return lambda found: any(torch.equal(found, self.images[index]) for index in images)

    def exports_well(self, out: Path) -> str:
        """Return what becomes of an export after a fault: it must leave a bundle, and no more."""

        def again() -> bool:
            self.export(out)
            left = [path.name for path in out.parent.iterdir()]
            return left == ["bundle"] and torch.equal(self.image(out), self.images[1])

        return outcome(again, bool)

    @cached_property
    def plan_found(self) -> Any:
        """Return what an undisturbed search finds."""
        return calibrated(self.pipeline, self.root / "undisturbed.json").strategies


def _worst(*outcomes: str) -> str:
    return next((kind for kind in ("wrong", "raw") if kind in outcomes), "survived")


def _fails(scene: Scene, folder: Path, at: int, full: bool, work: Callable[[], object]) -> str:
    """Let ``work`` fail at a change of ``folder``; return "over" where it makes fewer changes."""
    if not full:

        def killed() -> None:
            with scene.disk.failing(folder, at, full):
                work()

        code = in_child(killed)
        return {0: "over", -9: "survived"}.get(code, "raw")
    try:
        with scene.disk.failing(folder, at, full):
            work()
    except (ConfigError, EngineError):
        return "survived"
    except Exception:  # whatever is not an error of ours
        return "raw"
    return "survived" if scene.disk.reached else "over"


def interrupted_export(scene: Scene, full: bool, there: bool) -> Iterator[str]:
    """Interrupt an export at each of its changes."""
    for at in range(_MOST):
        out = scene.place(there)
        began = _fails(scene, out.parent, at, full, partial(scene.export, out))
        if began == "over":
            return
        seen = outcome(partial(scene.image, out), scene.is_one_of(0, 1))
        if there and not (out / MANIFEST).is_file():
            seen = "wrong"  # there is no bundle any more
        yield _worst(began, seen, scene.exports_well(out))


def interrupted_build(scene: Scene, full: bool) -> Iterator[str]:
    """Interrupt a build at each of its changes."""
    for at in range(_MOST):
        bundle = scene.place(True)
        began = _fails(scene, bundle, at, full, partial(built, bundle))
        if began == "over":
            return

        def again(bundle: Path = bundle) -> bool:
            built(bundle)
            out = bundle / "engines" / "sm89"
            engines = read_engines(out)
            content = [read_engine(out, spec) for spec in engines.engines]
            names = {spec.file for spec in engines.engines}
            names |= {Path(name).with_suffix(".log").name for name in names}
            left = {path.name for path in out.iterdir()}
            return bool(content) and left == {*names, "engines.json", ".lock"}

        seen = outcome(partial(scene.image, bundle), scene.is_one_of(0))
        yield _worst(began, seen, outcome(again, bool))


def interrupted_search(scene: Scene, full: bool) -> Iterator[str]:
    """Interrupt a search at some of its changes; what resumes must find the same plan."""
    wanted = scene.plan_found
    for at in sorted(scene.random.sample(range(60), _CALIBRATIONS)):
        out = scene.place(False).with_name("plan.json")
        work = partial(calibrated, scene.pipeline, out)
        began = _fails(scene, out.parent, at, full, work)
        if began != "over":
            again = outcome(work, lambda plan: plan.strategies == wanted)
            left = {path.name for path in out.parent.iterdir()} - {"plan.json", ".plan.json.lock"}
            yield _worst(began, again, "wrong" if left else "survived")


def two_exporters(scene: Scene) -> Iterator[str]:
    """Let three processes export to one folder at once."""
    for _ in range(max(1, scene.trials // 40)):
        out, children = scene.place(True), list[int]()
        for _ in range(3):
            child = os.fork()
            if child == 0:
                os._exit(outcome(partial(scene.export, out), lambda _: True) == "raw")
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        seen = outcome(partial(scene.image, out), scene.is_one_of(1))
        left = [path.name for path in out.parent.iterdir()] != ["bundle"]
        yield _worst("raw" if any(codes) else "", seen, "wrong" if left else "")


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


def damaged(scene: Scene, path: Path, right: Callable[[], str], cut: bool) -> Iterator[str]:
    """Change bits of a file, or truncate it; ``right`` says what follows."""
    whole = path.read_bytes()
    for _ in range(scene.trials // 10):
        place = scene.random.randrange(len(whole))
        path.write_bytes(
            whole[:place] if cut else flipped(whole, 8 * place + scene.random.randrange(8))
        )
        yield right()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(whole)


def damaged_bundle(scene: Scene, cut: bool) -> Iterator[str]:
    """Damage each file of a bundle, and load it."""
    out = scene.place(True)
    for path in sorted(out.iterdir()):
        yield from damaged(
            scene, path, lambda: outcome(lambda: scene.image(out), scene.is_one_of(0)), cut
        )


def damaged_plan(scene: Scene, cut: bool) -> Iterator[str]:
    """Damage a plan, and run it: what it is accepted for does not depend on the damage."""
    path = scene.place(False).with_name("plan.json")
    scene.plans[0].save(path)
    wanted = image_by_plan(scene.pipeline, path)
    run = partial(image_by_plan, scene.pipeline, path)
    yield from damaged(
        scene, path, lambda: outcome(run, lambda found: torch.equal(found, wanted)), cut
    )


def damaged_export(scene: Scene, cut: bool) -> Iterator[str]:
    """Damage what an interrupted export has left, and export again."""
    out = scene.place(False)
    _fails(scene, out.parent, _MIDWAY, False, lambda: scene.export(out))
    partial_folder = out.with_name(".bundle.partial")
    kept = scene.root / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(partial_folder, kept)
    for name in sorted(path.name for path in kept.iterdir()):
        whole = (kept / name).read_bytes()
        for _ in range(max(1, scene.trials // 50)):
            out = scene.place(False)
            shutil.copytree(kept, partial_folder)
            place = scene.random.randrange(max(1, len(whole)))
            changed = whole[:place] if cut else flipped(whole or b"x", 8 * place)
            (partial_folder / name).write_bytes(changed)
            yield scene.exports_well(out)


def damaged_search(scene: Scene, cut: bool) -> Iterator[str]:
    """Damage what an interrupted search has left, and search again."""
    wanted = scene.plan_found
    out = scene.place(False).with_name("plan.json")
    work = partial(calibrated, scene.pipeline, out)
    _fails(scene, out.parent, _MIDWAY, False, work)
    checkpoint, kept = out.with_name("plan.json.search"), scene.root / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(checkpoint, kept)
    for name in sorted(path.name for path in kept.iterdir()):
        out = scene.place(False).with_name("plan.json")
        shutil.copytree(kept, checkpoint)
        whole = (kept / name).read_bytes()
        place = scene.random.randrange(max(1, len(whole)))
        changed = whole[:place] if cut else flipped(whole or b"x", 8 * place)
        (checkpoint / name).write_bytes(changed)
        yield outcome(work, lambda plan: plan.strategies == wanted)


def damaged_engines(scene: Scene, cut: bool) -> Iterator[str]:
    """Damage a list of engines and an engine, and read both."""
    bundle = scene.place(True)
    built(bundle)
    out = bundle / "engines" / "sm89"

    def read() -> list[bytes]:
        return [read_engine(out, spec) for spec in read_engines(out).engines]

    wanted = read()
    for path in (out / "engines.json", next(out.glob("*.engine"))):
        yield from damaged(scene, path, lambda: outcome(read, lambda found: found == wanted), cut)


def _places(item: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in ``item``."""
    inner = item.items() if isinstance(item, dict) else enumerate(item)
    for key, value in inner:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from _places(value, (*path, key))


def _with_bad_values(scene: Scene, data: Any, but: tuple[Any, ...] | None = None) -> Iterator[Any]:
    """Yield ``data`` with a bad value at some place, which is not at ``but`` or within it."""
    known = [path for path in _places(data) if but is None or path[: len(but)] != but]
    for _ in range(scene.trials):
        changed = copy.deepcopy(data)
        place, holder = scene.random.choice(known), changed
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = scene.random.choice(_BAD)
        yield changed


def bad_plan_fields(scene: Scene) -> Iterator[str]:
    """Put bad values into a plan's fields; one that is accepted runs as the plan did before."""
    path = scene.place(False).with_name("plan.json")
    scene.plans[0].save(path)
    wanted = image_by_plan(scene.pipeline, path)
    for data in _with_bad_values(scene, json.loads(path.read_text())):
        path.write_text(json.dumps(data))
        yield outcome(
            lambda: image_by_plan(scene.pipeline, path), lambda found: torch.equal(found, wanted)
        )


def bad_manifest_fields(scene: Scene, sealed: bool) -> Iterator[str]:
    """Put bad values into a manifest's fields; if ``sealed``, as one would who means it.

    What such a manifest describes may be another bundle, and run as that. The model's config is
    for the pipeline to read, and any value may be right there.
    """
    out = scene.place(True)
    right = (lambda _: True) if sealed else scene.is_one_of(0)
    but = ("model", "config") if sealed else None
    for data in _with_bad_values(scene, json.loads((out / MANIFEST).read_text()), but):
        text = manifest_text(data) if sealed else json.dumps(data)
        (out / MANIFEST).write_text(text)
        yield outcome(lambda: scene.image(out), right)


def scenes() -> dict[str, Callable[[Scene], Iterator[str]]]:
    """Return the kinds of faults by their names."""
    found: dict[str, Callable[[Scene], Iterator[str]]] = {}
    for how, full in (("killed", False), ("disk full", True)):
        found[f"export, {how}, a bundle there"] = partial(interrupted_export, full=full, there=True)
        found[f"export, {how}, none there"] = partial(interrupted_export, full=full, there=False)
        found[f"build, {how}"] = partial(interrupted_build, full=full)
        found[f"calibrate, {how}"] = partial(interrupted_search, full=full)
    found["three exporters in one folder"] = two_exporters
    found["entries by a lock that is removed"] = entries
    found["loads while a bundle is replaced"] = readers
    for how, cut in (("a bit changed", False), ("truncated", True)):
        found[f"file of a bundle, {how}"] = partial(damaged_bundle, cut=cut)
        found[f"plan, {how}"] = partial(damaged_plan, cut=cut)
        found[f"file of an interrupted export, {how}"] = partial(damaged_export, cut=cut)
        found[f"file of an interrupted search, {how}"] = partial(damaged_search, cut=cut)
        found[f"engine or list of engines, {how}"] = partial(damaged_engines, cut=cut)
    found["field of a plan replaced"] = bad_plan_fields
    found["field of a manifest replaced"] = partial(bad_manifest_fields, sealed=False)
    found["field of a manifest replaced and sealed"] = partial(bad_manifest_fields, sealed=True)
    return found

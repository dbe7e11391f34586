"""Damage files, and put bad values into their fields: what is accepted must be right."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from ditfastattn.runtime.bundle.manifest import MANIFEST, manifest_text
from ditfastattn.runtime.tensorrt.engines import read_engine, read_engines
from ditfastattn.tools.faults.inject import flipped
from ditfastattn.tools.faults.scene import Scene, fails_at
from ditfastattn.tools.faults.subject import (
    built,
    image_by_plan,
    outcome,
)

_MIDWAY: Final = 30  # changes of the disk that an export and a search make before they are killed
_BAD: Final[tuple[Any, ...]] = (None, -1, 0, 1e308, 2**70, "", "x", "\ud800", [], {}, True, [[]])


def damaged(scene: Scene, path: Path, right: Callable[[], str], cut: bool) -> Iterator[str]:
    """Change bits of a file, or truncate it; ``right`` says what follows."""
    whole = path.read_bytes()
    for _ in range(scene.trials // 4):
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
    fails_at(scene, out.parent, _MIDWAY, False, lambda: scene.export(out))
    partial_folder = out.with_name(".bundle.partial")
    kept = scene.root / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(partial_folder, kept)
    for name in sorted(path.name for path in kept.iterdir()):
        whole = (kept / name).read_bytes()
        for _ in range(max(1, scene.trials // 15)):
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
    work = partial(scene.calibrate, out)
    fails_at(scene, out.parent, _MIDWAY, False, work)
    checkpoint, kept = out.with_name("plan.json.search"), scene.root / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(checkpoint, kept)
    for name in sorted(path.name for path in kept.iterdir()):
        whole = (kept / name).read_bytes()
        for _ in range(max(1, scene.trials // 15)):
            out = scene.place(False).with_name("plan.json")
            shutil.copytree(kept, checkpoint)
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

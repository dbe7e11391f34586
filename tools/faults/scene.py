"""What all kinds of faults share: a pipeline, two plans, and a bundle of each."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx import GraphModule

import ditfastattn
from ditfastattn.core.errors import ConfigError, EngineError
from ditfastattn.export import prepare
from ditfastattn.export.capture_call import CapturedCall, RecordedCall, capture_call
from ditfastattn.passes.capture.captured_graph import GraphInput
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.search.measure import session
from ditfastattn.runtime.search.measure.captured_model import (
    CapturedModel,
    ModelOptions,
    capture_model,
)
from ditfastattn.tools.faults.inject import Disk, in_child
from ditfastattn.tools.faults.subject import (
    CALL,
    calibrated,
    image_by_bundle,
    outcome,
    plan_of,
    subject,
)


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
        self._models: dict[str, CapturedModel] = {}
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

    def calibrate(self, out: Path) -> Plan:
        """Search a plan; the model is captured once, which changes no file."""
        with patch.object(session, "capture_model", self._modelled):
            return calibrated(self.pipeline, out)

    def _modelled(
        self,
        module: GraphModule,
        inputs: tuple[GraphInput, ...],
        args: Sequence[Any],
        options: ModelOptions,
    ) -> CapturedModel:
        shapes = [item.shape if isinstance(item, Tensor) else item for item in args]
        key = repr((shapes, inputs, options))
        if key not in self._models:
            self._models[key] = capture_model(module, inputs, args, options)
        return self._models[key]

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
        return self.calibrate(self.root / "undisturbed.json").strategies


def worst(*outcomes: str) -> str:
    """Return the worst of ``outcomes``."""
    return next((kind for kind in ("wrong", "raw") if kind in outcomes), "survived")


def fails_at(scene: Scene, folder: Path, at: int, full: bool, work: Callable[[], object]) -> str:
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

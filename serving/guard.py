"""Whether images keep what their tier promises: some are made again, dense, and compared."""

from __future__ import annotations

import io
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.book.manifest import Manifest
from ditfastattn.runtime.search.judge.judgement import metric_values
from ditfastattn.runtime.search.record.planned_target import target_for
from ditfastattn.serving.job import Job, Kind, Made

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """Say what a check has found: the value of the tier's metric, and whether the promise holds."""

    tier: str
    plan: str
    value: float
    kept: bool


class Guard:
    """Choose the images that are checked, and remember the requests that are not to be trusted."""

    def __init__(self, manifest: Manifest, every: int, fall_back: bool) -> None:
        """Check one image of ``every`` so many that a plan makes.

        With ``fall_back`` requests like one whose image broke the promise run dense from then on.

        Raises:
            ConfigError: a tier's metric is the user's own, which a book does not hold.
        """
        self._every, self._fall_back = every, fall_back
        self._promises = {tier.name: tier.promise for tier in manifest.tiers}
        self._targets = {name: target_for(each) for name, each in self._promises.items()}
        self._made: Counter[str] = Counter()  # images by plan
        self._broken: set[Kind] = set()
        self._lock = threading.Lock()  # of the count: images are made in several threads

    def distrusts(self, kind: Kind) -> bool:
        """Return whether images of ``kind`` are to run dense."""
        return kind in self._broken

    def due(self, made: Sequence[Made]) -> bool:
        """Count the images that a plan has ``made``; return whether one is to be checked."""
        plan = made[0].choice.name
        if not plan:
            return False
        with self._lock:
            before = self._made[plan]
            now = self._made[plan] = before + len(made)
        return now // self._every > before // self._every

    def compare(self, job: Job, planned: Made, dense: Made, condition: str) -> Checked:
        """Return how an image compares with the dense one, by the metric of its tier."""
        kind, wanted = job.wanted.kind, job.wanted
        target, promise = self._targets[kind.tier], self._promises[kind.tier]
        (value,) = metric_values(
            target, _pixels(dense), _pixels(planned), {condition: [wanted.condition]}
        )
        kept = target.met_by(value)
        if not kept:
            log.warning(
                "ditfastattn: plan %s broke the promise of the tier %r: %s is %.4g, not %.4g "
                "(%d steps, guidance %s, %dx%d, seed %d)%s",
                planned.choice.name,
                kind.tier,
                promise.name,
                value,
                promise.bound,
                kind.steps,
                kind.guidance,
                kind.width,
                kind.height,
                wanted.seed,
                "; requests like it run dense from now on" if self._fall_back else "",
            )
            if self._fall_back:
                self._broken.add(kind)
        return Checked(kind.tier, planned.choice.name, value, kept)


def make_guard(manifest: Manifest | None, every: int, fall_back: bool) -> Guard | None:
    """Return the guard of a server; None where ``every`` is 0.

    Raises:
        ConfigError: a bundle is served, or the metric of a tier is the user's own.
    """
    if not every:
        return None
    if manifest is None:
        raise ConfigError(
            "a guard compares with the dense model, which a bundle does not hold",
            where="guard",
            got=every,
            expected=0,
            remedy="serve a plan book, or leave out --guard",
        )
    return Guard(manifest, every, fall_back)


def _pixels(made: Made) -> Tensor:
    """Return the image that a client gets as ``[1, C, H, W]`` in [0, 1]."""
    found = np.asarray(Image.open(io.BytesIO(made.png)), dtype=np.float32) / 255.0
    return torch.from_numpy(found[..., None] if found.ndim == 2 else found).movedim(-1, 0)[None]

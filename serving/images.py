"""A pipeline that is served: what its requests may ask for, and what they become."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.accelerate import accelerate
from ditfastattn.runtime.book.book import Book
from ditfastattn.runtime.plan_choice import Choice, OnMismatch
from ditfastattn.runtime.quality import AUTO, LOSSLESS
from ditfastattn.serving.guard import Checked, make_guard
from ditfastattn.serving.job import Job, Kind, Made, StoppedError, Wanted
from ditfastattn.serving.lanes import Lanes, check_no_cuda_graphs
from ditfastattn.serving.limits import Limits
from ditfastattn.serving.pipeline import BUNDLED, generate, taken_by
from ditfastattn.serving.request import ImageRequest, RequestError

log = logging.getLogger(__name__)


class ImageServer:
    """Make images by one pipeline and one plan book, or with a bundle as its transformer."""

    def __init__(
        self,
        pipeline: Any,
        book: Book | None,
        *,
        name: str = "",
        limits: Limits | None = None,
        on_mismatch: str = OnMismatch.DENSE,
        call: Mapping[str, Any] | None = None,
        guard: int = 0,
        fall_back: bool = False,
        **options: Any,
    ) -> None:
        """Accelerate ``pipeline`` by ``book``; None where its transformer is a bundle.

        ``name`` is the model's in the API; ``call`` holds arguments of the pipeline that are those
        of all requests; ``options`` are those of ``accelerate``. One image of ``guard`` so many is
        made again, dense, and compared; with ``fall_back`` what broke its promise runs dense.

        Raises:
            ConfigError: the pipeline cannot be served, or not by this book.
        """
        self.limits, self.book = limits or Limits(), book
        self.taken = taken_by(pipeline, call or {})
        self.name = name or type(pipeline).__name__
        self._created = int(time.time())
        if self.limits.turns > 1:
            check_no_cuda_graphs(options)
        if book is not None:
            accelerate(pipeline, book, on_mismatch=on_mismatch, **options)
        self._lanes = Lanes(pipeline, self.limits.turns)
        manifest = None if book is None else book.manifest
        self._guard = make_guard(manifest, guard, fall_back)
        self._twins: set[Job] = set()  # of the checks under way
        self.tiers = (BUNDLED,) if manifest is None else manifest.names
        self.default = BUNDLED if manifest is None else manifest.default

    def generate(self, jobs: Sequence[Job]) -> list[Made]:
        """Return the images of ``jobs``, which are of one kind; errors as in ``generate``."""
        kind = jobs[0].wanted.kind
        with self._lanes.lane() as lane:
            if self._guard is None or not self._guard.distrusts(kind):
                return generate(lane, self.taken, jobs)
            made = generate(lane, self.taken, jobs, LOSSLESS)
        choice = Choice(kind.tier, reason="an image like it broke its tier's promise")
        return [replace(image, choice=choice) for image in made]

    def check(self, jobs: Sequence[Job], made: Sequence[Made]) -> Checked | None:
        """Make one of the images again, dense, if it is time to, and compare them.

        Raises:
            ConfigError: they cannot be compared.
        """
        if self._guard is None or not self._guard.due(made):
            return None
        twin = Job(jobs[0].wanted, math.inf)
        self._twins.add(twin)
        try:
            with self._lanes.lane() as lane:
                (dense,) = generate(lane, self.taken, [twin], LOSSLESS)
        except StoppedError:
            return None
        finally:
            self._twins.discard(twin)
        with self._lanes.turns.turn():
            return self._guard.compare(jobs[0], made[0], dense, self.taken.condition)

    def close(self) -> None:
        """End the checks that are under way at their next step."""
        for twin in list(self._twins):
            twin.cancelled = True

    def warm_up(self) -> None:
        """Compile dense and each plan of the book, as far as it fits the default size, in turn."""
        if self.book is None:
            return
        height, width = self.taken.height, self.taken.width
        kinds = {"dense": Kind(LOSSLESS, self.taken.steps, None, height, width)}
        for entry, plan in self.book.plans:
            sampler = plan.sampler
            scale = sampler.guidance_scale if "guidance_scale" in self.taken.names else None
            kinds[f"plan {entry.name}"] = Kind(entry.tier, sampler.steps, scale, height, width)
        condition: str | int = "warm up" if self.taken.condition == "prompt" else 0
        for what, kind in kinds.items():
            for batch in range(1, self.limits.batch + 1):
                jobs = [Job(Wanted(kind, condition, seed), math.inf) for seed in range(batch)]
                try:
                    self.generate(jobs)
                except ConfigError as error:
                    log.warning("ditfastattn: %s is not warm: %s", what, error)

    def described(self) -> dict[str, Any]:
        """Return the model as the API lists it, with its tiers and what was measured of them."""
        tiers: dict[str, Any] = {name: {"promise": "dense", "plans": []} for name in self.tiers}
        if self.book is None:
            tiers[BUNDLED]["promise"] = "the bundle's plan"
        else:
            for tier in self.book.manifest.tiers:
                tiers[tier.name]["promise"] = f"{tier.described} on the worst prompt measured"
            for entry, plan in self.book.plans:
                tiers[entry.tier]["plans"].append(
                    {
                        "name": entry.name,
                        "num_inference_steps": plan.sampler.steps,
                        "guidance_scale": plan.sampler.guidance_scale,
                        "measured": entry.figures.model_dump(mode="json"),
                    }
                )
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "ditfastattn",
            "default_quality": self.default,
            "qualities": tiers,
        }

    def wanted(self, body: ImageRequest) -> list[Wanted]:
        """Return the images that ``body`` asks for; image k has the seed + k.

        Raises:
            RequestError: it asks for something that the pipeline does not take.
        """
        if body.model not in (None, self.name):
            raise RequestError(
                404, f"no such model; expected {self.name}", param="model", code="model_not_found"
            )
        tier = self.default if body.quality == AUTO else body.quality
        if tier not in self.tiers:
            expected = ", ".join((AUTO, *self.tiers))
            raise RequestError(400, f"no such quality; expected {expected}", param="quality")
        height, width = self._size(body.size)
        kind = Kind(tier, self._steps(body), self._guidance(body), height, width)
        if body.n > self.limits.images:
            raise RequestError(400, f"n is at most {self.limits.images}", param="n")
        condition, negative = self._condition(body), self._negative(body)
        seed = secrets.randbelow(2**32) if body.seed is None else body.seed
        return [Wanted(kind, condition, seed + k, negative) for k in range(body.n)]

    def _steps(self, body: ImageRequest) -> int:
        steps = body.num_inference_steps or self.taken.steps
        if steps > self.limits.steps:
            what = f"num_inference_steps is at most {self.limits.steps}"
            raise RequestError(400, what, param="num_inference_steps")
        return steps

    def _guidance(self, body: ImageRequest) -> float | None:
        if body.guidance_scale is not None and "guidance_scale" not in self.taken.names:
            raise RequestError(400, "the model takes no guidance scale", param="guidance_scale")
        return body.guidance_scale

    def _negative(self, body: ImageRequest) -> str:
        if body.negative_prompt and "negative_prompt" not in self.taken.names:
            raise RequestError(400, "the model takes no negative prompt", param="negative_prompt")
        return self._text(body.negative_prompt or "", "negative_prompt")

    def _size(self, size: str) -> tuple[int, int]:
        """Return height and width; OpenAI names the width first."""
        taken = self.taken
        if size == "auto":
            return taken.height, taken.width
        width, height = map(int, size.split("x"))
        if "height" not in taken.names:
            if (height, width) != (taken.height, taken.width):
                expected = f"auto or {taken.width}x{taken.height}"
                raise RequestError(400, f"the model has one size: {expected}", param="size")
        elif max(height, width) > self.limits.side:
            raise RequestError(400, f"the size is at most {self.limits.side}", param="size")
        elif height % 8 or width % 8:
            raise RequestError(400, "height and width must be multiples of 8", param="size")
        return height, width

    def _condition(self, body: ImageRequest) -> str | int:
        if self.taken.condition == "prompt":
            if body.class_label is not None:
                raise RequestError(400, "the model takes no class", param="class_label")
            if not body.prompt:
                raise RequestError(400, "the prompt is empty", param="prompt")
            return self._text(body.prompt, "prompt")
        label, text = body.class_label, body.prompt.strip()
        if label is None and text.isdecimal() and len(text) < 10:
            label = int(text)
        if label is None:
            label = self.taken.labels.get(text)
        if label is None or not 0 <= label < self.taken.classes:
            what = f"no such class; expected a number from 0 to {self.taken.classes - 1}"
            raise RequestError(
                400, what, param="prompt" if body.class_label is None else "class_label"
            )
        return label

    def _text(self, text: str, param: str) -> str:
        if len(text) > self.limits.prompt:
            raise RequestError(400, f"at most {self.limits.prompt} characters", param=param)
        return text

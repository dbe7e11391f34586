"""What a benchmark of serving serves and asks for, and what its record tells."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ditfastattn
from ditfastattn import Book
from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.quality import LOSSLESS
from ditfastattn.serving.images import ImageServer
from ditfastattn.tools.benchmarking.served_images import Body, make_bodies
from ditfastattn.tools.benchmarking.server_process import ServerProcess, server_process
from ditfastattn.tools.commands.generation import open_pipeline
from ditfastattn.tools.commands.surroundings import keep_compiled
from ditfastattn.tools.demo.plans import shipped_book
from ditfastattn.tools.embedded import ModelName, embedded_model

_LONG_SEEDS = 1000000  # what is added to the seeds of long requests


@dataclass(frozen=True)
class Subject:
    """What is served, and asked for."""

    pipeline: str
    book: Book
    lowering: Lowering
    prompts: Sequence[str]
    twins: ImageServer

    @property
    def tiers(self) -> tuple[str, ...]:
        """Return the tiers, dense first."""
        return self.book.manifest.names

    def bodies(self, count: int, tiers: Sequence[str] = ()) -> list[Body]:
        """Return ``count`` requests of ``tiers``, or of all."""
        sampler = self.book.plans[0][1].sampler
        call = {"num_inference_steps": sampler.steps, "guidance_scale": sampler.guidance_scale}
        return make_bodies(count, tiers or self.tiers, self.prompts, call)

    def mixed(self, count: int, steps: int) -> list[Body]:
        """Return ``count`` requests of one image: a quarter dense in ``steps`` steps, others fast.

        Those are of the last tier. A long request has other seeds than a short one.
        """
        long = max(1, count // 4)
        made: list[Body] = [{**body, "n": 1} for body in self.bodies(count - long, self.tiers[-1:])]
        for body in self.bodies(long, (LOSSLESS,)):
            seed = body["seed"] + _LONG_SEEDS
            made.append({**body, "n": 1, "num_inference_steps": steps, "seed": seed})
        random.Random(0).shuffle(made)
        return made

    @contextmanager
    def served(
        self, *options: str, on: str = "uvicorn", environment: Mapping[str, str] | None = None
    ) -> Generator[ServerProcess]:
        """Run a server of it ``on`` a host, with further variables of the environment."""
        given = ("--pipeline", self.pipeline, "--lowering", self.lowering.value, *options)
        with server_process(self.book.folder, given, on, environment) as server:
            yield server

    def arguments(self, **given: Any) -> dict[str, Any]:
        """Return what a record of it tells, with what was ``given`` besides."""
        return {
            "pipeline": self.pipeline,
            "plans": {entry.tier: entry.name for entry, _ in self.book.plans},
            "lowering": self.lowering.value,
            "prompts": list(self.prompts),
            **given,
        }


@contextmanager
def open_subject(
    pipeline: str, book: Path | None, prompts: str, lowering: Lowering
) -> Generator[Subject]:
    """Open the pipeline for what is made alone, and the book, or make one of the shipped plans."""
    keep_compiled()
    with tempfile.TemporaryDirectory() as folder:
        given = [each.strip() for each in prompts.split(";") if each.strip()]
        embedded = pipeline in tuple(ModelName)
        if embedded:
            model = embedded_model(ModelName(pipeline))
            (conditions,) = model.compared.values()
            given = given or [str(each) for each in conditions[:5]]
        if not given or (book is None and not embedded):
            raise ConfigError(
                "a pipeline that does not come with ditfastattn needs prompts and a book",
                where="--pipeline",
                got=pipeline,
                expected="--prompts and --book, or one of " + ", ".join(ModelName),
            )
        if book is None:
            opened = shipped_book(embedded_model(ModelName(pipeline)), Path(folder) / "book")
        else:
            opened = ditfastattn.book(book)
        twins = ImageServer(open_pipeline(pipeline), opened, lowering=lowering)
        yield Subject(pipeline, opened, lowering, given, twins)

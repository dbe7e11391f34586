"""The generations that one replica has under way: each in a lane, with a pipeline of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from queue import LifoQueue
from typing import Any

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.options import parse_options
from ditfastattn.runtime.pipeline.copies import copied_pipeline
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.serving.turns import Turns

_CUDA_GRAPHS = "triton.cudagraphs"


@dataclass(frozen=True)
class Lane:
    """Where one generation at a time runs.

    Attributes:
        pipeline: the lane's own; lanes share the models.
        turns: those of all lanes, one of which computes at a time.
        alone: whether there is no other lane.
    """

    pipeline: Any
    turns: Turns
    alone: bool = True

    @contextmanager
    def kept_processors(self) -> Generator[Callable[[], None]]:
        """Put back the attention processors that a generation has replaced, however it ends.

        Yields:
            What checks, before the turn is handed on, that they are those of all lanes.

        Raises:
            ConfigError: they are not; raised by what is yielded.
        """
        denoiser: Any = transformer_of(self.pipeline, "serve(pipeline)")
        before = _processors(denoiser)

        def replaced() -> list[str]:
            now = _processors(denoiser)
            return sorted(name for name in {*before, *now} if before.get(name) is not now.get(name))

        def check() -> None:
            if not self.alone and (names := replaced()):
                raise ConfigError(
                    "the pipeline replaces attention processors while it generates, which others "
                    "under way would run with",
                    where=type(self.pipeline).__name__,
                    got=f"others at {names[0]} and {len(names) - 1} more",
                    remedy="serve with turns=1",
                )

        try:
            yield check
        finally:
            if replaced():
                denoiser.set_attn_processor(dict(before))


def _processors(denoiser: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(denoiser, "attn_processors", {})
    return found


class Lanes:
    """Lanes, the one used last first: a server with little to do stays with one."""

    def __init__(self, pipeline: Any, count: int) -> None:
        """Make ``count`` lanes: one of ``pipeline``, and others of copies.

        Raises:
            ConfigError: there are several, and the pipeline cannot be copied.
        """
        self.turns = Turns()
        self._free: LifoQueue[Lane] = LifoQueue()
        for each in [*(copied_pipeline(pipeline) for _ in range(count - 1)), pipeline]:
            self._free.put(Lane(each, self.turns, count == 1))

    @contextmanager
    def lane(self) -> Generator[Lane]:
        """Take a lane, once one is free."""
        taken = self._free.get()
        try:
            yield taken
        finally:
            self._free.put(taken)


def check_no_cuda_graphs(options: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` if ``options`` of ``accelerate`` ask for CUDA graphs.

    What a step returns, and later steps read, lies where the next replay of its graph writes.
    """
    given = dict(options)
    mode = given.pop("mode", None)
    if parse_options(given, mode).inductor.get(_CUDA_GRAPHS):
        raise ConfigError(
            "generations that take turns would overwrite each other's caches in CUDA graphs",
            where="Limits.turns",
            got=f"mode={mode!r}",
            expected="a mode without CUDA graphs",
            remedy="leave out the mode, or serve with turns=1",
        )

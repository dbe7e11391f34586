"""Say which tier of a plan book the generations of a caller ask for."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

LOSSLESS: Final = "lossless"  # the tier that every book has: dense
AUTO: Final = "auto"  # what requests to a server call the default tier

_asked_for: ContextVar[str] = ContextVar("ditfastattn_quality", default="")


@contextmanager
def quality(tier: str) -> Generator[None]:
    """Let the generations within run by the plans of ``tier``; a context for one request.

    The pipeline must have been accelerated with a plan book that has this tier; ``"lossless"``
    runs dense with any plans. The tier counts where a generation begins, and holds until it ends::

        with ditfastattn.quality("high"):
            images = pipeline("a cat").images

    Args:
        tier: the tier's name. A generation raises a ``ConfigError`` if the book has no such tier.

    Returns:
        A context manager.
    """
    token = _asked_for.set(tier)
    try:
        yield
    finally:
        _asked_for.reset(token)


def current_quality() -> str:
    """Return the tier asked for; "" where none is."""
    return _asked_for.get()

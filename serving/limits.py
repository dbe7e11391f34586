"""What a server accepts, and for how long it works on it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ditfastattn.core.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Bound what requests may take.

    Attributes:
        queue: how many images may wait; more are refused with 503 and Retry-After.
        seconds: how long a request may take, waiting included.
        batch: how many images of one plan are generated at a time.
        window: for how many seconds an image waits for others to join it.
        turns: how many batches are under way, which take turns step by step.
        images: how many a request may ask for.
        steps: how many steps a request may ask for.
        side: the greatest height and width in pixels.
        prompt: the most characters of a prompt.
        connections: how many may be open; more are refused with 503.
        body_bytes: the largest body of a request.
        body_seconds: within which a body must have arrived.
    """

    queue: int = 64
    seconds: float = 300.0
    batch: int = 1
    window: float = 0.01
    turns: int = 1
    images: int = 4
    steps: int = 100
    side: int = 2048
    prompt: int = 4000
    connections: int = 512
    body_bytes: int = 64 * 1024
    body_seconds: float = 10.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for each in fields(self):
            value = getattr(self, each.name)
            if value <= 0:
                raise ConfigError(
                    "a limit must be positive",
                    where=f"Limits.{each.name}",
                    got=value,
                )
        if self.queue < self.images:
            raise ConfigError(
                "the queue is too short for one request",
                where="Limits.queue",
                got=self.queue,
                expected=f"at least {self.images}, the images that a request may ask for",
            )

"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.runtime.plan_choice import Choice
from ditfastattn.runtime.specializations import reports
from ditfastattn.serving.guard import Checked
from ditfastattn.serving.job import Made

_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(
        self, waiting: Callable[[], int], generating: Callable[[], int], turns: int = 1
    ) -> None:
        """Take what tells how many images wait and are generated, ``turns`` batches at a time."""
        self._turns = turns
        self.registry = CollectorRegistry()
        names: Any = {"registry": self.registry, "namespace": "ditfastattn"}
        self._requests = Counter("requests", "Requests answered.", ("tier", "status"), **names)
        self._seconds = Histogram(
            "request_seconds",
            "Seconds from a request's arrival to its images.",
            ("tier",),
            buckets=_BUCKETS,
            **names,
        )
        self._images = Counter("images", "Images made.", ("tier", "plan"), **names)
        self._steps = Counter("steps", "Steps of the images made.", ("tier",), **names)
        self._skipped = Counter(
            "steps_skipped", "Steps that did not run the model.", ("tier",), **names
        )
        self._dense = Counter(
            "dense_fallbacks", "Images that ran dense, as no plan was for them.", ("tier",), **names
        )
        self._not_finite = Counter("not_finite", "Generations of NaN or infinities.", **names)
        self._stopped = Counter("stopped", "Requests that were given up or late.", **names)
        self._caches = Gauge(
            "cache_bytes",
            "Most bytes that a plan's caches take, in all generations under way.",
            ("plan",),
            **names,
        )
        labels = ("tier", "plan")
        self._checks = Counter("guard_checks", "Images made again, dense.", labels, **names)
        self._broken = Counter(
            "guard_broken_promises",
            "Checked images that broke a promise.",
            labels,
            **names,
        )
        self._value = Gauge(
            "guard_value", "The tier's metric of the image that was checked last.", labels, **names
        )
        Gauge("queue_images", "Images that wait.", **names).set_function(waiting)
        Gauge("generating_images", "Images that are generated.", **names).set_function(generating)
        self._known: set[str] = set()

    def answered(self, tier: str, status: int, seconds: float) -> None:
        """Count a request; ``tier`` is one of the server's, or ""."""
        self._requests.labels(tier, str(status)).inc()
        if status == 200:
            self._seconds.labels(tier).observe(seconds)

    def made(self, image: Made, tier: str, steps: int) -> None:
        """Count an image."""
        choice = image.choice
        self._images.labels(tier, choice.name or ("dense" if choice.plan is None else "")).inc()
        self._steps.labels(tier).inc(steps)
        self._skipped.labels(tier).inc(skipped_steps(choice))
        if choice.reason:
            self._dense.labels(tier).inc()
        if choice.name and choice.name not in self._known:
            self._known.add(choice.name)
            found = [each.peak_cache_bytes for each in reports() if each.plan == choice.plan]
            self._caches.labels(choice.name).set(self._turns * max(found, default=0))

    def checked(self, found: Checked) -> None:
        """Count an image that was compared with the dense one."""
        self._checks.labels(found.tier, found.plan).inc()
        self._value.labels(found.tier, found.plan).set(found.value)
        if not found.kept:
            self._broken.labels(found.tier, found.plan).inc()

    def not_finite(self) -> None:
        """Count a generation that was not served."""
        self._not_finite.inc()

    def stopped(self) -> None:
        """Count a request that nobody waits for any more."""
        self._stopped.inc()

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self.registry)


def skipped_steps(choice: Choice) -> int:
    """Return how many steps of a generation do not run the model."""
    plan = choice.plan
    if plan is None:
        return 0
    whole = [place for place, site in enumerate(plan.sites) if site.kind is SiteKind.OUTPUT]
    return sum(any(not row[place].computes for place in whole) for row in plan.strategies)

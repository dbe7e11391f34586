"""What every test gets."""

from __future__ import annotations

import os

import pytest
import torch

from ditfastattn.runtime.search.measure import latency
from ditfastattn.runtime.search.measure.steppers import EagerVariant


def pytest_configure() -> None:
    """Give each of several test processes one thread: two that use both cores are slower."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def counted_prices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let searches price strategies by counted operations: a tiny model's latencies are noise.

    A test of the measuring itself is marked ``measured``.
    """
    if request.node.get_closest_marker("measured"):
        return

    def counted(
        built: dict[tuple[str, str], EagerVariant], *_: object
    ) -> dict[tuple[str, str], float]:
        return {
            name: operations * 1e-9
            for name, operations in latency._count(built, latency.Objective.FLOPS).items()
        }

    monkeypatch.setattr(latency, "_time", counted)

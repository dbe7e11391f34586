"""Plans, and a server of a tiny class-conditional pipeline."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from ditfastattn import Plan, Strategy
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.limits import Limits
from tests.helpers import attentive_pipeline
from tests.plans import plan_for
from tests.serving.servers import Running, filled_book, running
from tests.three_steps import CALL

F, S = Strategy.FULL, Strategy.SHARE_STEP


@pytest.fixture(scope="session")
def plans() -> dict[str, Plan]:
    rows = {"high": (F, F, S), "medium": (F, S, S)}
    return {name: plan_for(attentive_pipeline(), CALL, row) for name, row in rows.items()}


@pytest.fixture(scope="session")
def book_folder(plans: dict[str, Plan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled_book(tmp_path_factory.mktemp("served") / "book", plans).folder


@pytest.fixture(scope="module")
def served(plans: dict[str, Plan], tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    torch._dynamo.reset()
    book = filled_book(tmp_path_factory.mktemp("served") / "book", plans)
    limits = Limits(body_seconds=1.0, steps=60, queue=4)
    server = ImageServer(attentive_pipeline(), book, name="digits", limits=limits, lowering="eager")
    with running(server) as found:
        yield found

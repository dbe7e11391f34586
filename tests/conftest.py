"""What every test gets."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch._inductor.config import aot_inductor

from ditfastattn.export import prepare
from ditfastattn.export.aoti import compilations
from ditfastattn.export.capture_call import capture_call, capture_doubled
from ditfastattn.export.tensorrt import build
from ditfastattn.passes.capture import dynamo
from ditfastattn.runtime import dynamo_adapter, lowering
from ditfastattn.runtime.search.measure import captured_model, latency
from ditfastattn.runtime.search.measure.steppers import EagerVariant, Variants
from tests import helpers, shared


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--all``."""
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_configure() -> None:
    """Give each of several test processes one thread: two that use both cores are slower.

    Packages are compiled the quickest way: most of each is the same runtime, slow to optimize.

    Bytecode is written: a process that imports diffusers spends most of its start on compiling it.

    Torch writes its graphs out to a logger that does not propagate as soon as it has a handler,
    and pytest gives such loggers one: unless it does propagate.
    """
    logging.getLogger("torch.__trace").propagate = True
    aot_inductor.compile_wrapper_opt_level = "O0"
    aot_inductor.enable_line_tables = False
    os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"] = "O0"  # of the processes tests start
    os.environ["AOT_INDUCTOR_ENABLE_LINE_TABLES"] = "0"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow tests unless all are asked for."""
    if config.getoption("--all"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --all"))


def pytest_collection_finish() -> None:
    """Collect garbage rarely: tracing makes many objects, and few of them are garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """Share by content what is expensive to make: see ``tests/shared.py``."""
    base = tmp_path_factory.getbasetemp()
    distributed = "PYTEST_XDIST_WORKER" in os.environ
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "store", (base.parent if distributed else base) / "shared")
        for capture in (capture_call, capture_doubled):
            patch.setattr(prepare, capture.__name__, shared.captured_once(capture))
        for module in (dynamo_adapter, captured_model, helpers):
            patch.setattr(module, "capture", shared.capture_once(dynamo.capture))
        patch.setattr(build, "run_job", shared.run_job_once)
        patch.setattr(Variants, "__init__", shared.share_rewritten)
        patch.setattr(compilations, "helper_count", lambda: 0)  # tests take all cores already
        patch.setattr(lowering, "_compiled", {})  # what is compiled stays, for the next test too
        yield


_modules = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def _modules_start_anew() -> None:
    """Let no test module run into the recompilations, or walk the objects, of those before it.

    What outlives a module is what tests share. Set aside, it costs a collection no time. Some of
    it dies later on, so that all is looked at again now and then.
    """
    torch._dynamo.reset()
    if next(_modules) % 16 == 15:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh_dynamo() -> None:
    """Let a test not run into the compilations of those before it in its module."""
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which a module keeps its saved pipelines."""
    return tmp_path_factory.mktemp("pipelines")


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

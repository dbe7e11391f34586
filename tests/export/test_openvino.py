"""OpenVINO runs bundles as ONNX Runtime does. It is an extra, which CI does not install."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ditfastattn import ConfigError, load, verify
from ditfastattn.export.options import ExportOptions
from ditfastattn.runtime.bundle import openvino_graph
from tests.export.helpers import ddim_stepping, export_once, export_tiny
from tests.export.test_bundle import LAYOUTS
from tests.helpers import (
    TINY_MODELS,
    capture_every_site,
    largest_difference,
    make_plan,
    mixed_strategies,
    tiny_dit,
)
from tests.tiers import slow_but


@pytest.mark.parametrize("name", slow_but(["dit"], TINY_MODELS))
def test_openvino_computes_what_onnx_runtime_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    tiny = TINY_MODELS[name]()
    export_tiny(tiny, mixed_strategies(capture_every_site(tiny)[1], seed=5), tmp_path / "bundle")
    bundle = load(tmp_path / "bundle", runtime="openvino")
    assert bundle.providers == ("OpenVINO CPU",)
    expected = tiny.run(load(tmp_path / "bundle"))
    assert largest_difference(tiny.run(bundle), expected) < 1e-5
    assert largest_difference(tiny.run(bundle), expected) < 1e-5  # the next generation
    assert verify(tmp_path / "bundle", runtime="openvino").passed


def test_openvino_runs_a_loop(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    tiny = tiny_dit()
    rows = mixed_strategies(capture_every_site(tiny)[1], seed=5)
    plan = make_plan(tiny, rows, LAYOUTS[0], feed_forwards=True)
    stepping = ddim_stepping(tiny, plan)
    export_once(tiny, plan, tmp_path / "bundle", ExportOptions(loop=True), stepping)
    found = verify(tmp_path / "bundle", runtime="openvino")
    assert found.passed
    assert 0.0 < found.loop_error < 1e-4


def test_without_openvino_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_tiny(tiny_dit(), None, tmp_path / "bundle")
    openvino_graph._core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"not installed(.|\n)*ditfastattn\[openvino\]"):
        load(tmp_path / "bundle", runtime="openvino")
    with pytest.raises(ConfigError, match=r"no such runtime(.|\n)*onnx, openvino, tensorrt"):
        load(tmp_path / "bundle", runtime="other")

"""What the builder's log must tell: dropped windows, every target, every form of window."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from onnx import TensorProto, helper

from ditfastattn import CfgLayout, ConfigError, Strategy, VerifyError
from ditfastattn.export.lint import lint
from ditfastattn.export.options import ExportOptions
from ditfastattn.export.tensorrt.build import build
from ditfastattn.export.tensorrt.build_log import BuildLog, read_log
from ditfastattn.export.tensorrt.job import Job, run_job
from ditfastattn.export.tensorrt.options import BuildOptions, choose_layout, weight_bytes
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.windows.window import TileWindow
from ditfastattn.runtime.bundle.manifest import read_manifest
from ditfastattn.runtime.tensorrt.engines import ENGINES_FOLDER, Layout, read_engines
from ditfastattn.runtime.tensorrt.library import find_library
from tests.export.helpers import export_once, export_tiny
from tests.export.test_tensorrt import (
    HEAD_DIM,
    TARGET,
    TOKENS,
    four_rows,
    half_bundle,
    log_of,
    needs_builder,
    wide,
)
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    make_plan,
    noise,
    randomize,
    timestep,
)
from tests.tiers import slow_but

REACH = 16  # keys on each side of a query


def attention_graph(path: Path, **window: Any) -> Path:
    """Write one attention by ONNX's own operator, opset 25."""
    shape = [2, 2, TOKENS, HEAD_DIM]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, shape) for n in "qkvo"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["o"], "attention", **window)
    graph = helper.make_graph([node], "attention", values[:3], values[3:])
    opset = [helper.make_opsetid("", 25)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))
    return path


def built_log(graph: Path, out: Path) -> BuildLog:
    """Build a graph that no linter has seen, and read its log."""
    log = out / f"{graph.stem}.log"
    job = Job("tensorrt_rtx", graph, out / f"{graph.stem}.engine", log, TARGET, {})
    run_job(job, 600.0, lambda phase, done: None)
    return read_log(log)


def most_keys(log: BuildLog) -> int:
    """Return how many keys the queries of some attention's kernel see, at most."""
    return max(kernel.keys for kernel in log.attentions)


@needs_builder
def test_a_dropped_window_is_seen_in_the_log(tmp_path: Path) -> None:
    """The negative control: TensorRT reads the operator's window, and drops it without a word."""
    graph = attention_graph(
        tmp_path / "windowed.onnx", left_window_size=REACH, right_window_size=REACH
    )
    with pytest.raises(VerifyError, match="TensorRT silently drops its window"):
        lint(graph)
    log = built_log(graph, tmp_path)
    assert log.errors == ()
    assert [line for line in log.warnings if "window" in line] == []
    assert most_keys(log) == TOKENS  # every query sees every key


def log_of_windows(tiny: TinyModel, sites: Sequence[Site], out: Path) -> BuildLog:
    """Build ``tiny`` with every window that ``sites`` have; return the log of a windowed step."""
    rows = [
        tuple(strategy if site.windows else Strategy.FULL for site in sites)
        for strategy in (Strategy.FULL, *[Strategy.WINDOW] * 5)
    ]
    plan = make_plan(tiny, rows, CfgLayout.COND_FIRST, feed_forwards=True)
    plan = plan.model_copy(update={"sites": tuple(planned_site(site) for site in sites)})
    export_once(tiny, plan, out, ExportOptions(dtype="float16"))
    engines = build(out, BuildOptions(TARGET, Layout.VARIANTS))
    graph = read_manifest(out).variants[1].file
    spec = engines.of(graph)
    assert spec is not None
    assert spec.findings == ()
    return log_of(out, engines, graph)


@needs_builder
@pytest.mark.parametrize("name", slow_but({"pixart"}, TINY_MODELS))
@pytest.mark.parametrize("by_tiles", [False, True], ids=["bands", "tiles"])
def test_windowed_attentions_see_blocks_of_keys(name: str, by_tiles: bool, tmp_path: Path) -> None:
    tiny = wide(name)
    _, sites = capture_every_site(tiny)
    chosen = [
        replace(site, window=next(w for w in site.windows if isinstance(w, TileWindow) == by_tiles))
        if site.windows
        else site
        for site in sites
    ]
    log = log_of_windows(tiny, chosen, tmp_path)
    form = "tile_attention" if by_tiles else "window_attention"
    windows = [k for k in log.attentions if any(node.startswith(form) for node in k.nodes)]
    text = 5 if name == "sd3" else 0
    images = [kernel for kernel in windows if kernel.queries != text]  # the text sees all keys
    assert len(images) == sum(bool(site.windows) for site in sites)
    for kernel in images:
        assert kernel.queries < kernel.keys <= TOKENS // 2 + text


def wan() -> TinyModel:
    """Return a Wan of one layer over 4 frames of 24 by 24 tokens."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=1,
        rope_max_seq_len=32,
    )

    def call(step: int, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(step, batch // 2, 4, 4, 48, 48).repeat(2, 1, 1, 1, 1),
            "encoder_hidden_states": noise(99, batch, 5, 16),
            "timestep": timestep(step, batch),
            "return_dict": False,
        }

    return TinyModel(randomize(model), call)


@pytest.mark.slow
@needs_builder
def test_a_videos_tiles_see_near_tiles_of_near_frames(tmp_path: Path) -> None:
    tiny = wan()
    _, sites = capture_every_site(tiny)
    chosen = [replace(s, window=s.windows[1]) if s.windows else s for s in sites]
    (tiles,) = (site.window for site in chosen if site.windows)
    assert tiles == TileWindow(grid=(4, 24, 24), tile=(1, 4, 4), reach=(1, 1, 1))
    log = log_of_windows(tiny, chosen, tmp_path)
    windows = [k for k in log.attentions if any("tile_attention" in node for node in k.nodes)]
    assert [(kernel.queries, kernel.keys) for kernel in windows] == [(16, 27 * 16)]


@needs_builder
@pytest.mark.parametrize("target", ["sm80", "sm86", "sm89", "sm120"])
def test_every_target_is_built_for(target: str, tmp_path: Path) -> None:
    export_tiny(wide("dit"), None, tmp_path, options=ExportOptions(dtype="float16"))
    engines = build(tmp_path, BuildOptions(target))
    (spec,) = engines.engines
    assert engines.target == target
    assert spec.findings == ()
    assert spec.fused == spec.attentions == 3
    assert read_engines(tmp_path / ENGINES_FOLDER / target) == engines


@needs_builder
def test_auto_takes_the_switch_where_a_measured_engine_says_so(tmp_path: Path) -> None:
    """The weights of all variants fit the limit; their engines, which hold code too, do not."""
    half_bundle(wide("dit"), tmp_path)
    manifest = read_manifest(tmp_path)
    weights = sum(weight_bytes(tmp_path / variant.file) for variant in manifest.variants)
    told: list[str] = []
    options = BuildOptions(
        TARGET,
        max_engine_mb=1.01 * weights / 2**20,
        on_progress=lambda graph, phase, done: told.append(graph),
    )
    assert choose_layout(tmp_path, manifest, options)[0] is Layout.VARIANTS
    engines = build(tmp_path, options)
    assert list(dict.fromkeys(told)) == [manifest.variants[0].file, "switch.onnx"]
    assert engines.layout is Layout.SWITCH
    assert "over the limit" in engines.reason
    assert [spec.graph for spec in engines.engines] == ["switch.onnx"]
    held = sorted(path.name for path in (tmp_path / ENGINES_FOLDER / TARGET).glob("*.engine"))
    assert held == [spec.file for spec in engines.engines]


@needs_builder
def test_auto_keeps_the_engine_that_it_measured(tmp_path: Path) -> None:
    half_bundle(wide("dit"), tmp_path)
    manifest = read_manifest(tmp_path)
    told: list[tuple[str, str]] = []
    options = BuildOptions(TARGET, on_progress=lambda g, phase, done: told.append((g, phase)))
    engines = build(tmp_path, options)
    assert engines.layout is Layout.VARIANTS
    assert len(engines.engines) == len(manifest.variants)
    assert (manifest.variants[0].file, "exists already") in told
    assert "MiB, one switch" in engines.reason  # whole engines, not weights alone


def test_auto_does_not_switch_between_many(tmp_path: Path) -> None:
    tiny = TINY_MODELS["dit"]()
    _, sites = capture_every_site(tiny)
    manifest = export_tiny(tiny, four_rows(sites), tmp_path)
    many = manifest.model_copy(update={"variants": manifest.variants * 3})
    assert len(many.variants) > 8
    layout, reason = choose_layout(tmp_path, many, BuildOptions(TARGET, max_engine_mb=0.0))
    assert layout is Layout.VARIANTS
    assert "--max-variants" in reason


TENSORRT = """
import json
__version__ = "10.9.0"
class ILogger: pass
class NetworkDefinitionCreationFlag: STRONGLY_TYPED = 1
class ProfilingVerbosity: DETAILED = 0
class Profile:
    def __init__(self): self.shapes = {}
    def set_shape(self, name, least, usual, most): self.shapes[name] = [least, usual, most]
class Config:
    profiles = ()
    def add_optimization_profile(self, profile): self.profiles += (profile,)
class Builder:
    def __init__(self, logger): pass
    def create_network(self, flags): return flags
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        shapes = [profile.shapes for profile in config.profiles]
        return json.dumps({"flags": network, "profiles": shapes}).encode()
class OnnxParser:
    num_errors = 0
    def __init__(self, network, logger): pass
    def parse_from_file(self, path): return True
"""


def test_the_library_tensorrt_is_asked_for_strong_types_and_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no targets and, in early versions, no monitor; a stand-in notes what it is asked."""
    bundle = tmp_path / "bundle"
    manifest = export_tiny(TINY_MODELS["dit"](), None, bundle)
    (tmp_path / "tensorrt.py").write_text(TENSORRT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert find_library().name == "tensorrt"  # the first choice where there is a GPU
    assert find_library("tensorrt").targets == ("current",)
    with pytest.raises(ConfigError, match="cannot build for this target"):
        build(bundle, BuildOptions("sm89", library="tensorrt"))
    engines = build(bundle, BuildOptions(library="tensorrt", images=(1, 2, 8)))
    assert (engines.library, engines.version, engines.device) == ("tensorrt", "10.9.0", "a GPU")
    (spec,) = engines.engines
    content = (bundle / ENGINES_FOLDER / "current" / spec.file).read_bytes()
    asked: dict[str, Any] = json.loads(content)
    assert asked["flags"] == 1 << 1
    (shapes,) = asked["profiles"]
    latent = next(spec for spec in manifest.inputs if spec.name == manifest.latent)
    assert shapes[manifest.latent] == [[n, *latent.sizes(n)[1:]] for n in (1, 2, 8)]
    assert any("not one fused kernel" in line for line in spec.findings)  # its log names none


@needs_builder
def test_another_builder_builds_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is kept for as long as what sets the builder's flags is the same."""
    building = sys.modules[build.__module__]
    export_tiny(wide("dit"), None, tmp_path, options=ExportOptions(dtype="float16"))
    first = build(tmp_path, BuildOptions(TARGET)).engines[0]
    worker = tmp_path / "worker.py"
    shutil.copy(building.WORKER, worker)
    worker.write_text(worker.read_text() + "# other flags\n")
    monkeypatch.setattr(building, "WORKER", worker)
    assert build(tmp_path, BuildOptions(TARGET)).engines[0].key != first.key

"""TensorRT engines hold what the plan says: read off the builder's own log, without a GPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import ditfastattn
from ditfastattn import CfgLayout, ConfigError, EngineError, Strategy, VerifyError
from ditfastattn.core.locks import sole_writer
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.export.options import ExportOptions
from ditfastattn.export.tensorrt.build import build
from ditfastattn.export.tensorrt.build_log import BuildLog, read_log
from ditfastattn.export.tensorrt.job import Job, run_job
from ditfastattn.export.tensorrt.options import BuildOptions, choose_layout, rows_of
from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.graph.slots import parse_slot, residual_slot
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.runtime.bundle.manifest import read_manifest
from ditfastattn.runtime.tensorrt.engines import (
    ENGINES,
    ENGINES_FOLDER,
    Engines,
    Layout,
    read_engines,
)
from ditfastattn.tools.commands import app as cli
from ditfastattn.tools.digits_pipeline import embedded_pipeline
from tests.export.helpers import ddim_stepping, export_once, export_tiny
from tests.helpers import (
    STEPS,
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    make_plan,
    tiny_dit,
    tiny_sd3,
)
from tests.plans import plan_for
from tests.tiers import slow_but

TARGET = "sm89"
TOKENS, HEAD_DIM = 256, 32
# One engine of each layout by default, those of the other models too with --all.
FIRST_OF_ALL = slow_but({"dit"}, TINY_MODELS)

needs_builder = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx, which builds without a GPU, is not installed",
)

FULL, SHARE, WINDOW, BOTH, CFG = (
    Strategy.FULL,
    Strategy.SHARE_STEP,
    Strategy.WINDOW,
    Strategy.WINDOW_SHARE_CFG,
    Strategy.SHARE_CFG,
)


def wide(name: str) -> TinyModel:
    """Return a model of few layers whose attention is large enough to be fused."""
    if name == "sd3":
        return tiny_sd3(size=32, head_dim=HEAD_DIM, layers=2)  # of three a switch builds minutes
    return TINY_MODELS[name](size=32, head_dim=HEAD_DIM)


def four_rows(sites: Sequence[Site]) -> list[tuple[Strategy, ...]]:
    """Return four distinct steps, one of them twice: computed, shared, windowed, halved."""
    wanted = [
        [FULL, FULL, FULL],
        [SHARE, FULL, WINDOW],
        [BOTH, SHARE, FULL],
        [CFG, WINDOW, SHARE],
        [FULL, FULL, FULL],
        [SHARE, SHARE, SHARE],
    ]
    assert len(wanted) == STEPS
    return [
        tuple(FULL if why_not(row[i % 3], site) else row[i % 3] for i, site in enumerate(sites))
        for row in wanted
    ]


def half_bundle(tiny: TinyModel, out: Path, loop: bool = False) -> list[tuple[Strategy, ...]]:
    """Export ``tiny`` in fp16; return the rows of its plan."""
    _, sites = capture_every_site(tiny)
    rows = four_rows(sites)
    plan = make_plan(tiny, rows, CfgLayout.COND_FIRST, feed_forwards=True)
    stepping = ddim_stepping(tiny, plan) if loop else None
    export_once(tiny, plan, out, ExportOptions(dtype="float16", loop=loop), stepping)
    return rows


def log_of(folder: Path, engines: Engines, graph: str) -> BuildLog:
    spec = engines.of(graph)
    assert spec is not None
    return read_log((folder / ENGINES_FOLDER / TARGET / spec.file).with_suffix(".log"))


@needs_builder
@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_MODELS)
def test_each_variant_has_the_attentions_of_its_row_fused(name: str, tmp_path: Path) -> None:
    tiny = wide(name)
    _, sites = capture_every_site(tiny)
    rows = half_bundle(tiny, tmp_path)
    engines = build(tmp_path, BuildOptions(TARGET, Layout.VARIANTS))
    manifest = read_manifest(tmp_path)
    for step, variant in enumerate(manifest.schedule):
        graph = manifest.variants[variant].file
        computed = [
            site
            for site, strategy in zip(sites, rows[step], strict=True)
            if site.kind is not SiteKind.FEED_FORWARD and strategy.computes
        ]
        spec = engines.of(graph)
        assert spec is not None
        assert spec.findings == ()
        # A step that stores a residual computes the window beside the full attention, and a window
        # of joint attention is two: the image's queries in blocks, and the text's.
        stored = {parse_slot(slot) for slot, _ in manifest.variants[variant].writes}
        windows = [site for site in sites if residual_slot(site.name) in stored]
        windows += [s for s, strategy in zip(sites, rows[step], strict=True) if strategy.windowed]
        texts = sum(any(site.text) for site in windows)
        expected = len(computed) + len(stored & {residual_slot(s.name) for s in sites}) + texts
        assert spec.fused == spec.attentions == expected
        log = log_of(tmp_path, engines, graph)
        assert log.errors == ()
        assert len(log.attentions) == spec.fused


def large_dit() -> TinyModel:
    """Return a DiT of 120 MiB in fp16: beside its weights the code of kernels is small."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_elementwise_affine=False,
    )
    return TinyModel(model.eval(), tiny_dit(size=32).call)


@needs_builder
@pytest.mark.slow
def test_a_switch_holds_little_beside_its_weights(tmp_path: Path) -> None:
    tiny = large_dit()
    _, sites = capture_every_site(tiny)
    rows = four_rows(sites)
    plan = make_plan(tiny, [*rows[:-1], rows[0]], CfgLayout.COND_FIRST, feed_forwards=True)
    plan = plan.model_copy(update={"merge_variants": True})
    options = ExportOptions(dtype="float16", dynamic_batch=False)
    manifest = export_model(tiny.model, RecordedCall(tiny.call(0, 4)), plan, tmp_path, options)
    engines = build(tmp_path, BuildOptions(TARGET, Layout.SWITCH))
    (engine,) = engines.engines
    assert len(manifest.variants) == 4
    assert engine.fused == engine.attentions
    # 1.08 by this plan; an engine per variant would be near 4.
    assert engine.content.bytes <= 1.2 * manifest.files[manifest.weights].bytes


@needs_builder
@pytest.mark.slow  # by default test_tensorrt_controls.py builds windows
def test_a_window_is_attended_in_blocks(tmp_path: Path) -> None:
    tiny = wide("dit")
    _, sites = capture_every_site(tiny)
    half_bundle(tiny, tmp_path)
    engines = build(tmp_path, BuildOptions(TARGET, Layout.VARIANTS))
    manifest = read_manifest(tmp_path)
    whole = log_of(tmp_path, engines, manifest.variants[manifest.schedule[0]].file)
    windowed = log_of(tmp_path, engines, manifest.variants[manifest.schedule[1]].file)

    def seen(log: BuildLog, kind: str) -> set[tuple[int, int]]:
        """Return how many queries see how many keys, in the kernels of attentions so named."""
        found = [kernel for kernel in log.attentions if kernel.nodes[0].startswith(kind)]
        return {(kernel.queries, kernel.keys) for kernel in found}

    window = sites[0].window
    assert isinstance(window, int)
    assert 0 < window < TOKENS // 4
    assert seen(whole, "scaled_dot_product_attention") == {(TOKENS, TOKENS)}
    assert seen(windowed, "window_attention") == {(window, 3 * window)}  # a block and both sides


@needs_builder
@pytest.mark.parametrize("name", FIRST_OF_ALL)
def test_one_switch_holds_all_variants_and_the_weights_once(name: str, tmp_path: Path) -> None:
    half_bundle(wide(name), tmp_path)
    engines = build(tmp_path, BuildOptions(TARGET, Layout.SWITCH))
    spec = engines.of("switch.onnx")
    assert spec is not None
    assert spec.fused == spec.attentions > 0
    assert [line for line in spec.findings if "times as large" not in line] == []
    assert engines.rows == (2, 2, 2)  # a switch takes one batch
    assert engines.switch is not None
    assert len(engines.switch.variants) == len(read_manifest(tmp_path).variants)
    assert not (tmp_path / ENGINES_FOLDER / TARGET / "weights.bin").exists()


@needs_builder
@pytest.mark.parametrize("name", FIRST_OF_ALL)
def test_the_loop_is_one_engine(name: str, tmp_path: Path) -> None:
    half_bundle(wide(name), tmp_path, loop=True)
    engines = build(tmp_path, BuildOptions(TARGET, Layout.LOOP))
    (spec,) = engines.engines
    assert spec.graph == "loop.onnx"
    assert spec.fused == spec.attentions > 0
    assert spec.findings == ()


@needs_builder
@pytest.mark.slow
def test_the_loop_of_the_embedded_model_is_built(tmp_path: Path) -> None:
    pipeline = embedded_pipeline()
    call = {"class_labels": [3], "num_inference_steps": 3, "guidance_scale": 2.0}
    plan = plan_for(pipeline, call, [FULL, BOTH, SHARE])
    torch._dynamo.reset()
    ditfastattn.export(pipeline, call, plan, tmp_path, dtype="float16", loop=True)
    (spec,) = build(tmp_path, BuildOptions(TARGET, Layout.LOOP)).engines
    # Step 0 stores residuals: a window beside each full attention. Step 2 has none.
    assert spec.fused == spec.attentions == sum([12, 6, 0])
    assert [line for line in spec.findings if "times as large" not in line] == []


@needs_builder
def test_the_command_builds_and_says_what(tmp_path: Path) -> None:
    export_tiny(wide("dit"), None, tmp_path)
    result = CliRunner().invoke(cli.app, ["build", str(tmp_path), "--target", TARGET])
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "variant_00.onnx" in told
    assert "3 of 3 attentions are not one fused kernel each" in told
    assert "layout variants: there is one step variant" in told


@needs_builder
def test_what_is_built_is_kept_and_what_is_stale_goes(tmp_path: Path) -> None:
    export_tiny(wide("dit"), None, tmp_path, options=ExportOptions(dtype="float16"))
    out = tmp_path / ENGINES_FOLDER / TARGET
    first = build(tmp_path, BuildOptions(TARGET)).engines[0]
    written = (out / first.file).stat().st_mtime_ns
    told: list[str] = []
    options = BuildOptions(TARGET, on_progress=lambda graph, phase, done: told.append(phase))
    assert build(tmp_path, options).engines[0] == first
    assert told == ["exists already"]
    assert (out / first.file).stat().st_mtime_ns == written
    other = build(tmp_path, BuildOptions(TARGET, images=(1, 2, 8))).engines[0]
    assert other.key != first.key
    assert sorted(path.name for path in out.glob("*.engine")) == [other.file]
    (out / other.file).write_bytes(b"cut")
    assert build(tmp_path, BuildOptions(TARGET, images=(1, 2, 8))).engines[0].key == other.key
    assert (out / other.file).stat().st_size > 3
    assert read_engines(out).rows == (1, 2, 8)


@pytest.mark.slow
@needs_builder
def test_a_fused_lora_is_exported_and_built_anew(tmp_path: Path) -> None:
    tiny = wide("dit")
    rows = half_bundle(tiny, tmp_path / "plain")
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
    wrapped: Any = get_peft_model(copy.deepcopy(tiny.model), lora)
    adapted = TinyModel(wrapped.merge_and_unload().eval(), tiny.call)
    plan = make_plan(tiny, rows, CfgLayout.COND_FIRST, feed_forwards=True)
    call, options = RecordedCall(tiny.call(0, 4)), ExportOptions(dtype="float16")
    with pytest.raises(ConfigError, match="fusing LoRA adapters changes the weights"):
        export_model(adapted.model, call, plan, tmp_path / "styled", options)
    half_bundle(adapted, tmp_path / "styled")
    plain, styled = (
        build(tmp_path / name, BuildOptions(TARGET, Layout.VARIANTS)).engines
        for name in ("plain", "styled")
    )
    # An engine of the plain model is not taken for the other.
    assert not {engine.key for engine in plain} & {engine.key for engine in styled}
    for one, other in zip(plain, styled, strict=True):
        assert one.fused == other.fused == other.attentions
    assert plain[0].fused > 0


@needs_builder
def test_attention_in_fp32_is_reported_as_not_fused(tmp_path: Path) -> None:
    export_tiny(wide("dit"), None, tmp_path)
    (spec,) = build(tmp_path, BuildOptions(TARGET)).engines
    assert spec.fused == 0
    assert any("not one fused kernel" in line and "float16" in line for line in spec.findings)


def test_a_graph_that_is_not_sound_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    export_tiny(TINY_MODELS["dit"](), None, tmp_path)

    def refuse(path: Path) -> None:
        raise VerifyError(f"{path.name} is not sound")

    monkeypatch.setattr(sys.modules[build.__module__], "lint", refuse)
    with pytest.raises(VerifyError, match=r"variant_00.onnx is not sound"):
        build(tmp_path, BuildOptions(TARGET))
    assert not list((tmp_path / ENGINES_FOLDER / TARGET).glob("*.engine"))


FAKE = """
import os, signal, sys, time
class ILogger: pass
class NetworkDefinitionCreationFlag: pass
class ProfilingVerbosity: DETAILED = 0
class Config: pass
class Builder:
    def __init__(self, logger): self.logger = logger
    def create_network(self, flags): return None
    def create_builder_config(self): return Config()
    def build_serialized_network(self, network, config):
        how = os.environ["FAKE"]
        self.logger.log("Severity.ERROR", "the reason")
        if how == "crash": os.kill(os.getpid(), signal.SIGSEGV)
        if how == "hang": time.sleep(60)
        return None if how == "nothing" else b"an engine"
class OnnxParser:
    num_errors = 0
    def __init__(self, network, logger): pass
    def parse_from_file(self, path): return True
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("crash", "crashed with SIGSEGV"),
        ("hang", "took longer than 2 s"),
        ("nothing", "made no engine"),
    ],
)
def test_a_builder_that_crashes_ends_in_an_error(
    how: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake_trt.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE", how)
    engine, log = tmp_path / "made.engine", tmp_path / "made.log"
    job = Job("fake_trt", tmp_path / "graph.onnx", engine, log, "current", {})
    with pytest.raises(EngineError, match=said) as caught:
        run_job(job, 2.0, lambda phase, done: None)
    assert "the reason" in str(caught.value)
    assert str(log) in str(caught.value)
    assert not engine.exists()
    monkeypatch.setenv("FAKE", "well")
    run_job(job, 60.0, lambda phase, done: None)
    assert engine.read_bytes() == b"an engine"


def test_auto_says_why(tmp_path: Path) -> None:
    tiny = TINY_MODELS["dit"]()
    _, sites = capture_every_site(tiny)
    export_tiny(tiny, four_rows(sites), tmp_path)
    manifest = read_manifest(tmp_path)
    assert 1 < len(manifest.variants) <= STEPS
    layout, reason = choose_layout(tmp_path, manifest, BuildOptions(TARGET))
    assert layout is Layout.VARIANTS
    assert "within the limit of 2048 MiB" in reason
    layout, reason = choose_layout(tmp_path, manifest, BuildOptions(TARGET, max_engine_mb=0.0))
    assert layout is Layout.SWITCH
    assert "over the limit" in reason
    with pytest.raises(ConfigError, match="no unrolled loop"):
        choose_layout(tmp_path, manifest, BuildOptions(TARGET, Layout.LOOP))


def test_images_become_rows_of_both_halves(tmp_path: Path) -> None:
    tiny = TINY_MODELS["dit"]()
    _, sites = capture_every_site(tiny)
    guided = export_tiny(tiny, four_rows(sites), tmp_path / "guided")
    assert rows_of(guided, (1, 2, 4)) == (2, 4, 8)
    assert rows_of(guided, (1, 2, 4), Layout.SWITCH) == (4, 4, 4)
    dense = export_tiny(tiny, None, tmp_path / "dense")
    assert rows_of(dense, (1, 2, 4)) == (1, 2, 4)
    fixed = ExportOptions(dynamic_batch=False)
    assert (
        rows_of(export_tiny(tiny, None, tmp_path / "fixed", options=fixed), (1, 2, 4)) == (4,) * 3
    )
    with pytest.raises(ConfigError, match="must not decrease"):
        rows_of(dense, (2, 1, 4))


def test_a_target_that_cannot_be_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    export_tiny(TINY_MODELS["dit"](), None, tmp_path)
    with pytest.raises(ConfigError, match="cannot build for this target") as caught:
        build(tmp_path, BuildOptions("sm90"))
    assert "sm89" in str(caught.value)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU here to build for"):
            build(tmp_path, BuildOptions())
    with pytest.raises(ConfigError, match=r"build\(layout\)"):
        ditfastattn.build(tmp_path, target=TARGET, layout="both")
    with pytest.raises(ConfigError, match="no such TensorRT library"):
        ditfastattn.build(tmp_path, target=TARGET, library="tensorflow")


def test_engines_json_is_read_strictly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no engines were built"):
        read_engines(tmp_path)
    (tmp_path / ENGINES).write_text('{"schema_version": 2}')
    with pytest.raises(ConfigError, match="schema_version"):
        read_engines(tmp_path)


KILLED = """
import os
import subprocess
import sys
import time
from pathlib import Path
from ditfastattn.core.locks import sole_writer
from ditfastattn.export.tensorrt.job import Job, run_job
folder = Path(sys.argv[1])
job = Job("fake_trt", folder / "a.onnx", folder / "a.engine", folder / "a.log", "current", {})
with sole_writer(folder / ".lock", folder, "taken") as lock:
    run_job(job, 600.0, lambda phase, done: None, lock)
"""


def is_over(process: int) -> bool:
    """Return whether a process has ended, even if nobody has asked for its exit status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_a_build_whose_parent_was_killed_ends_before_another_begins(tmp_path: Path) -> None:
    (tmp_path / "fake_trt.py").write_text(
        FAKE.replace("how = ", "print(1, 1, os.getpid(), sep='\\t', file=open('pid', 'w')); how = ")
    )
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    paths = [str(tmp_path), str(Path(__file__).parents[2] / "src")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FAKE": "hang"}
    with subprocess.Popen(command, env=environment, cwd=tmp_path) as parent:
        pid = tmp_path / "pid"
        while not (pid.exists() and pid.read_text().endswith("\n")):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
    worker = int(pid.read_text().split()[-1])
    for _ in range(600):
        if is_over(worker):
            break
        time.sleep(0.05)
    assert is_over(worker)
    with sole_writer(tmp_path / ".lock", tmp_path, "taken"):
        assert not list(tmp_path.glob("*.engine*"))

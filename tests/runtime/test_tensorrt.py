"""Engines are driven as their bundle says; ONNX Runtime plays TensorRT where there is no GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]  # it has no annotations
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import ditfastattn
from ditfastattn import CfgLayout, ConfigError, EngineError, Strategy, load
from ditfastattn.export.options import ExportOptions
from ditfastattn.export.tensorrt.switch import make_switch
from ditfastattn.runtime.bundle.files import open_bundle
from ditfastattn.runtime.bundle.manifest import MANIFEST, Manifest, file_hash
from ditfastattn.runtime.bundle.specs import FileSpec
from ditfastattn.runtime.bundle.transformer import BundleTransformer
from ditfastattn.runtime.tensorrt import load as loading
from ditfastattn.runtime.tensorrt.engines import (
    ENGINES_FOLDER,
    SWITCH_FILE,
    Engines,
    EngineSpec,
    Layout,
)
from ditfastattn.runtime.tensorrt.library import Library, find_library
from tests.export.helpers import ddim_stepping, export_once, export_tiny
from tests.helpers import (
    TINY_MODELS,
    capture_every_site,
    largest_difference,
    make_plan,
    mixed_strategies,
    noise,
    tiny_digits_pipeline,
    tiny_dit,
    uniform_strategies,
)
from tests.plans import plan_for
from tests.tiers import slow_but

CPU = torch.device("cpu")
LARGEST = 16  # rows that a played engine takes


class Context:
    """Run an engine as TensorRT's context does: from addresses to addresses."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        wanted = next(item.shape for item in self.session.get_inputs() if item.name == name)
        fixed = all(isinstance(size, int) for size in wanted)
        return tuple(wanted) == shape if fixed else shape[0] <= LARGEST

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        given = {}
        for item in self.session.get_inputs():
            dtype = {"float": "float32", "int64": "int64", "int32": "int32"}[item.type[7:-1]]
            size = int(np.prod(self.shapes[item.name])) * np.dtype(dtype).itemsize
            content = ctypes.string_at(self.addresses[item.name], size)
            given[item.name] = np.frombuffer(content, dtype).reshape(self.shapes[item.name])
        names = [item.name for item in self.session.get_outputs()]
        for name, result in zip(names, self.session.run(names, given), strict=True):
            ctypes.memmove(self.addresses[name], result.tobytes(), result.nbytes)
        return True


class Engine:
    def __init__(self, path: str) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        every = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.names = [item.name for item in every]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return str(self.names[index])

    def create_execution_context(self) -> Context:
        return Context(self.session)


class Runtime:
    def __init__(self, logger: object) -> None: ...

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        """Take the path of an ONNX graph for an engine."""
        return Engine(content.decode()) if content.endswith(b".onnx") else None


class Logger:
    WARNING = 0

    def __init__(self, severity: int) -> None: ...


PLAYED = Library("played", SimpleNamespace(Logger=Logger, Runtime=Runtime), "1")


def play(
    root: Path,
    manifest: Manifest,
    layout: Layout,
    monkeypatch: pytest.MonkeyPatch,
    rows: int = 4,
) -> BundleTransformer:
    """Load the bundle in ``root`` by engines that are its graphs."""
    monkeypatch.setattr(loading, "find_library", lambda name: PLAYED)
    out = root / ENGINES_FOLDER / "played"
    out.mkdir(parents=True)
    switch = None
    graphs = {variant.file: root / variant.file for variant in manifest.variants}
    if layout is Layout.SWITCH:
        made = make_switch(root, manifest, rows)
        switch = made.spec
        graphs = {SWITCH_FILE: root / SWITCH_FILE}
        graphs[SWITCH_FILE].write_bytes(made.model.SerializeToString())
    if layout is Layout.LOOP:
        assert manifest.loop is not None
        graphs = {manifest.loop.file: root / manifest.loop.file}
    elif manifest.hoisted is not None:
        graphs[manifest.hoisted.file] = root / manifest.hoisted.file
    specs = []
    for name, path in graphs.items():
        engine = out / f"{name}.engine"
        engine.write_text(str(path))
        content = FileSpec(bytes=engine.stat().st_size, sha256=file_hash(engine))
        specs.append(
            EngineSpec(
                file=engine.name,
                graph=name,
                key="",
                content=content,
                seconds=0.0,
                attentions=0,
                fused=0,
            )
        )
    engines = Engines(
        library="played",
        version="1",
        target="played",
        layout=layout,
        reason="a test",
        rows=(2, 2, LARGEST),
        manifest_sha256=file_hash(root / MANIFEST),
        engines=tuple(specs),
        switch=switch,
    )
    engines.save(out)
    return loading.load_engines(open_bundle(root), out, CPU)


@pytest.mark.parametrize("layout", [Layout.VARIANTS, Layout.SWITCH])
@pytest.mark.parametrize("name", slow_but({"dit", "pixart"}, TINY_MODELS))
def test_engines_are_driven_to_what_the_interpreter_computes(
    name: str, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = TINY_MODELS[name]()
    _, sites = capture_every_site(tiny)
    rows = mixed_strategies(sites, seed=5)
    manifest = export_tiny(tiny, rows, tmp_path / "bundle")
    model = play(tmp_path / "bundle", manifest, layout, monkeypatch)
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(model), expected) < 1e-4
    assert largest_difference(tiny.run(model), expected) < 1e-4  # the next generation
    assert model.providers == ("played 1",)


def test_a_switch_takes_its_batch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, Strategy.WINDOW_SHARE_CFG)
    manifest = export_tiny(tiny, rows, tmp_path / "bundle")
    switched = play(tmp_path / "bundle", manifest, Layout.SWITCH, monkeypatch)
    stepped = load(tmp_path / "bundle")
    assert largest_difference(tiny.run(switched, 4), tiny.run(stepped, 4)) < 1e-5
    with pytest.raises(EngineError):
        tiny.run(switched, 2)


def test_a_batch_beyond_the_profile_is_an_engines_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_dit()
    manifest = export_tiny(tiny, None, tmp_path / "bundle")
    model = play(tmp_path / "bundle", manifest, Layout.VARIANTS, monkeypatch)
    with pytest.raises(EngineError, match="build it for more images"):
        tiny.run(model, LARGEST + 2)


def test_bad_engines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_dit()
    root = tmp_path / "bundle"
    manifest = export_tiny(tiny, None, root)
    play(root, manifest, Layout.VARIANTS, monkeypatch)
    out = root / ENGINES_FOLDER / "played"

    def reload() -> None:
        loading.load_engines(open_bundle(root), out, CPU)

    engine = out / "variant_00.onnx.engine"
    whole, described = engine.read_text(), (out / "engines.json").read_text()
    engine.write_text(whole + " ")
    with pytest.raises(ConfigError, match="has changed since it was built"):
        reload()
    engine.unlink()
    with pytest.raises(ConfigError, match="the engine is missing"):
        reload()
    engine.write_text(whole)
    for old, new, said in (
        ('"variant_00.onnx.engine"', '"../variant_00.onnx"', "not a file name"),
        ('"graph": "variant_00.onnx"', '"graph": "other.onnx"', "not all engines were built"),
        (file_hash(root / MANIFEST), "0" * 64, "built from another bundle"),
    ):
        assert old in described
        (out / "engines.json").write_text(described.replace(old, new))
        with pytest.raises(ConfigError, match=said):
            reload()


def test_an_engine_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = export_tiny(tiny_dit(), None, tmp_path)
    monkeypatch.setattr(Runtime, "deserialize_cuda_engine", lambda self, content: None)
    with pytest.raises(ConfigError, match="TensorRT refuses the engine"):
        play(tmp_path, manifest, Layout.VARIANTS, monkeypatch)


def test_a_loop_generates_and_cannot_be_stepped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    plan = make_plan(tiny, mixed_strategies(sites, 5), CfgLayout.COND_FIRST, feed_forwards=True)
    stepping = ddim_stepping(tiny, plan)
    manifest = export_once(tiny, plan, tmp_path, ExportOptions(loop=True), stepping)
    model = play(tmp_path, manifest, Layout.LOOP, monkeypatch)
    start, classes = noise(7, 2, 4, 8, 8), torch.arange(4)
    expected = load(tmp_path).generate(start, class_labels=classes)
    assert torch.allclose(model.generate(start, class_labels=classes), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="only the unrolled loop was built"):
        tiny.run(model)


def test_engines_of_steps_have_no_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = export_tiny(tiny_dit(), None, tmp_path)
    model = play(tmp_path, manifest, Layout.VARIANTS, monkeypatch)
    with pytest.raises(ConfigError, match="the unrolled loop was not built"):
        model.generate(noise(7, 2, 4, 8, 8))


def test_engines_are_verified_against_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    call = {"class_labels": [3], "num_inference_steps": 3, "guidance_scale": 2.0}
    plan = plan_for(pipeline, call, [Strategy.FULL, Strategy.WINDOW, Strategy.SHARE_STEP])
    torch._dynamo.reset()
    manifest = ditfastattn.export(pipeline, call, plan, tmp_path, loop=True)
    model = play(tmp_path, manifest, Layout.SWITCH, monkeypatch, rows=2)
    monkeypatch.setattr(loading, "load", lambda folder, **options: model)
    found = ditfastattn.verify(tmp_path, pipeline, call, runtime="tensorrt")
    assert found.passed
    assert len(found.step_errors) == 3
    assert 0.0 < max(found.step_errors) < 1e-4
    assert found.loop_error == 0.0  # a switch has none


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_loading_says_so_and_importing_does_not(tmp_path: Path) -> None:
    export_tiny(tiny_dit(), None, tmp_path)
    with pytest.raises(ConfigError, match="there is none here"):
        load(tmp_path, runtime="tensorrt")
    with pytest.raises(ConfigError, match="no such runtime"):
        load(tmp_path, runtime="tensorflow")


def test_a_library_that_is_absent_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditfastattn.runtime.tensorrt.library.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ditfastattn\[tensorrt-rtx\]"):
        find_library()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_engines_on_a_gpu_are_the_model(tmp_path: Path) -> None:
    tiny = tiny_dit(size=32, head_dim=32)
    _, sites = capture_every_site(tiny)
    rows = mixed_strategies(sites, seed=5)
    export_tiny(tiny, rows, tmp_path)
    ditfastattn.build(tmp_path, target="current", layout="variants", images=(1, 2, 4))
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    for graphs in (False, True):
        model = load(tmp_path, runtime="tensorrt", cuda_graphs=graphs)
        got = [output.cpu() for output in tiny.run(model)]
        assert largest_difference(got, expected) < 1e-2
